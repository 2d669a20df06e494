"""attribution.h5: the scores and the losses of an attribution, and what its check found (HDF5, no pickle)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

import revdistill
from revdistill.attribute.check import NUMBERS, Check
from revdistill.outer.hdf5 import Reader, reading, writing

FORMAT_VERSION = 1
FILE_NAME = "attribution.h5"
_FLOATS = ("float32", "float64")
_BETWEEN = {"drop": (0, 1), "mean": (-1, 1), "mean_query": (-1, 1), "smoothness": (-1, 1)}  # with both ends


def write(path: Path, scores: np.ndarray, losses: np.ndarray, checked: Check | None) -> None:
    """Write the file whole, or leave what was there. Raises OSError."""
    with writing(path) as file:
        fill(file, scores, losses, checked)


def fill(file: h5py.File, scores: np.ndarray, losses: np.ndarray, checked: Check | None) -> None:
    """Write these into an open file, which may have more."""
    file.create_dataset("scores", data=scores)
    file.create_dataset("losses", data=losses)
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["revdistill_version"] = revdistill.__version__
    file.attrs["torch_version"] = str(torch.__version__)
    file.attrs["check"] = json.dumps({} if checked is None else checked.to_dict())
    if checked is not None:
        file.create_dataset("dropped", data=checked.dropped.astype(np.uint8))
        file.create_dataset("actual", data=checked.actual)


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray, Check | None]:
    """The scores [K, n], the losses [K], and what the check found, if there was one.

    Raises:
        ArtifactError: names the file and what is wrong with it.
    """
    with reading(path) as file:
        file.check_version(FORMAT_VERSION)
        file.text("revdistill_version"), file.text("torch_version")
        scores, losses = file.array("scores", *_FLOATS, ndim=2), file.array("losses", *_FLOATS, ndim=1)
        if not scores.size or len(losses) != len(scores) or losses.dtype != scores.dtype:
            raise file.fail(
                f"'losses' has shape {list(losses.shape)}, {losses.dtype}, which does not go with 'scores' of shape "
                f"{list(scores.shape)}, {scores.dtype}"
            )
        numbers = file.json("check", dict)
        return scores, losses, _check_of(file, numbers, scores, losses) if numbers else None


def _check_of(file: Reader, numbers: dict[str, Any], scores: np.ndarray, losses: np.ndarray) -> Check:
    dropped, actual = file.array("dropped", "uint8", ndim=2), file.array("actual", "float64", ndim=2)
    trainings = len(dropped)
    if not trainings or dropped.shape[1] != scores.shape[1] or actual.shape != (len(scores), trainings):
        raise file.fail(
            f"'dropped' has shape {list(dropped.shape)} and 'actual' {list(actual.shape)}, which do not go with "
            f"'scores' of shape {list(scores.shape)}"
        )
    if dropped.max() > 1:
        raise file.fail("'dropped' has entries other than 0 and 1")
    seed = numbers.get("seed")
    if set(numbers) != set(NUMBERS) or type(seed) is not int or seed < 0:
        raise file.fail(f"attribute 'check' must hold {', '.join(NUMBERS)}, the seed a whole number")
    values = {name: _number(file, name, numbers[name], *ends) for name, ends in _BETWEEN.items()}
    intervals = {name: _interval(file, name, numbers[name]) for name in ("interval", "mean_query_interval")}
    return Check.from_numbers(scores, losses, dropped.astype(bool), actual, {**values, **intervals, "seed": seed})


def _number(file: Reader, name: str, value: Any, least: float, most: float) -> float:
    """A number of the check; None is nan."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise file.fail(f"attribute 'check' has {name} {value!r}; expected a number from {least} to {most}")
    return float(value)


def _interval(file: Reader, name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise file.fail(f"attribute 'check' has {name} {value!r}; expected two numbers")
    low, high = (_number(file, name, end, -1, 1) for end in value)
    return low, high
