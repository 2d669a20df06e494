"""Real datasets with fixed splits: the built-in ones, the standard image sets, and any .npz with x and y.

Each comes normalised per feature (vectors) or per channel (images) by the training set's mean and standard deviation,
except the two-dimensional ones of the study, which are used as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from revdistill.engine import ArtifactError
from revdistill.outer.image_files import FROM_FILES
from revdistill.outer.npz import Arrays, load_npz

SPLIT_SEED = 8  # of make_moons and of every split, as in the study
MOONS_TEST = 0.33
TEST = 0.25
VALIDATION = 0.1
CHUNK = 4096  # samples normalised at once


@dataclass(frozen=True)
class Dataset:
    """Real data in three parts.

    Args:
        name: of the dataset, or the path of its file.
        x: the training part's inputs, float32 [N, *input_shape], normalised.
        y: its classes, int64 [N] from 0 to classes - 1.
        x_validation: what is held out of training.
        y_validation: likewise.
        x_test: what is used for nothing but the final measurement.
        y_test: likewise.
        classes: how many there are.
        normalization: {"mean": [...], "std": [...]}, per feature or channel: what was done to the inputs.
    """

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
        """Of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def is_image(self) -> bool:
        """Whether a sample is [channels, H, W]."""
        return len(self.input_shape) == 3

    def to(self, device: torch.device) -> Dataset:
        """The same data on another device."""
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
NAMES = (*BUILT_IN, *FROM_FILES)
DATA_DIR = "data"
_AS_THEY_ARE = {"moons", "circles", "blobs"}


def load(name: str, data_dir: str | Path = DATA_DIR) -> Dataset:
    """A dataset by name, or a .npz file by path.

    A .npz file holds x, numbers [N, features] or [N, H, W] or [N, channels, H, W], and y, integer classes [N];
    optionally x_test and y_test.

    Args:
        name: one of NAMES, or the path of a .npz file.
        data_dir: where the files of mnist, fashion-mnist and cifar10 are, see `image_files`.

    Raises:
        ValueError: there is no dataset of this name.
        ArtifactError: names the file and what is wrong with it.
    """
    if name in BUILT_IN:
        x, y = BUILT_IN[name]()
        test = MOONS_TEST if name == "moons" else TEST
        return _split(
            name, np.asarray(x, np.float32), np.asarray(y, np.int64), test, normalise=name not in _AS_THEY_ARE
        )
    if name in FROM_FILES:
        (x, y), (x_test, y_test) = FROM_FILES[name](Path(data_dir))
        return _assemble(name, _unit(x), y, _unit(x_test), y_test, normalise=True)
    if not name.endswith(".npz"):
        raise ValueError(f"unknown dataset {name!r}; accepted are {', '.join(NAMES)} and the path of a .npz file")
    own, test_data = load_npz(Path(name))
    full_name = str(Path(name).resolve())
    return (
        _split(full_name, *own, TEST, normalise=True)
        if test_data is None
        else _assemble(full_name, *own, *test_data, normalise=True)
    )


def _split(name: str, x: np.ndarray, y: np.ndarray, test: float, *, normalise: bool) -> Dataset:
    from sklearn.model_selection import train_test_split

    # The study's own split is not stratified; elsewhere every class is to be in both parts.
    stratify = None if name == "moons" else y
    try:
        x, x_test, y, y_test = train_test_split(x, y, test_size=test, random_state=SPLIT_SEED, stratify=stratify)
    except ValueError as error:
        raise ArtifactError(
            f"{name}: too few samples per class to split into training and test data ({error})"
        ) from error
    return _assemble(name, x, y, x_test, y_test, normalise=normalise)


def _assemble(
    name: str, x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, *, normalise: bool
) -> Dataset:
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
        found = np.empty(values.shape, np.float32)
        for start in range(0, len(values), CHUNK):  # the float64 of all images at once would be a gigabyte
            rows = slice(start, start + CHUNK)
            found[rows] = (values[rows] - mean.reshape(shape)) / std.reshape(shape)
        return torch.from_numpy(found)

    parts = {
        "x": tensor(x),
        "y": torch.from_numpy(y),
        "x_validation": tensor(x_held),
        "y_validation": torch.from_numpy(y_held),
        "x_test": tensor(x_test),
        "y_test": torch.from_numpy(y_test),
    }
    return Dataset(name=name, classes=classes, normalization={"mean": mean.tolist(), "std": std.tolist()}, **parts)


def _unit(images: np.ndarray) -> np.ndarray:
    """uint8 as float32 from 0 to 1."""
    found: np.ndarray = images.astype(np.float32) / np.float32(255)
    return found
