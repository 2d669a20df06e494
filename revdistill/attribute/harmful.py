"""OUT/harmful.csv: the training examples, the most harmful first."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from revdistill.attribute.experiment import Experiment
from revdistill.attribute.flipping import highest
from revdistill.outer.files import replacing
from revdistill.outer.labels import Label

FILE_NAME = "harmful.csv"


def rows(experiment: Experiment, harm: np.ndarray, count: int | None = None) -> list[tuple[int, Label, float, bool]]:
    """Of the most harmful examples: position in the data as they were found (see `Dataset.rows`), class as it was
    trained with, score, and whether it was flipped.

    Args:
        experiment: whose examples they are.
        harm: [n], the scores.
        count: how many; all by default.
    """
    e, names = experiment, experiment.data.class_names
    places, y = e.data.rows[e.examples.numpy()], e.y.cpu()
    order = highest(harm, len(harm) if count is None else count)
    return [(int(places[i]), names[int(y[i])], float(harm[i]), bool(e.flipped[i])) for i in order]


def write(path: Path, experiment: Experiment, harm: np.ndarray) -> None:
    """Write the file whole, or leave what was there. Raises OSError."""
    flips = bool(experiment.config.flip)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["index", "label", "score", *["flipped"] * flips])
        for index, label, score, wrong in rows(experiment, harm):
            table.writerow([index, label, repr(score), *[int(wrong)] * flips])
