"""What a set of data is worth to a network: test accuracy of fresh ones, by a schedule that is chosen on held-out
training data.

Measuring is dear on a CPU: networks that a set was not made for see some of the test images only.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from statistics import mean, stdev
from typing import Any

import torch
from image_rows import Baseline, Row
from torch import Tensor

from revdistill.distill.artifact import Artifact
from revdistill.distill.evaluation import evaluate
from revdistill.distill.starts import STARTS
from revdistill.distill.strategies import plan
from revdistill.outer.data import Dataset
from revdistill.outer.device import own_device
from revdistill.outer.networks import NetworkStack
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.outer.random_streams import evaluation_seed
from revdistill.outer.training import train

COLUMNS = ("LeNet", "MLP", "ConvNet-3", "AlexCifarNet", "ResNet-8")
NETWORKS = 10  # fresh ones that a set is measured with
CHOICE_NETWORKS = 2  # that a schedule is chosen with
TEST_IMAGES, HELD_OUT_IMAGES = 2000, 1000  # a fixed random choice, for networks that a set was not made for
_CHOICE_SEED = 24
# Of the baselines: SGD, constant rates.
MOMENTUM = 0.9
RATES, STEPS = (0.001, 0.003, 0.01, 0.03), (50, 100, 200)


def some(x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As many of the samples, always the same ones."""
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(_CHOICE_SEED))[:count].sort().values
    return x[chosen], y[chosen]


def measured_on(data: Dataset, x: Tensor, y: Tensor) -> Dataset:
    """The data with these in place of the test part, and next to nothing besides: whitening takes all of it."""
    one = slice(0, 1)
    return replace(
        data,
        x=data.x[one],
        y=data.y[one],
        x_validation=data.x_validation[one],
        y_validation=data.y_validation[one],
        x_test=x,
        y_test=y,
    )


def held_out(data: Dataset) -> Dataset:
    """The data that a schedule is chosen on."""
    return measured_on(data, *some(data.x_validation, data.y_validation, HELD_OUT_IMAGES))


def tested(data: Dataset, all_images: bool) -> Dataset:
    """The data that a cell is measured on."""
    x, y = data.x_test, data.y_test
    return measured_on(data, *((x, y) if all_images else some(x, y, TEST_IMAGES)))


def distilled_cell(
    artifact: Artifact, row: Row, data: Dataset, network: str, device: str = "cpu", networks: int = NETWORKS
) -> dict[str, Any]:
    """What fresh networks reach on distilled data.

    The artifact's own evaluation is taken where it is of this schedule, so many networks and all test images.
    """
    own = network in artifact.architectures
    schedules = different(artifact, row.schedules)
    choice = held_out(data)
    reached = {
        name: evaluate(artifact, choice, network, restarts=CHOICE_NETWORKS, schedule=name, device=device).mean
        for name in (schedules if len(schedules) > 1 else [])
    }
    best = max(reached, key=reached.__getitem__) if reached else schedules[0]
    # a fixed initialisation has but one network
    restarts = 1 if artifact.config.get("init") == "fixed" and own else networks
    known = artifact.evaluation.get(network, {}) if own else {}
    if (known.get("restarts"), known.get("schedule")) == (restarts, best):
        found = known
    else:
        found = evaluate(
            artifact, tested(data, own), network, restarts=restarts, schedule=best, device=device
        ).to_dict()
    images = len(data.y_test) if own else min(TEST_IMAGES, len(data.y_test))
    return dict(found) | {"tried": len(schedules), "test_images": images}


def different(artifact: Artifact, schedules: tuple[str, ...]) -> list[str]:
    """Those that differ: data with 50 epochs and more are not gone through any longer."""
    found: dict[tuple[float, ...], str] = {}
    for name in schedules:
        rates, _ = plan(name, artifact.lr.tolist(), artifact.momentum.tolist(), artifact.batches)
        found.setdefault(tuple(rates), name)
    return list(found.values())


def baseline_cell(
    baseline: Baseline, data: Dataset, network: str, device: str = "cpu", networks: int = NETWORKS
) -> dict[str, Any]:
    """What fresh networks reach on real images, other ones for each network, or on centroids, by the best of the rates
    and numbers of steps.
    """
    make = _Images(baseline, data)
    choice = held_out(data)
    reached: dict[tuple[float, int], list[float]] = {}
    for seed, rate in itertools.product(range(networks, networks + CHOICE_NETWORKS), RATES):
        for steps, accuracy in accuracies(make(seed), choice, network, rate, STEPS, seed, device):
            reached.setdefault((rate, steps), []).append(accuracy)
    rate, steps = max(reached, key=lambda setting: mean(reached[setting]))
    test = tested(data, False)
    found = [
        accuracy
        for seed in range(networks)
        for _, accuracy in accuracies(make(seed), test, network, rate, (steps,), seed, device)
    ]
    return {
        "rate": rate,
        "steps": steps,
        "momentum": MOMENTUM,
        "restarts": networks,
        "mean": mean(found),
        "std": stdev(found),
        "accuracies": found,
        "tried": len(reached),
        "test_images": len(test.y_test),
    }


class _Images:
    """seed -> the batches of a baseline, one image of each class in each."""

    def __init__(self, baseline: Baseline, data: Dataset) -> None:
        self._start, self._data = STARTS[baseline.start], data
        self._batches = baseline.budget // data.classes
        self._own = baseline.start == "real"
        self._made = cache(self._make)

    def __call__(self, seed: int) -> Tensor:
        return self._made(seed if self._own else 0)

    def _make(self, seed: int) -> Tensor:
        return self._start(self._data, self._batches, 1, torch.Generator().manual_seed(seed))


def accuracies(
    x: Tensor, data: Dataset, network: str, rate: float, steps: tuple[int, ...], seed: int, device: str
) -> list[tuple[int, float]]:
    """Train a network on batches [s, B, ...] in turn; after each of these numbers of steps its accuracy on the test
    part.
    """
    where = own_device(device)
    stack = NetworkStack(network, 1, data.input_shape, data.classes, where)
    params = stack.sample(evaluation_seed(seed))
    x, x_test, y_test = x.to(where), data.x_test.to(where), data.y_test.to(where)
    labels = torch.arange(data.classes, device=where)
    found: list[tuple[int, float]] = []

    def look(done: int) -> None:
        if done in steps:
            found.append((done, float(stack.accuracies(params, x_test, y_test)[0])))

    def batch(k: int) -> tuple[Tensor, Tensor]:
        look(k)
        return x[k % len(x)], labels

    train(
        stack,
        params,
        batch,
        optimizer=OPTIMIZERS["sgd"],
        groups=[(list(params), 0.0)],
        lr=[[rate]] * max(steps),
        momentum=[[MOMENTUM]] * max(steps),
        seed=seed,
    )
    look(max(steps))
    return found
