"""A user's own dataset in a .npz file: arrays found by their names, in the shapes and forms that people save."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from revdistill.engine import ArtifactError
from revdistill.outer.inputs import FIRST, LAST, arranged, checked, layout
from revdistill.outer.labels import plain
from revdistill.outer.roles import INPUTS, LABELS, TEST, TRAIN, VALIDATION, role_of, roles
from revdistill.outer.source import Origin, Part, Read, Source, joined

LAYOUT = "layout"  # the array that says where images have their channels


class Member(NamedTuple):
    """What a .npz file declares of an array; `problem` is why it cannot be read, if so."""

    shape: tuple[int, ...]
    dtype: str
    problem: str | None


class Npz:
    """An open .npz file, whose arrays are read one by one.

    Args:
        path: for messages.
        archive: the file as what it is.
        arrays: the file as numpy has it.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, arrays: Any) -> None:
        self.path, self._arrays = path, arrays
        self.members: dict[str, Member] = {}
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name in self.members:
                raise ArtifactError(f"{path}: holds two arrays of the name {name!r}")
            self.members[name] = _member(archive, info)

    def array(self, name: str) -> np.ndarray:
        """An array.

        Raises:
            ArtifactError: it cannot be read; says why.
        """
        problem = self.members[name].problem
        if problem:
            raise ArtifactError(f"{self.path}: array {name!r} {problem}")
        found: np.ndarray = self._arrays[name]
        return found


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    with archive.open(info) as member:
        try:
            version = np.lib.format.read_magic(member)
        except ValueError:
            return Member((), "?", "is no .npy file")
        read_header: Any = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            return Member((), "?", f"is of .npy version {version}; accepted are 1.0 and 2.0")
        shape, _, dtype = read_header(member)
    declared = dtype.itemsize * int(np.prod(shape, dtype=object))
    problem = None
    if dtype.hasobject:
        problem = "holds Python objects; only numbers and plain texts are read: save it with .astype(...)"
    elif declared > info.file_size:
        problem = f"declares {declared} bytes, but holds {info.file_size}"
    return Member(shape, str(dtype), problem)


@contextmanager
def opened(path: Path) -> Iterator[Npz]:
    """A .npz file. No pickle is read, and no more memory is allocated than the file has contents.

    Raises:
        ArtifactError: names the file and what is wrong with it.
    """
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
            yield Npz(path, archive, arrays)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except ArtifactError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, MemoryError, NotImplementedError) as error:
        raise ArtifactError(f"{path}: is not a readable .npz file ({error})") from error
    except Exception as error:  # zlib and the header's parser raise what they like on a damaged file
        raise ArtifactError(f"{path}: is damaged ({type(error).__name__}: {error})") from error


def load_npz(path: Path) -> Source:
    """A user's own data.

    Args:
        path: of the .npz file.

    Returns:
        What it holds, as the names of its arrays say.

    Raises:
        ArtifactError: names the file and what is wrong with it.
    """
    with opened(path) as file:
        found = roles(path, _candidates(file.members))
        arrays = {role: file.array(name) for role, name in found.items()}
        for (part, kind), x in arrays.items():
            if kind == INPUTS:
                checked(f"{path}: {found[part, kind]}", x)
        inputs = arrays[TRAIN, INPUTS]
        order, notes = FIRST, []
        if inputs.ndim == 4:
            where = f"{path}: {found[TRAIN, INPUTS]}"
            given = _given_layout(file) if LAYOUT in file.members else None
            order = given or layout(where, inputs.shape)
            notes = _notes(inputs.shape, order)
        parts = {}
        for part in (TRAIN, VALIDATION, TEST):
            if (part, INPUTS) not in found:
                continue
            x_name, y_name = found[part, INPUTS], found[part, LABELS]
            x = arrays[part, INPUTS]
            labels = plain(f"{path}: {y_name}", arrays[part, LABELS], len(x))
            parts[part] = Part(arranged(f"{path}: {x_name}", x, order), labels, x_name, y_name)
        read = [
            Read(found[part, kind], f"{part} {kind}", file.members[found[part, kind]].shape, str(arrays[role].dtype))
            for part in (TRAIN, VALIDATION, TEST)
            for kind in (INPUTS, LABELS)
            if (role := (part, kind)) in found
        ]
        used = {*found.values(), *([LAYOUT] if inputs.ndim == 4 else [])}
        unread = tuple(name for name in file.members if name not in used)
    return joined(path, parts, Origin(tuple(read), unread, tuple(notes)))


def _candidates(members: dict[str, Member]) -> list[str]:
    """The names that may have roles. An array that cannot be read gives way to one of the same role that can."""
    readable = {role_of(name) for name, member in members.items() if member.problem is None}
    return [name for name, member in members.items() if member.problem is None or role_of(name) not in readable]


def _given_layout(file: Npz) -> str:
    text = file.array(LAYOUT)
    if text.ndim or text.dtype.kind != "U" or str(text) not in (FIRST, LAST):
        raise ArtifactError(
            f"{file.path}: layout is {text.dtype} of shape {text.shape}, {str(text)[:40]!r}; accepted are {FIRST!r} "
            f"and {LAST!r}"
        )
    return str(text)


def _notes(shape: tuple[int, ...], order: str) -> list[str]:
    _, *entry = shape
    channels, height, width = entry if order == FIRST else (entry[2], *entry[:2])
    said = f"{channels} {'channel' if channels == 1 else 'channels'} of {height} x {width}"
    if order == LAST:
        return [f"images {list(shape)} have their channels last: moved, to {said}"]
    return [f"images {list(shape)} are read as {said}"] if channels not in (1, 3, 4) else []
