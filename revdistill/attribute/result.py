"""What an attribution of the command's gives, and OUT/attribution.h5: what `Attribution.save` writes, and besides it
all that it takes to make it again. `rd.Attribution.load` reads it too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from revdistill.attribute import file as files
from revdistill.attribute.check import Check
from revdistill.attribute.experiment import Experiment
from revdistill.attribute.flipping import HARM, LEFT_OUT, LOSS, Flipped
from revdistill.attribute.found import Scored
from revdistill.outer.hdf5 import Reader, reading, writing
from revdistill.outer.labels import Label, are_numbers

FILE_NAME = files.FILE_NAME


@dataclass(frozen=True)
class Result:
    """What was found.

    scored: the scores. check: None where none was asked for. flipped: likewise.
    """

    scored: Scored
    check: Check | None
    flipped: Flipped | None


@dataclass(frozen=True)
class Kept:
    """What the file has.

    Attributes:
        scores: [K, n]. losses: [K]. check: what it found, or None.
        examples: int64 [n], the training examples, as `Dataset.rows` counts them. queries: int64 [K], the test samples.
        labels: of the examples, as they were trained with.
        wrong: bool [n], whose label was flipped on purpose.
        accuracy: of the trained network, on all test samples.
        config: all that it takes to make it again.
        flipped: what `Flipped.to_dict` gives, or {}.
    """

    scores: np.ndarray
    losses: np.ndarray
    check: Check | None
    examples: np.ndarray
    queries: np.ndarray
    labels: list[Label]
    wrong: np.ndarray
    accuracy: float
    config: dict[str, Any]
    flipped: dict[str, Any]


def write(path: Path, experiment: Experiment, result: Result) -> None:
    """Write the file whole, or leave what was there. Raises OSError."""
    e, data = experiment, experiment.data
    with writing(path) as file:
        files.fill(file, result.scored.scores, result.scored.losses, result.check)
        file.create_dataset("examples", data=data.rows[e.examples.numpy()].astype(np.int64))
        file.create_dataset("queries", data=data.rows_test[e.queries.numpy()].astype(np.int64))
        file.create_dataset("labels", data=e.y.cpu().numpy())
        file.create_dataset("wrong", data=e.flipped.numpy().astype(np.uint8))
        file.attrs["classes"] = json.dumps([] if are_numbers(data.class_names) else list(data.class_names))
        file.attrs["accuracy"] = result.scored.accuracy
        file.attrs["config"] = json.dumps(e.config.to_dict())
        file.attrs["flipped"] = json.dumps({} if result.flipped is None else result.flipped.to_dict())


def read(path: Path) -> Kept:
    """Read and check the file.

    Raises:
        ArtifactError: names the file and what is wrong with it.
    """
    scores, losses, check = files.read(path)
    with reading(path) as file:
        flipped, config = file.json("flipped", dict), file.json("config", dict)
        arrays = {name: file.array(name, "int64", ndim=1) for name in ("examples", "queries", "labels")}
        arrays["wrong"] = file.array("wrong", "uint8", ndim=1)
        for name, array in arrays.items():
            expected = scores.shape[0 if name == "queries" else 1]
            if len(array) != expected:
                raise file.fail(f"{name!r} has {len(array)} entries; expected {expected}")
        labels = _labels(file, arrays.pop("labels"))
        wrong = arrays.pop("wrong") > 0
        _check_flipped(file, flipped)
        return Kept(
            scores,
            losses,
            check,
            **arrays,
            labels=labels,
            wrong=wrong,
            accuracy=file.number("accuracy"),
            config=config,
            flipped=flipped,
        )


def _labels(file: Reader, y: np.ndarray) -> list[Label]:
    names = file.json("classes", list)
    if not all(isinstance(name, (int, str)) for name in names):
        raise file.fail("attribute 'classes' must list integers or texts")
    if y.min() < 0 or (names and y.max() >= len(names)):
        raise file.fail(f"'labels' has classes from {y.min()} to {y.max()}, but attribute 'classes' names {len(names)}")
    return [names[i] for i in y.tolist()] if names else list(y.tolist())


def _check_flipped(file: Reader, flipped: dict[str, Any]) -> None:
    """Check what the tables are made of."""
    if not flipped:
        return
    auroc, precision, accuracy = (_part(flipped, name) for name in ("auroc", "precision", "accuracy"))
    fine = _numbers(flipped, "flipped", "examples", "worst", "test_samples")
    fine = fine and _numbers(auroc, HARM, LOSS) and _numbers(precision, HARM, LOSS)
    if not fine or not all(_numbers(_part(accuracy, name), "mean", "std") for name in LEFT_OUT):
        raise file.fail("attribute 'flipped' is not one of this release")


def _part(found: dict[str, Any], name: str) -> dict[str, Any]:
    part = found.get(name)
    return part if isinstance(part, dict) else {}


def _numbers(found: dict[str, Any], *names: str) -> bool:
    return all(type(found.get(name)) in (int, float) for name in names)
