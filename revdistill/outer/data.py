"""Real datasets with fixed splits: the built-in ones, the standard image sets, and a user's own files.

Each comes normalised per feature (vectors) or per channel (images) by the training set's mean and standard deviation,
except the two-dimensional ones of the study, which are used as they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from revdistill.engine import ArtifactError
from revdistill.outer.image_files import FROM_FILES
from revdistill.outer.labels import Label, shown
from revdistill.outer.own_files import ACCEPTED, load_own, split
from revdistill.outer.source import Arrays, Origin, Source

SPLIT_SEED = 8  # of make_moons and of every split, as in the study
MOONS_TEST = 0.33
TEST = 0.25
VALIDATION = 0.1
CHUNK = 4096  # samples normalised at once
SMALL, ROUNDING = 1e-8, 1e-6  # a standard deviation below both, the second of the values' size, is rounding


def _none() -> np.ndarray:
    return np.empty(0, np.int64)


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
        class_names: what the classes 0 to classes - 1 are called in the data, in order; by default just that.
        value_range: least and largest value of the inputs before they were normalised.
        origin: what to tell the user of where the data came from.
        rows: of each training sample its position, from 0, in what it was drawn from: the training part of the file,
            folder or set as that has it. By default 0 to N - 1.
        rows_test: likewise of the test samples. Where the test part was drawn from the training part, these are
            positions in the latter.
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
    class_names: tuple[Label, ...] = ()
    value_range: tuple[float, float] = (0.0, 0.0)
    origin: Origin = field(default_factory=Origin)
    rows: np.ndarray = field(default_factory=_none)
    rows_test: np.ndarray = field(default_factory=_none)

    def __post_init__(self) -> None:
        if not self.class_names:
            object.__setattr__(self, "class_names", tuple(range(self.classes)))
        for name, y in (("rows", self.y), ("rows_test", self.y_test)):
            if not len(getattr(self, name)):
                object.__setattr__(self, name, np.arange(len(y)))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def is_image(self) -> bool:
        """Whether a sample is [channels, H, W]."""
        return len(self.input_shape) == 3

    def summary(self) -> dict[str, float]:
        """Numbers by which other data of the same name are told from these, on another machine too (see `alike`)."""
        parts = {"training": self.y, "validation": self.y_validation, "test": self.y_test}
        mean, std = (np.abs(self.normalization[key]).mean() for key in ("mean", "std"))
        return {
            **{f"{part} labels": float(zlib.crc32(y.cpu().numpy().tobytes())) for part, y in parts.items()},
            **{f"{part} samples": float(len(y)) for part, y in parts.items()},
            **{"features": float(self.x[0].numel()), "mean": float(mean), "standard deviation": float(std)},
            **{"least value": self.value_range[0], "largest value": self.value_range[1]},
        }

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
    """A dataset by name, or a user's own by path.

    Args:
        name: one of NAMES, or the path of a file or folder, see `load_own`.
        data_dir: where the files of mnist, fashion-mnist and cifar10 are, see `image_files`.

    Raises:
        ValueError: there is no dataset of this name.
        ArtifactError: names the file and what is wrong with it.
    """
    if name in BUILT_IN:
        x, y = BUILT_IN[name]()
        own = Source((np.asarray(x, np.float32), np.asarray(y, np.int64)), None, None, ())
        test = MOONS_TEST if name == "moons" else TEST
        return _assemble(name, own, test=test, normalise=name not in _AS_THEY_ARE)
    if name in FROM_FILES:
        (x, y), (x_test, y_test) = FROM_FILES[name](Path(data_dir))
        return _assemble(name, Source((_unit(x), y), None, (_unit(x_test), y_test), ()))
    found = load_own(name)
    if found is None:
        what = f"{name} is a file of another kind" if split(name)[0].is_file() else f"unknown dataset {name!r}"
        raise ValueError(f"{what}; accepted are {', '.join(NAMES)}, {ACCEPTED}")
    return _assemble(*found)


def short_name(name: str) -> str:
    """Of a dataset, for the name of a directory: its own, or that of its file or folder."""
    return name if name in NAMES else split(name)[0].resolve().stem


def _assemble(name: str, source: Source, *, test: float = TEST, normalise: bool = True) -> Dataset:
    """Split off what the source does not have, and normalise by what is then the training part."""
    splits = []
    own, tested, held = source.train, source.test, source.validation
    rows, rows_test = np.arange(len(own[1])), np.arange(len(tested[1]) if tested else 0)
    if tested is None:
        own, tested, rows, rows_test = _test_split(name, *own, test, source.class_names)
        splits.append(f"test data: {test:.0%} of the training data, drawn by a fixed seed")
    classes = len(source.class_names) or int(max(own[1].max(), tested[1].max())) + 1
    if held is None:
        own, held, rows = _held_out(name, *own, rows)
        splits.append(f"validation data: {VALIDATION:.0%} of the training data, drawn by a fixed seed")
    x = own[0]
    # vectors: per feature; images: per channel
    axes = (0, 2, 3) if x.ndim == 4 else (0,)
    mean, std = x.mean(axes, dtype=np.float64), x.std(axes, dtype=np.float64)
    if not normalise:
        mean, std = np.zeros_like(mean), np.ones_like(std)
    std = np.where(_vary(x, std, axes), std, 1.0)
    shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)

    def tensor(values: np.ndarray) -> Tensor:
        found = np.empty(values.shape, np.float32)
        for start in range(0, len(values), CHUNK):  # the float64 of all images at once would be a gigabyte
            rows = slice(start, start + CHUNK)
            found[rows] = (values[rows] - mean.reshape(shape)) / std.reshape(shape)
        return torch.from_numpy(found)

    parts: dict[str, Tensor] = {}
    for suffix, (values, y) in (("", own), ("_validation", held), ("_test", tested)):
        parts |= {f"x{suffix}": tensor(values), f"y{suffix}": torch.from_numpy(y)}
    return Dataset(
        name=name,
        classes=classes,
        normalization={"mean": mean.tolist(), "std": std.tolist()},
        class_names=source.class_names,
        value_range=(float(x.min()), float(x.max())),
        origin=replace(source.origin, splits=tuple(splits)),
        rows=rows,
        rows_test=rows_test,
        **parts,
    )


def _vary(x: np.ndarray, std: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Which features or channels vary by more than rounding, whatever their unit is."""
    least, most = x.min(axes), x.max(axes)
    size = np.maximum(np.abs(least), np.abs(most)).astype(np.float64)
    found: np.ndarray = (least < most) & (std > np.minimum(SMALL, ROUNDING * size))
    return found


def _test_split(
    name: str, x: np.ndarray, y: np.ndarray, share: float, names: Sequence[Label]
) -> tuple[Arrays, Arrays, np.ndarray, np.ndarray]:
    """The training and the test part, and the positions of each."""
    from sklearn.model_selection import train_test_split

    # The study's own split is not stratified; elsewhere every class is to be in both parts.
    stratify = None if name == "moons" else y
    counts = np.bincount(y)
    if counts.min() < 2:
        rare = [names[i] if names else i for i in np.flatnonzero(counts < 2).tolist()]
        raise ArtifactError(
            f"{name}: too few samples per class to split into training and test data: {len(rare)} of {len(counts)} "
            f"classes have one sample ({shown(rare)}); leave them out, or give a test part"
        )
    try:
        x, x_test, y, y_test, rows, rows_test = train_test_split(
            x, y, np.arange(len(y)), test_size=share, random_state=SPLIT_SEED, stratify=stratify
        )
    except ValueError as error:
        raise ArtifactError(
            f"{name}: too few samples per class to split into training and test data ({error})"
        ) from error
    return (x, y), (x_test, y_test), rows, rows_test


def _held_out(name: str, x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> tuple[Arrays, Arrays, np.ndarray]:
    """The rest and what is held out, and the positions of the rest."""
    from sklearn.model_selection import train_test_split

    try:
        x, x_held, y, y_held, rows, _ = train_test_split(x, y, rows, test_size=VALIDATION, random_state=SPLIT_SEED)
    except ValueError as error:
        raise ArtifactError(f"{name}: too few samples to hold some out for validation ({error})") from error
    return (x, y), (x_held, y_held), rows


def _unit(images: np.ndarray) -> np.ndarray:
    """uint8 as float32 from 0 to 1."""
    found: np.ndarray = images.astype(np.float32) / np.float32(255)
    return found
