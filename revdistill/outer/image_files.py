"""MNIST, Fashion-MNIST and CIFAR-10 in the files that their authors publish, checked before they are believed.

MNIST and Fashion-MNIST: four idx files, gzipped or plain. CIFAR-10: the six .bin files of the binary version. They are
looked for in the given folder, in one below it named like the dataset, and where torchvision puts them.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import numpy as np

from revdistill.engine import ArtifactError
from revdistill.outer.source import Arrays

CLASSES = 10
MNIST_SIDE, CIFAR_SHAPE = 28, (3, 32, 32)
MAX_BYTES = 2**31  # of one file's values: far beyond any of these datasets
_UNSIGNED_BYTE = 8  # the idx code of the only type that these datasets use


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of an idx file.

    Args:
        path: gzipped where its name ends in .gz.
        dimensions: that the array must have.

    Returns:
        The array, uint8.

    Raises:
        ArtifactError: names the file and what is wrong with it.
    """
    with _opened(path) as file:
        header = _exactly(path, file, 4 + 4 * dimensions, "header")
        expected = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
        if header[:4] != expected:
            raise ArtifactError(
                f"{path}: magic number is {int.from_bytes(header[:4], 'big')}; an idx file of bytes in {dimensions} "
                "dimensions "
                f"has {int.from_bytes(expected, 'big')}"
            )
        shape = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
        count = math.prod(shape)
        if not 0 < count < MAX_BYTES:
            raise ArtifactError(
                f"{path}: declares an array of shape {list(shape)}; accepted are 1 to {MAX_BYTES} values"
            )
        values = _exactly(path, file, count, f"array of shape {list(shape)}")
        if file.read(1):
            raise ArtifactError(f"{path}: goes on after its array of shape {list(shape)}")
        return np.frombuffer(values, np.uint8).reshape(shape)


def read_cifar10(path: Path) -> Arrays:
    """One file of CIFAR-10's binary version.

    Args:
        path: of the file.

    Returns:
        Images uint8 [N, 3, 32, 32] and classes int64 [N].

    Raises:
        ArtifactError: names the file and what is wrong with it.
    """
    record = 1 + math.prod(CIFAR_SHAPE)
    with _opened(path) as file:
        values = file.read(MAX_BYTES)
    if not values or len(values) % record:
        raise ArtifactError(f"{path}: has {len(values)} bytes; CIFAR-10's binary version has {record} for each image")
    rows = np.frombuffer(values, np.uint8).reshape(-1, record)
    return rows[:, 1:].reshape(-1, *CIFAR_SHAPE), _labels(path, rows[:, 0])


def _idx_pair(images_path: Path, labels_path: Path) -> Arrays:
    images, labels = read_idx(images_path, 3), _labels(labels_path, read_idx(labels_path, 1))
    if images.shape[1:] != (MNIST_SIDE, MNIST_SIDE):
        raise ArtifactError(f"{images_path}: has images of {images.shape[1]} x {images.shape[2]}; accepted is 28 x 28")
    if len(images) != len(labels):
        raise ArtifactError(
            f"{labels_path}: has {len(labels)} labels for the {len(images)} images of {images_path.name}"
        )
    return images[:, None], labels


def _labels(path: Path, labels: np.ndarray) -> np.ndarray:
    if labels.max() >= CLASSES:
        raise ArtifactError(
            f"{path}: has the label {int(labels.max())} at position {int(labels.argmax())}; accepted are 0 to 9"
        )
    return labels.astype(np.int64)


def _idx_dataset(name: str, folders: Sequence[str]) -> Callable[[Path], tuple[Arrays, Arrays]]:
    def load(data_dir: Path) -> tuple[Arrays, Arrays]:
        found = _find(
            name,
            data_dir,
            folders,
            [_idx_names(part, kind) for part in ("train", "t10k") for kind in ("images", "labels")],
        )
        return _idx_pair(found[0], found[1]), _idx_pair(found[2], found[3])

    return load


def _idx_names(part: str, kind: str) -> list[str]:
    dimensions = 3 if kind == "images" else 1
    stems = [f"{part}-{kind}-idx{dimensions}-ubyte", f"{part}-{kind}.idx{dimensions}-ubyte"]
    return [stem + suffix for stem in stems for suffix in (".gz", "")]


def _cifar10(data_dir: Path) -> tuple[Arrays, Arrays]:
    names = [[f"data_batch_{i}.bin"] for i in range(1, 6)] + [["test_batch.bin"]]
    *train, test = [
        read_cifar10(path) for path in _find("cifar10", data_dir, ("cifar10", "cifar-10-batches-bin"), names)
    ]
    return (np.concatenate([x for x, _ in train]), np.concatenate([y for _, y in train])), test


def _find(dataset: str, data_dir: Path, folders: Sequence[str], wanted: Sequence[Sequence[str]]) -> list[Path]:
    """A path for each wanted file (a list of names that it may have), all from one folder."""
    places = [*(data_dir / folder for folder in folders), data_dir]
    best: tuple[int, Path, list[Path | None]] | None = None
    for place in places:
        paths = [next((place / name for name in names if (place / name).is_file()), None) for names in wanted]
        count = sum(path is not None for path in paths)
        if best is None or count > best[0]:
            best = (count, place, paths)
    assert best is not None
    count, place, paths = best
    complete = [path for path in paths if path is not None]
    if len(complete) == len(wanted):
        return complete
    missing = [" or ".join(names[:2]) for names, path in zip(wanted, paths, strict=True) if path is None]
    if count:
        raise ArtifactError(f"{place}: has {count} of the {len(wanted)} files of {dataset}, but no {missing[0]}")
    raise ArtifactError(
        f"{dataset}: no {missing[0]} in {', '.join(str(p) for p in places)}; say with --data-dir where the dataset's "
        "files are"
    )


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file, unpacked where it is gzipped. What goes wrong in reading becomes ArtifactError."""
    try:
        with cast(IO[bytes], gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")) as file:
            yield file
    except ArtifactError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error


def _exactly(path: Path, file: IO[bytes], count: int, what: str) -> bytes:
    values = file.read(count)
    if len(values) < count:
        raise ArtifactError(f"{path}: ends after {len(values)} of the {count} bytes of its {what}")
    return values


FROM_FILES: dict[str, Callable[[Path], tuple[Arrays, Arrays]]] = {
    "mnist": _idx_dataset("mnist", ("mnist", "MNIST/raw", "MNIST")),
    "fashion-mnist": _idx_dataset("fashion-mnist", ("fashion-mnist", "FashionMNIST/raw", "FashionMNIST")),
    "cifar10": _cifar10,
}
