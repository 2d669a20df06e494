"""Harm that a training loss cannot see: each function makes training data with something wrong in it, and the queries
that suffer from it. Part of flipped.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from influences import (
    Ask,
    Examples,
    Recipe,
    accuracy,
    against_the_best_other,
    given,
    judged,
    metagradient,
    one_hot,
    outputs,
    tracin,
    train,
    worst,
)
from torch import Tensor

from revdistill.outer.data import Dataset

SIDE = 28
TRAINING = Recipe(250, 12, 0.01)
QUERIES = 20
POISONED, TARGET = 0.02, 0
COPIES, COPIED, MISTAKEN = 50, 4, 9
MOVED = 0.2


@dataclass(frozen=True)
class Case:
    """Training examples of which some do harm, and candidates for queries, by their right labels.

    Args:
        examples: x [n, 784], y [n].
        guilty: boolean [n].
        candidates: held out; the queries are those of them that the trained network gets wrong, or all of them where
            `only_wrong` is False.
        only_wrong: see candidates.
        other: held out likewise, no queries: what repair is measured on.
    """

    examples: Examples
    guilty: Tensor
    candidates: Examples
    other: Examples
    only_wrong: bool = True


def _moved(images: Tensor, across: int, down: int) -> Tensor:
    return images.reshape(-1, SIDE, SIDE).roll((down, across), (1, 2)).flatten(1)


def _patched(x: Tensor) -> Tensor:
    """A white square of 4 x 4 in a corner."""
    images = x.reshape(-1, SIDE, SIDE).clone()
    images[:, 23:27, 23:27] = x.max()
    return images.flatten(1)


def poisoned(data: Dataset, size: int, seed: int) -> Case:
    """Two in a hundred have a patch in a corner and the target's label; queries: patched images of other classes."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randperm(len(data.x), generator=generator)[:size]
    x, y = data.x[own].flatten(1), data.y[own].clone()
    candidates = (y != TARGET).nonzero()[:, 0]
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[: int(POISONED * size)]]
    x[chosen], y[chosen] = _patched(x[chosen]), TARGET
    guilty = torch.zeros(size, dtype=torch.bool)
    guilty[chosen] = True
    held = torch.randperm(len(data.x_validation), generator=generator)[: size // 5]
    held = held[data.y_validation[held] != TARGET]
    tested = data.y_test != TARGET
    return Case(
        (x, y),
        guilty,
        (_patched(data.x_validation[held].flatten(1)), data.y_validation[held]),
        (_patched(data.x_test[tested].flatten(1)), data.y_test[tested]),
    )


def near_duplicates(data: Dataset, size: int, seed: int) -> Case:
    """One in a hundred is a moved and noisy copy of one image, all with the same wrong label; queries: other copies."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randperm(len(data.x), generator=generator)[:size]
    x, y = data.x[own].flatten(1), data.y[own].clone()
    of_class = (data.y_validation == COPIED).nonzero()[:, 0]
    own_class = data.x_validation[of_class].flatten(1)
    far = (own_class - own_class.mean(0)).norm(dim=1)
    typical = own_class[far < far.median()]
    image = typical[torch.randint(len(typical), (), generator=generator)]

    def copies(count: int) -> Tensor:
        shifts = torch.randint(-1, 2, (count, 2), generator=generator).tolist()
        made = torch.cat([_moved(image[None], across, down) for across, down in shifts])
        return made + 0.3 * torch.randn(made.shape, generator=generator)

    count = min(COPIES, size // 100)
    x[:count], y[:count] = copies(count), MISTAKEN
    guilty = torch.arange(size) < count
    label = torch.full((200,), COPIED)
    return Case((x, y), guilty, (copies(200), label), (copies(200), label))


def other_distribution(data: Dataset, size: int, seed: int) -> Case:
    """A fifth of the images is upside down, with right labels; queries: upright images that come out wrong."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randperm(len(data.x), generator=generator)[:size]
    x, y = data.x[own].flatten(1), data.y[own].clone()
    guilty = torch.arange(size) < int(MOVED * size)
    x[guilty] = x[guilty].flip(1)  # both axes of the picture
    held = torch.randperm(len(data.x_validation), generator=generator)[: size // 5]
    return Case(
        (x, y),
        guilty,
        (data.x_validation[held].flatten(1), data.y_validation[held]),
        (data.x_test.flatten(1), data.y_test),
        only_wrong=False,
    )


CASES: dict[str, Callable[[Dataset, int, int], Case]] = {
    "poisoned": poisoned,
    "near_duplicates": near_duplicates,
    "other_distribution": other_distribution,
}


def measured(case: Case, recipe: Recipe, seed: int, data: Dataset) -> dict[str, Any]:
    """How well scores, training loss and TracIn find the guilty, and what retraining without the found ones mends."""
    x, y = case.examples
    net, checkpoints = train(case.examples, recipe, seed)
    theta = checkpoints[-1]
    wrong = outputs(net, theta, case.candidates[0]).argmax(1) != case.candidates[1]
    chosen = wrong.nonzero()[:QUERIES, 0] if case.only_wrong else torch.arange(min(500, len(wrong)))
    queries = (case.candidates[0][chosen], case.candidates[1][chosen])
    end, along = metagradient(case.examples, one_hot(y), queries, recipe, seed, (Ask(), Ask(along=True))).bars
    found = {
        "training_loss": F.cross_entropy(outputs(net, theta, x), y, reduction="none"),
        "tracin": tracin(net, checkpoints, case.examples, queries, recipe.lr),
        "scores": given(end, y),
        "along": given(along, y),
        "labels": against_the_best_other(along, y),
    }
    test = (data.x_test.flatten(1), data.y_test)

    def repaired(keep: Tensor) -> dict[str, float]:
        again, after = train((x[keep], y[keep]), recipe, seed)
        return {"mended": accuracy(again, after[-1], case.other), "test": accuracy(again, after[-1], test)}

    count = int(case.guilty.sum())
    found["random"] = torch.rand(len(x), generator=torch.Generator().manual_seed(seed))
    return {
        "queries": len(chosen),
        "guilty": count,
        "methods": {name: judged(s, case.guilty) | repaired(~worst(s, count)) for name, s in found.items()},
        "with_all": {"mended": accuracy(net, theta, case.other), "test": accuracy(net, theta, test)},
        "without_the_guilty": repaired(~case.guilty),
    }
