"""Empirical metasmoothness: whether a derivative by the examples' weights says what leaving them out does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from revdistill.attribute.check import random_subsets
from revdistill.attribute.retraining import retrain
from revdistill.attribute.run import Params, Run
from revdistill.attribute.side_by_side import how_many
from revdistill.outer.ranks import ALONE, Processes

DIRECTIONS = 3


def smoothness(
    run: Run,
    drop: float = 0.01,
    seed: int = 0,
    *,
    directions: int | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> float:
    """How alike the two halves of the way are on which examples' weights go from 1 to 0.

    With f the trained parameters, z = 1, h = 1/2 and v minus the indicator of a random subset: D1 = f(z + h v) - f(z),
    D2 = f(z + 2 h v) - f(z + h v), the third training leaves the subset out, and

        S = sum_j |D1_j| / ||D1||_1 sign(D1_j) sign(D2_j)

    1: each parameter goes on as it began; 0: as chance has it. The mean over some subsets.

    Args:
        run: the training.
        drop: share of the examples in a subset.
        seed: of the subsets, which are the first ones of `random_subsets`.
        directions: how many subsets; by default 3 where trainings are made side by side, otherwise 1.
        progress: bars on stderr.
        processes: that share the trainings, of the same run each.

    Returns:
        From -1 to 1; nan where nothing moved. Cost: 1 + 2 directions trainings, side by side where they can be.

    Source: Engstrom et al. 2025, definition 2.
    """
    if directions is None:
        directions = DIRECTIONS if how_many(run) > 1 else 1
    away = random_subsets(run.examples, drop, directions, seed).double()
    rows = torch.cat([torch.ones(1, run.examples, dtype=torch.float64), 1 - away / 2, 1 - away])
    theta = retrain(run, rows, return_theta=True, progress=progress, processes=processes).theta
    assert theta is not None
    flat = _flat(theta)
    found = [alike(flat[0], flat[1 + i], flat[1 + directions + i]) for i in range(directions)]
    moved = [value for value in found if not math.isnan(value)]
    return sum(moved) / len(moved) if moved else math.nan


def alike(start: Tensor, half: Tensor, out: Tensor) -> float:
    """S from three vectors of parameters; nan where the first two are the same."""
    first, second = half.double() - start.double(), out.double() - half.double()
    length = first.abs().sum()
    return float((first * second.sign()).sum() / length) if bool(length > 0) else math.nan


def _flat(theta: Params) -> Tensor:
    """[R, numel]"""
    return torch.cat([t.reshape(len(t), -1) for t in theta.values()], 1)  # a parameter may be one number
