"""What distilled data are worth: the test accuracy of fresh networks that plain torch.optim trains on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from revdistill.distill.artifact import Artifact
from revdistill.distill.classes import fitted
from revdistill.distill.distiller import fixed_network_seed
from revdistill.distill.strategies import plan
from revdistill.outer.data import Dataset
from revdistill.outer.device import own_device
from revdistill.outer.networks import NetworkStack
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.outer.random_streams import evaluation_seed
from revdistill.outer.ranks import ALONE, Processes
from revdistill.outer.training import train


@dataclass(frozen=True)
class Evaluation:
    """Test accuracies of fresh networks.

    Attributes:
        schedule: the strategy that they were trained by, a name of STRATEGIES.
        restarts: how many networks there were.
        mean: of the accuracies.
        std: of the accuracies (n - 1); 0 for one.
        accuracies: of each network.
    """

    schedule: str
    restarts: int
    mean: float
    std: float
    accuracies: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    artifact: Artifact,
    data: Dataset,
    architecture: str,
    *,
    restarts: int = 10,
    schedule: str = "raw",
    device: str = "cpu",
) -> Evaluation:
    """Train fresh networks on the artifact's batches and measure them on the test data; see `evaluate_all`."""
    found = evaluate_all(artifact, data, [architecture], restarts=restarts, schedule=schedule, device=device)
    return found[architecture]


def evaluate_all(
    artifact: Artifact,
    data: Dataset,
    architectures: Sequence[str],
    *,
    restarts: int = 10,
    schedule: str = "raw",
    device: str = "cpu",
    side_by_side: int | None = None,
    processes: Processes = ALONE,
) -> dict[str, Evaluation]:
    """Train fresh networks of some architectures on the artifact's batches and measure them on the test data.

    Data distilled with init="fixed" are evaluated from that initialisation.

    Args:
        artifact: the distilled data.
        data: the real data; the test part is used. Its classes go by their names.
        architectures: of the networks.
        restarts: how many networks of each to train.
        schedule: a name of STRATEGIES.
        device: cpu, cuda or cuda:N.
        side_by_side: how many are trained in one stack; None for as many as is fastest.
        processes: that share the stacks.

    Raises:
        ValueError: the data, an architecture or the schedule do not go with the artifact.
    """
    data = fitted(artifact, data)
    family = OPTIMIZERS[artifact.optimizer]
    if schedule == "strategy1" and not family.takes_rates_of_sgd:
        raise ValueError(
            f"schedule is 'strategy1', whose rates are for SGD, but the data were distilled for {family.title}; "
            "accepted are raw, strategy2, strategy3"
        )
    where = own_device(device)
    data = data.to(where)
    stacks = {name: NetworkStack(name, restarts, data.input_shape, data.classes, where) for name in architectures}
    units = [(stack, part) for stack in stacks.values() for part in stack.best_parts(side_by_side)]
    rates, momenta = plan(schedule, artifact.lr.tolist(), artifact.momentum.tolist(), artifact.batches)
    drawn: dict[str, dict[str, torch.Tensor]] = {}  # of the stack whose turn it is

    def accuracies(unit: int) -> torch.Tensor:
        stack, part = units[unit]
        if stack.name not in drawn:
            drawn.clear()
            drawn[stack.name] = _start(artifact, data, stack, where)
        own = part.take(drawn[stack.name])
        train_plainly(artifact, part.stack, own, rates, momenta, part.first)
        return part.stack.accuracies(own, data.x_test, data.y_test)

    shared = processes.share([part.stack.size for _, part in units], accuracies)
    found = {
        name: torch.cat([each for each, (stack, _) in zip(shared, units, strict=True) if stack is own]).cpu().double()
        for name, own in stacks.items()
    }
    return {
        name: Evaluation(schedule, restarts, float(a.mean()), float(a.std()) if restarts > 1 else 0.0, a.tolist())
        for name, a in found.items()
    }


def train_plainly(
    artifact: Artifact,
    stack: NetworkStack,
    params: dict[str, torch.Tensor],
    rates: Sequence[float],
    momenta: Sequence[float],
    first: int = 0,
) -> None:
    """Train networks on the artifact's batches in turn, by the torch.optim optimizer that it names.

    Args:
        artifact: the distilled data.
        stack: the networks.
        params: their parameters, which are changed in place.
        rates: the step sizes, one for each step.
        momenta: the momenta, one for each step.
        first: the number of the first of these networks, where they are some of many: each part has random numbers of
            its own.
    """
    device = next(iter(params.values())).device
    x, y = torch.from_numpy(artifact.x).to(device), torch.from_numpy(artifact.y).to(device)
    train(
        stack,
        params,
        lambda k: (x[k % len(x)], y[k % len(x)]),
        optimizer=OPTIMIZERS[artifact.optimizer],
        groups=[(list(params), artifact.weight_decay)],
        lr=[[rate] for rate in rates],
        momentum=[[m] for m in momenta],
        seed=evaluation_seed(artifact.seed) + first,
    )


def _start(artifact: Artifact, data: Dataset, stack: NetworkStack, device: torch.device) -> dict[str, torch.Tensor]:
    """The parameters [restarts, ...] that the networks of an architecture start from."""
    if artifact.config.get("init") != "fixed":
        return stack.sample(evaluation_seed(artifact.seed))
    index = artifact.architectures.index(stack.name) if stack.name in artifact.architectures else 0
    one = NetworkStack(stack.name, 1, data.input_shape, data.classes, device).sample(
        fixed_network_seed(artifact.seed, index)
    )
    return {name: p.expand(stack.size, *p.shape[1:]).clone() for name, p in one.items()}
