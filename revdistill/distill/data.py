"""Real datasets with fixed splits: the built-in ones, and any .npz with x and y.

Each comes normalised per feature (vectors) or per channel (images) by the training set's mean and standard deviation, except
the two-dimensional ones of the study, which are used as they are.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revdistill.engine import ArtifactError

SPLIT_SEED = 8  # of make_moons and of every split, as in the study
MOONS_TEST = 0.33
TEST = 0.25
VALIDATION = 0.1

Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Dataset:
    """x: float32 [N, *input_shape], normalised; y: int64 [N] in 0..classes-1. validation is held out of training."""

    name: str
    x: Tensor
    y: Tensor
    x_validation: Tensor
    y_validation: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    normalization: dict[str, list[float]]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    @property
    def is_image(self) -> bool:
        return len(self.input_shape) == 3

    def to(self, device: torch.device) -> Dataset:
        tensors = ("x", "y", "x_validation", "y_validation", "x_test", "y_test")
        return Dataset(**(self.__dict__ | {name: getattr(self, name).to(device) for name in tensors}))


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images[:, None].astype(np.float32) / 16, found.target


def _moons() -> Arrays:
    from sklearn.datasets import make_moons

    x, y = make_moons(n_samples=1500, noise=0.05, random_state=SPLIT_SEED)
    return x, y


def _circles() -> Arrays:
    from sklearn.datasets import make_circles

    x, y = make_circles(n_samples=1500, noise=0.05, factor=0.5, random_state=SPLIT_SEED)
    return x, y


def _blobs() -> Arrays:
    from sklearn.datasets import make_blobs

    x, y = make_blobs(n_samples=1500, centers=4, cluster_std=0.6, center_box=(-3, 3), random_state=SPLIT_SEED)
    return x, y


BUILT_IN: dict[str, Callable[[], Arrays]] = {"digits": _digits, "moons": _moons, "circles": _circles, "blobs": _blobs}
_AS_THEY_ARE = {"moons", "circles", "blobs"}


def load(name: str) -> Dataset:
    """A built-in dataset by name, or a .npz file by path.

    The file holds x, numbers [N, features] or [N, H, W] or [N, channels, H, W], and y, integer classes [N]; optionally x_test
    and y_test. Errors: ValueError for a name that is neither; ArtifactError that names the file and what is wrong with it.
    """
    if name in BUILT_IN:
        x, y = BUILT_IN[name]()
        test = MOONS_TEST if name == "moons" else TEST
        return _split(name, np.asarray(x, np.float32), np.asarray(y, np.int64), test, normalise=name not in _AS_THEY_ARE)
    if not name.endswith(".npz"):
        raise ValueError(f"unknown dataset {name!r}; accepted are {', '.join(BUILT_IN)} and the path of a .npz file")
    return _from_npz(Path(name))


def _from_npz(path: Path) -> Dataset:
    arrays = read_npz(path)
    for key in ("x", "y"):
        if key not in arrays:
            raise ArtifactError(f"{path}: has no array {key!r}; it holds {sorted(arrays) or 'nothing'}, and x and y are needed")
    x, classes, y = _checked(path, "x", arrays["x"], "y", arrays["y"])
    if "x_test" not in arrays or "y_test" not in arrays:
        return _split(str(path.resolve()), x, y, TEST, normalise=True)
    x_test, test_classes, y_test = _checked(path, "x_test", arrays["x_test"], "y_test", arrays["y_test"])
    if x_test.shape[1:] != x.shape[1:]:
        raise ArtifactError(f"{path}: x_test has entries of shape {x_test.shape[1:]}, but x of {x.shape[1:]}")
    if not set(test_classes) <= set(classes):
        raise ArtifactError(f"{path}: y_test has classes {sorted(set(test_classes) - set(classes))} that y does not have")
    y_test = np.searchsorted(classes, test_classes[y_test])
    return _assemble(str(path.resolve()), x, y, x_test, y_test, normalise=True)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file. No pickle is read, and nothing larger than the file's own contents is allocated."""
    try:
        found = {}
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                with archive.open(info) as member:
                    version = np.lib.format.read_magic(member)
                    read_header: Any = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }.get(version)
                    if read_header is None:
                        raise ArtifactError(f"{path}: array {key!r} is of .npy version {version}; accepted are 1.0 and 2.0")
                    shape, _, dtype = read_header(member)
                if dtype.hasobject:
                    raise ArtifactError(f"{path}: array {key!r} holds Python objects; only numbers are read")
                declared = dtype.itemsize * int(np.prod(shape, dtype=object))
                if declared > info.file_size:
                    raise ArtifactError(f"{path}: array {key!r} declares {declared} bytes, but holds {info.file_size}")
                found[key] = arrays[key]
        return found
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except ArtifactError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, MemoryError, NotImplementedError) as error:
        raise ArtifactError(f"{path}: is not a readable .npz file ({error})") from error
    except Exception as error:  # zlib and the header's parser raise what they like on a damaged file
        raise ArtifactError(f"{path}: is damaged ({type(error).__name__}: {error})") from error


def _checked(path: Path, x_name: str, x: np.ndarray, y_name: str, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x as float32 with a channel dimension, the classes, and y as indices into them."""
    if x.dtype.kind not in "fiub":
        raise ArtifactError(f"{path}: {x_name} has dtype {x.dtype}; accepted are numbers")
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise ArtifactError(f"{path}: {x_name} has shape {x.shape}; accepted are (N, features), (N, H, W), (N, channels, H, W)")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise ArtifactError(f"{path}: {y_name} is {y.dtype} of shape {y.shape}; accepted are integer classes of shape ({len(x)},)")
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ArtifactError(f"{path}: {x_name} has entries that are not finite in float32")
    classes, indices = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ArtifactError(f"{path}: {y_name} has {len(classes)} class; at least two are needed")
    return (x[:, None] if x.ndim == 3 else x), classes, indices.astype(np.int64)


def _split(name: str, x: np.ndarray, y: np.ndarray, test: float, *, normalise: bool) -> Dataset:
    from sklearn.model_selection import train_test_split

    # The study's own split is not stratified; elsewhere every class is to be in both parts.
    stratify = None if name == "moons" else y
    try:
        x, x_test, y, y_test = train_test_split(x, y, test_size=test, random_state=SPLIT_SEED, stratify=stratify)
    except ValueError as error:
        raise ArtifactError(f"{name}: too few samples per class to split into training and test data ({error})") from error
    return _assemble(name, x, y, x_test, y_test, normalise=normalise)


def _assemble(name: str, x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, *, normalise: bool) -> Dataset:
    from sklearn.model_selection import train_test_split

    classes = int(max(y.max(), y_test.max())) + 1
    try:
        x, x_held, y, y_held = train_test_split(x, y, test_size=VALIDATION, random_state=SPLIT_SEED)
    except ValueError as error:
        raise ArtifactError(f"{name}: too few samples to hold some out for validation ({error})") from error
    # vectors: per feature; images: per channel
    axes = (0, 2, 3) if x.ndim == 4 else (0,)
    mean, std = x.mean(axes, dtype=np.float64), x.std(axes, dtype=np.float64)
    if not normalise:
        mean, std = np.zeros_like(mean), np.ones_like(std)
    std = np.where(std > 1e-8, std, 1.0)
    shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(((values - mean.reshape(shape)) / std.reshape(shape)).astype(np.float32))

    parts = {
        "x": tensor(x),
        "y": torch.from_numpy(y),
        "x_validation": tensor(x_held),
        "y_validation": torch.from_numpy(y_held),
        "x_test": tensor(x_test),
        "y_test": torch.from_numpy(y_test),
    }
    return Dataset(name=name, classes=classes, normalization={"mean": mean.tolist(), "std": std.tolist()}, **parts)
