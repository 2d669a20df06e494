"""HDF5 files: written whole or not at all, and read as if they came from strangers. Every object is checked before
memory is allocated for it, and no link is followed.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from revdistill.engine import ArtifactError
from revdistill.outer.files import replacing

MAX_TEXT = 4 * 1024 * 1024  # bytes of one attribute
# The oldest format whose own structures have checksums: HDF5 refuses what was damaged, instead of following it. In its
# default format, a file in 300 with a few flipped bits made it loop or crash (2.0.0); in this one a file in 4,000:
# texts have none.
_CHECKED = ("v108", "v108")


class Reader:
    """An open file. Every method that reads raises an ArtifactError that names the file and what is wrong with it."""

    def __init__(self, path: Path, file: h5py.File, size: int) -> None:
        self.path, self._file, self._size = path, file, size

    def fail(self, what: str) -> ArtifactError:
        """The error to raise, with the file's name."""
        return ArtifactError(f"{self.path}: {what}")

    def names(self) -> list[str]:
        """Of the file's datasets and groups, sorted."""
        return sorted(self._file)

    def has(self, name: str) -> bool:
        """Whether there is an attribute of this name."""
        return name in self._file.attrs

    def check_version(self, *expected: int) -> int:
        """The file's format version, one of those expected."""
        version = self.integer("format_version")
        if version not in expected:
            raise self.fail(
                f"has format version {version}; this release reads version {' and '.join(map(str, expected))}"
            )
        return version

    def array(self, name: str, *dtypes: str, ndim: int | None = None) -> np.ndarray:
        """The values of a dataset, which must lie in this very file and be finite where they are floats.

        Args:
            name: of the dataset.
            dtypes: those that are accepted.
            ndim: how many dimensions it must have; None for any.
        """
        link = self._file.get(name, getlink=True) if name in self.names() else None
        if link is None:
            raise self.fail(f"has no dataset {name!r}")
        if not isinstance(link, h5py.HardLink):
            raise self.fail(f"{name!r} is a link to somewhere else; only datasets in the file itself are read")
        node = self._file[name]
        if not isinstance(node, h5py.Dataset):
            raise self.fail(f"{name!r} is not a dataset")
        if node.external or node.is_virtual:
            raise self.fail(f"{name!r} keeps its values in another file; only datasets in the file itself are read")
        if node.dtype not in [np.dtype(dtype) for dtype in dtypes]:
            raise self.fail(f"{name!r} has dtype {node.dtype}; expected {' or '.join(dtypes)}")
        if ndim is not None and node.ndim != ndim:
            raise self.fail(f"{name!r} has shape {list(node.shape)}; expected {ndim} dimensions")
        declared = math.prod(node.shape) * node.dtype.itemsize
        # Stored without compression or in chunks that exist: a file cannot hold more values than it has bytes.
        if declared > self._size or node.compression is not None or node.scaleoffset is not None:
            raise self.fail(
                f"{name!r} declares {declared} bytes of values, more than an honest file of {self._size} bytes holds"
            )
        values: np.ndarray = node[()]
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise self.fail(f"{name!r} has entries that are not finite")
        return values

    def text(self, name: str) -> str:
        """An attribute that is a text."""
        value = self._attribute(name)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if not isinstance(value, str):
            raise self.fail(f"attribute {name!r} is {type(value).__name__}; expected text")
        return value

    def integer(self, name: str) -> int:
        """An attribute that is an integer."""
        value = self._attribute(name)
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise self.fail(f"attribute {name!r} is {type(value).__name__}; expected an integer")
        return int(value)

    def number(self, name: str) -> float:
        """An attribute that is a finite float."""
        value = self._attribute(name)
        if not isinstance(value, (float, np.floating)) or not math.isfinite(value):
            raise self.fail(f"attribute {name!r} is {type(value).__name__} {value}; expected a finite float")
        return float(value)

    def json(self, name: str, kind: type) -> Any:
        """An attribute that holds JSON text of one kind (dict or list)."""
        try:
            value = json.loads(self.text(name))
        except (json.JSONDecodeError, RecursionError) as error:
            raise self.fail(f"attribute {name!r} is not JSON ({error})") from error
        if not isinstance(value, kind):
            raise self.fail(f"attribute {name!r} holds a JSON {type(value).__name__}; expected a {kind.__name__}")
        return value

    def _attribute(self, name: str) -> Any:
        attributes = self._file.attrs
        if name not in attributes:
            raise self.fail(f"has no attribute {name!r}")
        space = attributes.get_id(name)
        if space.shape != () or space.get_storage_size() > MAX_TEXT:
            raise self.fail(
                f"attribute {name!r} has shape {list(space.shape)} and {space.get_storage_size()} bytes; too large"
            )
        value = attributes[name]
        if isinstance(value, (str, bytes)) and len(value) > MAX_TEXT:
            raise self.fail(f"attribute {name!r} is a text of {len(value)} characters; at most {MAX_TEXT} are accepted")
        return value


@contextmanager
def writing(path: Path) -> Iterator[h5py.File]:
    """A new file, which replaces `path` at the end of the block; after an error, `path` is as it was.

    It is made in memory and then written at once: on a full disk HDF5's own writing can end the process (a segmentation
    fault while it closes the file, seen with h5py 3.16).

    Raises:
        OSError: it cannot be written.
    """
    image = io.BytesIO()
    with h5py.File(image, "w", libver=_CHECKED) as file:
        yield file
    with replacing(path) as temporary:
        temporary.write_bytes(image.getbuffer())


@contextmanager
def reading(path: str | Path) -> Iterator[Reader]:
    """Open `path` for reading.

    Raises:
        ArtifactError: there is no such file, or it is damaged; whatever h5py raises on damaged files becomes this.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with h5py.File(path, "r", locking=False) as file:
            yield Reader(path, file, size)
    except ArtifactError:
        raise
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        MemoryError,
        OverflowError,
        AttributeError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{path}: is damaged or not an HDF5 file ({reason})") from error
