"""What a set of data is worth to a network: test accuracy of fresh ones, by a schedule that is chosen on held-out
training data.

Measuring is dear on a CPU: networks that a set was not made for see some of the test images only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from statistics import mean, stdev
from typing import Any

import torch
from image_rows import Baseline
from torch import Tensor

from revdistill.distill.artifact import Artifact
from revdistill.distill.classes import fitted
from revdistill.distill.evaluation import evaluate
from revdistill.distill.starts import STARTS
from revdistill.distill.strategies import plan
from revdistill.outer.data import Dataset
from revdistill.outer.device import own_device
from revdistill.outer.networks import NetworkStack
from revdistill.outer.optimizers import DEFAULT, OPTIMIZERS
from revdistill.outer.random_streams import evaluation_seed
from revdistill.outer.training import train

COLUMNS = ("LeNet", "MLP", "ConvNet-3", "AlexCifarNet", "ResNet-8")
NETWORKS = 10  # fresh ones that a set is measured with
CHOICE_NETWORKS = 1  # that a schedule is chosen with
TEST_IMAGES, HELD_OUT_IMAGES = 2000, 1000  # a fixed random choice, for networks that a set was not made for
_CHOICE_SEED = 24
# Of the baselines: SGD, constant rates.
MOMENTUM = 0.9
RATES, STEPS = (0.003, 0.01, 0.03), (50, 200)


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


@dataclass(frozen=True)
class Plan:
    """How a network is trained: the learned or the constant rates and momenta of all steps."""

    name: str
    rates: tuple[float, ...]
    momenta: tuple[float, ...]

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.rates)

    def begins(self, other: Plan) -> bool:
        """Whether the other is trained so, and then on."""
        return (self.rates, self.momenta) == (other.rates[: self.steps], other.momenta[: self.steps])


@dataclass(frozen=True)
class Batches:
    """What is trained on in turn: x [s, B, ...] and y, by an optimizer of OPTIMIZERS with a weight decay."""

    x: Tensor
    y: Tensor
    optimizer: str = DEFAULT
    weight_decay: float = 0.0


def distilled_cell(
    artifact: Artifact,
    schedules: tuple[str, ...],
    data: Dataset,
    network: str,
    own: bool,
    device: str = "cpu",
    networks: int = NETWORKS,
) -> dict[str, Any]:
    """What fresh networks reach on distilled data; own: they are those that the data were made for.

    The artifact's own evaluation, on all test images, is taken where it is of this schedule and of enough networks.
    """
    plans = [Plan(name, *map(tuple, plan(name, *_learned(artifact)))) for name in schedules]
    plans = [each for i, each in enumerate(plans) if not any(each.begins(p) and p.begins(each) for p in plans[:i])]
    best = plans[0]
    if len(plans) > 1:
        batches = Batches(torch.from_numpy(artifact.x), torch.from_numpy(artifact.y))
        batches = replace(batches, optimizer=artifact.optimizer, weight_decay=artifact.weight_decay)
        best = _chosen(plans, lambda seed: batches, fitted(artifact, held_out(data)), network, device, networks)
    one = artifact.config.get("init") == "fixed"  # there is but one such network
    restarts = 1 if one else networks
    test = tested(data, own)
    known = artifact.evaluation.get(network, {}) if own and not one else {}
    if known.get("schedule") == best.name and known["restarts"] >= restarts:
        found = dict(known)
    else:
        found = evaluate(artifact, test, network, restarts=restarts, schedule=best.name, device=device).to_dict()
    return found | {"tried": len(plans), "test_images": len(test.y_test)}


def _learned(artifact: Artifact) -> tuple[list[float], list[float], int]:
    return artifact.lr.tolist(), artifact.momentum.tolist(), artifact.batches


def baseline_cell(
    baseline: Baseline, data: Dataset, network: str, device: str = "cpu", networks: int = NETWORKS
) -> dict[str, Any]:
    """What fresh networks reach on real images, other ones for each network, or on centroids, by the best of the rates
    and numbers of steps.
    """
    make = _Images(baseline, data)
    plans = [Plan(f"{rate:g}", (rate,) * t, (MOMENTUM,) * t) for rate in RATES for t in STEPS]
    best = _chosen(plans, make, held_out(data), network, device, networks)
    test = tested(data, all_images=False)
    found = [accuracies(make(seed), [best], test, network, seed, device)[0] for seed in range(networks)]
    return {
        "rate": best.rates[0],
        "steps": best.steps,
        "momentum": MOMENTUM,
        "restarts": networks,
        "mean": mean(found),
        "std": stdev(found),
        "accuracies": found,
        "tried": len(plans),
        "test_images": len(test.y_test),
    }


class _Images:
    """seed -> the batches of a baseline, one image of each class in each."""

    def __init__(self, baseline: Baseline, data: Dataset) -> None:
        self._start, self._data = STARTS[baseline.start], data
        self._batches = baseline.budget // data.classes
        self._own = baseline.start == "real"
        self._made = cache(self._make)

    def __call__(self, seed: int) -> Batches:
        return self._made(seed if self._own else 0)

    def _make(self, seed: int) -> Batches:
        x = self._start(self._data, self._batches, 1, torch.Generator().manual_seed(seed))
        return Batches(x, torch.arange(self._data.classes).expand(self._batches, -1))


def _chosen(
    plans: list[Plan], make: Callable[[int], Batches], data: Dataset, network: str, device: str, networks: int
) -> Plan:
    """The best of some plans, by networks that have other numbers than those which are measured."""
    reached = [0.0] * len(plans)
    for seed in range(networks, networks + CHOICE_NETWORKS):
        for i, accuracy in enumerate(accuracies(make(seed), plans, data, network, seed, device)):
            reached[i] += accuracy
    return plans[max(range(len(plans)), key=reached.__getitem__)]


def accuracies(batches: Batches, plans: list[Plan], data: Dataset, network: str, seed: int, device: str) -> list[float]:
    """Of a fresh network trained by each plan, on the test part. A plan that goes on with another is trained once."""
    found: dict[int, float] = {}
    for i in sorted(range(len(plans)), key=lambda i: -plans[i].steps):
        if i not in found:
            within = {p.steps: j for j, p in enumerate(plans) if p.begins(plans[i])}
            reached = _along(batches, plans[i], tuple(within), data, network, seed, device)
            found |= {within[steps]: accuracy for steps, accuracy in reached.items()}
    return [found[i] for i in range(len(plans))]


def _along(
    batches: Batches, plan: Plan, looks: tuple[int, ...], data: Dataset, network: str, seed: int, device: str
) -> dict[int, float]:
    """After each of these numbers of steps the accuracy of a network that is trained by the plan."""
    where = own_device(device)
    stack = NetworkStack(network, 1, data.input_shape, data.classes, where)
    params = stack.sample(evaluation_seed(seed))
    x, y = batches.x.to(where), batches.y.to(where)
    x_test, y_test = data.x_test.to(where), data.y_test.to(where)
    found: dict[int, float] = {}

    def look(done: int) -> None:
        if done in looks:
            found[done] = float(stack.accuracies(params, x_test, y_test)[0])

    def batch(k: int) -> tuple[Tensor, Tensor]:
        look(k)
        return x[k % len(x)], y[k % len(y)]

    train(
        stack,
        params,
        batch,
        optimizer=OPTIMIZERS[batches.optimizer],
        groups=[(list(params), batches.weight_decay)],
        lr=[[rate] for rate in plan.rates],
        momentum=[[m] for m in plan.momenta],
        seed=seed,
    )
    look(plan.steps)
    return found
