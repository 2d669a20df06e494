"""What an attribution of the command's has found so far, and OUT/attributing.h5, which keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from revdistill.attribute.config import AttributeConfig
from revdistill.attribute.experiment import Experiment
from revdistill.attribute.flipping import LEFT_OUT, RESTARTS
from revdistill.outer import checkpoint as checkpoints
from revdistill.outer.hdf5 import Reader, reading, writing

FORMAT_VERSION = 1
FILE_NAME = "attributing.h5"
_ARRAYS = ("scores", "losses", "training_losses")


@dataclass(frozen=True)
class Scored:
    """What the attribution itself gives.

    scores: [K, n]; losses: [K]; training_losses: [n], the examples' own; accuracy: of the trained network, on all test
    samples.
    """

    scores: np.ndarray
    losses: np.ndarray
    training_losses: np.ndarray
    accuracy: float

    @property
    def harm(self) -> np.ndarray:
        """Of each example the mean score over the queries: [n] in float64."""
        found: np.ndarray = self.scores.mean(0, dtype=np.float64)
        return found


@dataclass(frozen=True)
class Found:
    """What there is so far.

    Attributes:
        scored: None before anything is done.
        smoothness: of `smoothness`, nan where nothing moved; None before.
        actual: [r, K], the queries' losses of the first r retrainings.
        accuracies: of fresh networks, by what of LEFT_OUT they do not see.
    """

    scored: Scored | None = None
    smoothness: float | None = None
    actual: np.ndarray | None = None
    accuracies: dict[str, list[float]] = field(default_factory=dict)


def save(path: Path, experiment: Experiment, found: Found) -> None:
    """Write the file whole, or leave what was there. Raises OSError."""
    with writing(path) as file:
        config = experiment.config.to_dict()
        checkpoints.write_head(file, version=FORMAT_VERSION, config=config, data=experiment.data)
        file.attrs["scored"] = int(found.scored is not None)
        if found.scored is not None:
            for name in _ARRAYS:
                file.create_dataset(name, data=getattr(found.scored, name))
            file.attrs["accuracy"] = found.scored.accuracy
        _save_check(file, found)
        file.attrs["accuracies"] = json.dumps(found.accuracies)


def _save_check(file: h5py.File, found: Found) -> None:
    smooth = found.smoothness
    file.attrs["smoothness"] = json.dumps([] if smooth is None else [None if np.isnan(smooth) else smooth])
    if found.actual is not None:
        file.create_dataset("actual", data=found.actual)


def read_config(path: Path) -> AttributeConfig:
    """The configuration of the attribution that wrote the file.

    Raises:
        ValueError: there is no such file.
        ArtifactError: names the file and what is wrong with it.
    """
    return checkpoints.read_config(path, FORMAT_VERSION, AttributeConfig.from_dict)


def restore(path: Path, experiment: Experiment) -> Found:
    """What there was when `save` was called.

    Raises:
        ValueError: there is no such file, or its configuration or data are not the experiment's.
        ArtifactError: names the file and what is wrong with it.
    """
    checkpoints.check_same(path, experiment.config.to_dict(), read_config(path).to_dict())
    checkpoints.check_same_data(path, experiment.data)
    with reading(path) as file:
        return Found(_scored(file, experiment), _smoothness(file), _actual(file, experiment), _accuracies(file))


def _scored(file: Reader, experiment: Experiment) -> Scored | None:
    if not file.integer("scored"):
        return None
    queries, n = len(experiment.queries), len(experiment.examples)
    shapes = dict(zip(_ARRAYS, ((queries, n), (queries,), (n,)), strict=True))
    arrays = {name: file.array(name, "float32", "float64") for name in _ARRAYS}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise file.fail(f"{name!r} has shape {list(arrays[name].shape)}; expected {list(shape)}")
    return Scored(**arrays, accuracy=file.number("accuracy"))


def _smoothness(file: Reader) -> float | None:
    found = file.json("smoothness", list)
    if len(found) > 1 or not all(value is None or isinstance(value, float) for value in found):
        raise file.fail("attribute 'smoothness' must list a number or null, or nothing")
    return None if not found else float("nan") if found[0] is None else found[0]


def _actual(file: Reader, experiment: Experiment) -> np.ndarray | None:
    if "actual" not in file.names():
        return None
    found = file.array("actual", "float32", "float64", ndim=2)
    queries, most = len(experiment.queries), experiment.config.retrainings
    if found.shape[1] != queries or not 1 <= len(found) <= most:
        raise file.fail(f"'actual' has shape {list(found.shape)}; expected [1 to {most}, {queries}]")
    return found


def _accuracies(file: Reader) -> dict[str, list[float]]:
    found: dict[str, list[float]] = file.json("accuracies", dict)
    for name, each in found.items():
        numbers = isinstance(each, list) and len(each) == RESTARTS and all(isinstance(value, float) for value in each)
        if name not in LEFT_OUT or not numbers:
            raise file.fail(f"attribute 'accuracies' must hold {RESTARTS} numbers of each of {', '.join(LEFT_OUT)}")
    return found
