"""What the user is told of data that were read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from revdistill.outer.data import Dataset
from revdistill.outer.labels import SHOWN, Label, are_numbers

from .table import printable, table

ROWS = 40  # of a table of classes
NEAR = 1e-3  # standard deviations: a smaller difference in how data are normalised is none


def remarks(data: Dataset) -> list[str]:
    """What is not as one may expect: a line each, for the headline of a run."""
    lines = list(data.origin.notes)
    if not are_numbers(data.class_names):
        lines.append(f"classes: {named(data.class_names)}")
    if data.origin.unread:
        lines.append(f"left unread: {', '.join(data.origin.unread)}")
    return [printable(line) for line in lines]


def other_scale(distilled: dict[str, Any], data: Dataset) -> list[str]:
    """A line where the real data are not normalised as those were that had been distilled: by themselves."""
    (mean, std), (own_mean, own_std) = (
        [np.array(found[key], np.float64) for key in ("mean", "std")] for found in (distilled, data.normalization)
    )
    if mean.shape == own_mean.shape and std.shape == own_std.shape:
        near = (np.abs(mean - own_mean) <= NEAR * std) & (np.abs(std - own_std) <= NEAR * std)
        if near.all():
            return []
    return [
        f"normalised by their own training part: mean {_first(own_mean.tolist())}, standard deviation "
        f"{_first(own_std.tolist())}; the data that were distilled by mean {_first(mean.tolist())}, standard deviation "
        f"{_first(std.tolist())}"
    ]


def named(names: Sequence[Label]) -> str:
    """The classes' numbers and names in one line: the first of them where there are many."""
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(f"{i} = {name}" for i, name in enumerate(names[:SHOWN])) + more


def description(data: Dataset) -> str:
    """Everything, as tables."""
    rows = [
        ("inputs", _inputs(data)),
        ("samples", f"{len(data.x)} training, {len(data.x_validation)} validation, {len(data.x_test)} test"),
        *(("split", text) for text in data.origin.splits),
        *(("note", text) for text in data.origin.notes),
        ("left unread", ", ".join(data.origin.unread) or "nothing"),
        ("values", "{:.6g} to {:.6g} in the training part, before normalization".format(*data.value_range)),
        ("normalization", _normalization(data)),
    ]
    found = [table(("what", "value"), rows), _classes(data)]
    if data.origin.read:
        read = [(r.name, r.role, " x ".join(map(str, r.shape)), r.dtype) for r in data.origin.read]
        found.insert(0, table(("read", "as", "shape", "type"), read))
    return "\n\n".join(found)


def _inputs(data: Dataset) -> str:
    if not data.is_image:
        return f"{data.input_shape[0]} features"
    channels, height, width = data.input_shape
    return f"images of {height} x {width}, {channels} {'channel' if channels == 1 else 'channels'}"


def _normalization(data: Dataset) -> str:
    mean, std = data.normalization["mean"], data.normalization["std"]
    if not any(mean) and all(value == 1 for value in std):
        return "none"
    each = "channel" if data.is_image else "feature"
    return f"per {each}: mean {_first(mean)}, standard deviation {_first(std)}"


def _first(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")


def _classes(data: Dataset) -> str:
    counts = [torch.bincount(y, minlength=data.classes).tolist() for y in (data.y, data.y_validation, data.y_test)]
    rows = [(str(i), str(name), *(str(c[i]) for c in counts)) for i, name in enumerate(data.class_names[:ROWS])]
    text = table(("class", "in the data", "training", "validation", "test"), rows)
    return text if data.classes <= ROWS else f"{text}\n  ... ({data.classes} in all)"
