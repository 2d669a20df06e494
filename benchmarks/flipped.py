"""Which training examples do harm? Flipped labels, by metagradients and by training loss; and harm that training loss
cannot see.

    python benchmarks/flipped.py --data-dir DIR            everything, from nothing
    python benchmarks/flipped.py --data-dir DIR --only flips_20
    python benchmarks/flipped.py --data-dir DIR --quick    small: whether it runs; nothing is kept

Writes results/flipped.json; `python benchmarks/report.py` makes the tables. hidden_harm.py has the second part.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hidden_harm
import torch
import torch.nn.functional as F
from influences import (
    CLASSES,
    Ask,
    Examples,
    Found,
    Recipe,
    accuracy,
    against_the_best_other,
    draw,
    given,
    judged,
    metagradient,
    one_hot,
    outputs,
    tracin,
    train,
    worst,
)
from measuring import load as load_results
from measuring import machine, save, versions
from torch import Tensor

from revdistill.outer.data import DATA_DIR, Dataset, load

TRAININGS = 5  # of every method that goes back through several; learning the weights takes as many
PLAIN = 10  # of the plain rivals
SOFT = Ask(3.0, along=True)  # the temperature: without it, a few queries that come out wrong decide
SMOOTH = Recipe(500, 16, 0.01)
LONGER = Recipe(500, 16, 0.02)  # what ranks best by its loss; metagradients of so large a rate are noisy
MEMORISING = Recipe(100, 10, 0.05)
RETRAINING = Recipe(100, 6, 0.02)  # what the cleaned data are for
RETRAININGS = 2
RECIPES = {"smooth": SMOOTH, "longer": LONGER, "memorising": MEMORISING, "retraining": RETRAINING}
EARLY = 4  # epochs of LONGER after which loss is "early"
SEEDS = 3
STEP, MOMENTUM = 0.3, 0.5  # of learning weights, in standard deviations of their gradient


@dataclass(frozen=True)
class Task:
    """Examples of which some labels were flipped; clean held-out ones, twice; test ones."""

    examples: Examples
    right: Tensor
    held: Examples
    second: Examples
    test: Examples

    @property
    def flipped(self) -> Tensor:
        """Boolean [n]."""
        return self.examples[1] != self.right


def flipped_task(data: Dataset, share: float, sizes: tuple[int, int, int], seed: int) -> Task:
    """A share of the labels is another class, each other one as likely."""
    (x, right), held, second, test = draw(data, sizes, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    chosen = torch.randperm(len(x), generator=generator)[: int(share * len(x))]
    y = right.clone()
    y[chosen] = (y[chosen] + torch.randint(1, CLASSES, (len(chosen),), generator=generator)) % CLASSES
    return Task((x, y), right, held, second, test)


def normalised(bars: Tensor) -> Tensor:
    """So that every training has the same say."""
    return bars / bars.std()


def by_loss(task: Task, recipes: dict[str, Recipe], early: int, seed: int) -> dict[str, Tensor]:
    """The plain rivals: loss of the examples after training, of one network and of several, and early; TracIn."""
    x, y = task.examples
    longer, at_end, at_early, products = recipes["longer"], [], [], []
    for s in range(PLAIN):
        net, checkpoints = train(task.examples, longer, seed + s)
        at_end.append(F.cross_entropy(outputs(net, checkpoints[-1], x), y, reduction="none"))
        at_early.append(F.cross_entropy(outputs(net, checkpoints[early - 1], x), y, reduction="none"))
        products.append(normalised(tracin(net, checkpoints[early - 1 :: early], task.examples, task.held, longer.lr)))
    return {
        "loss_one": at_end[0],
        "loss": torch.stack(at_end).mean(0),
        "loss_early": torch.stack(at_early).mean(0),
        "loss_half": torch.stack(at_end[: PLAIN - TRAININGS]).mean(0),
        "tracin": torch.stack(products).mean(0),
    }


def by_metagradients(task: Task, recipes: dict[str, Recipe], seed: int) -> dict[str, Tensor]:
    """Of the clean held-out loss: one, of one training that memorises, and means over starts and orders."""
    y, ones = task.examples[1], one_hot(task.examples[1])

    def one(recipe: Recipe, s: int) -> Found:
        return metagradient(task.examples, ones, task.held, recipe, seed + s, (Ask(), SOFT))

    several = [one(recipes["smooth"], s) for s in range(TRAININGS)]
    plain, soft = (torch.stack([normalised(found.bars[i]) for found in several]).mean(0) for i in range(2))
    first = several[0].bars
    return {
        "metagradient": given(first[0], y),
        "memorising": given(one(recipes["memorising"], 0).bars[0], y),
        "soft": given(first[1], y),
        "labels": against_the_best_other(first[1], y),
        "mean": given(plain, y),
        "mean_soft": given(soft, y),
        "mean_labels": against_the_best_other(soft, y),
    }


def by_learned_weights(task: Task, smooth: Recipe, seed: int) -> dict[str, Tensor]:
    """Weights in [0, 1], a few projected steps with momentum, each from a fresh start and order; those with the least
    loss on the second held-out set count. Ranked by the weight before it was projected.
    """
    y = task.examples[1]
    ones = one_hot(y)
    weights, velocity = torch.ones(len(y)), torch.zeros(len(y))
    best, scores = float("inf"), -weights
    latent = weights
    for s in range(TRAININGS):
        found = metagradient(task.examples, ones * weights[:, None], task.held, smooth, seed + s, (SOFT,))
        loss = float(F.cross_entropy(outputs(found.net, found.theta, task.second[0]), task.second[1]))
        if s > 0 and loss < best:
            best, scores = loss, -latent
        velocity = MOMENTUM * velocity + normalised(given(found.bars[0], y))
        latent = weights - STEP * velocity
        weights = latent.clamp(0, 1)
    return {"learned": scores}


def in_turn(task: Task, smooth: Recipe, seed: int) -> dict[str, Tensor]:
    """Each fifth of the *training* examples, labels as they are, is once left out and asked besides the clean ones: a
    label is judged by all other examples, not by the few clean ones alone.
    """
    x, y = task.examples
    n, scores, losses, outside = len(y), torch.zeros(len(y), CLASSES), torch.zeros(len(y)), torch.zeros(len(y))
    for s, out in enumerate(torch.randperm(n, generator=torch.Generator().manual_seed(seed)).chunk(TRAININGS)):
        keep = torch.ones(n, dtype=torch.bool)
        keep[out] = False
        queries = (torch.cat([x[out], task.held[0]]), torch.cat([y[out], task.held[1]]))
        found = metagradient((x[keep], y[keep]), one_hot(y[keep]), queries, smooth, seed + s, (SOFT,))
        scores[keep] += normalised(found.bars[0])
        losses[keep] += found.losses
        outside[out] = F.cross_entropy(outputs(found.net, found.theta, x[out]), y[out], reduction="none")
    labels = against_the_best_other(scores, y)
    return {
        "loss_outside": outside,
        "labels_in_turn": labels,
        "labels_in_turn_own_loss": (labels - labels.min()) * losses,
    }


def flips(data: Dataset, share: float, seed: int, quick: bool) -> dict[str, Any]:
    """What every method found."""
    recipes = {name: Recipe(r.batch_size, 2, r.lr) if quick else r for name, r in RECIPES.items()}
    task = flipped_task(data, share, (300, 60, 60) if quick else (5000, 500, 500), seed)
    return {"share": share} | compared(task, recipes, 1 if quick else EARLY, 100 * seed)


def compared(task: Task, recipes: dict[str, Recipe], early: int, seed: int) -> dict[str, Any]:
    """What every method found, and the test accuracy of training without it."""
    (x, y), count = task.examples, int(task.flipped.sum())
    ways = {
        "plain": partial(by_loss, task, recipes, early, seed),
        "metagradients": partial(by_metagradients, task, recipes, seed),
        "learned": partial(by_learned_weights, task, recipes["smooth"], seed),
        "in_turn": partial(in_turn, task, recipes["smooth"], seed),
    }
    found: dict[str, Tensor] = {}
    seconds = {}
    for name, way in ways.items():
        began = time.process_time()
        found |= way()
        seconds[name] = time.process_time() - began
    labels = found["labels_in_turn"]
    found["labels_in_turn_and_loss"] = (labels - labels.min()) * found.pop("loss_half")

    def without(leave_out: Tensor) -> float:
        return statistics.mean(
            accuracy(net, checkpoints[-1], task.test)
            for net, checkpoints in (
                train((x[~leave_out], y[~leave_out]), recipes["retraining"], 50 + seed + s) for s in range(RETRAININGS)
            )
        )

    return {
        "with_all": without(torch.zeros(len(y), dtype=torch.bool)),
        "without_the_flipped": without(task.flipped),
        "seconds": seconds,
        "methods": {name: judged(s, task.flipped) | {"test": without(worst(s, count))} for name, s in found.items()},
    }


def harm(data: Dataset, case: str, seed: int, quick: bool) -> dict[str, Any]:
    """What is found of one case of hidden_harm.py."""
    recipe = Recipe(50, 20, 0.02) if quick else hidden_harm.TRAINING
    made = hidden_harm.CASES[case](data, 600 if quick else 5000, seed)
    return hidden_harm.measured(made, recipe, seed, data)


PARTS: dict[str, Callable[[Dataset, int, bool], dict[str, Any]]] = {
    "flips_10": lambda data, seed, quick: flips(data, 0.1, seed, quick),
    "flips_20": lambda data, seed, quick: flips(data, 0.2, seed, quick),
    "poisoned": lambda data, seed, quick: harm(data, "poisoned", seed, quick),
    "near_duplicates": lambda data, seed, quick: harm(data, "near_duplicates", seed, quick),
    "other_distribution": lambda data, seed, quick: harm(data, "other_distribution", seed, quick),
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path(DATA_DIR))
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(SEEDS)))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load("mnist", options.data_dir)
    for part, seed in itertools.product(options.only, options.seeds[:1] if options.quick else options.seeds):
        began = time.process_time()
        run = {"seed": seed} | PARTS[part](data, seed, options.quick) | {"cpu_seconds": time.process_time() - began}
        print(part, {name: value for name, value in run.items() if name != "methods"}, flush=True)
        for name, figures in run["methods"].items():
            print(f"  {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)
        if not options.quick:  # after each: what is stopped has not been for nothing
            keep(part, run)


def keep(part: str, run: dict[str, Any]) -> None:
    """Into results/flipped.json, beside the runs of other parts and seeds."""
    results = load_results("flipped") or {}
    others = [other for other in results.get(part, []) if other["seed"] != run["seed"]]
    recipes = {name: asdict(recipe) for name, recipe in (RECIPES | {"harm": hidden_harm.TRAINING}).items()}
    results |= {part: sorted([*others, run], key=lambda other: int(other["seed"])), "recipes": recipes}
    save("flipped", results | {"machine": machine("cpu", 1), "versions": versions()})


if __name__ == "__main__":
    main()
