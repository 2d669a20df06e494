"""What a schedule is worth: fresh networks that plain torch.optim trains along it, measured on data used for nothing
else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from revdistill.outer.data import Dataset
from revdistill.outer.networks import NetworkStack, Params, Part
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.outer.random_streams import Minibatches, evaluation_seed, part_seed
from revdistill.outer.ranks import ALONE, Processes
from revdistill.outer.training import train
from revdistill.tune.schedule import Schedule
from revdistill.tune.tuner import sample_scaled


@dataclass(frozen=True)
class Trained:
    """What fresh networks reach on the test data.

    Attributes:
        restarts: how many networks there were.
        loss: mean over them.
        accuracy: mean over them.
        accuracy_std: standard deviation (n - 1); 0 for one.
        accuracies: of each network.
    """

    restarts: int
    loss: float
    accuracy: float
    accuracy_std: float
    accuracies: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    schedules: Sequence[Schedule],
    data: Dataset,
    arch: str,
    *,
    batch_size: int,
    restarts: int,
    seed: int,
    side_by_side: int | None = None,
    processes: Processes = ALONE,
) -> list[Trained]:
    """Train fresh networks along schedules and measure them on the test data; each schedule has the same networks.

    Args:
        schedules: to follow.
        data: the training part is trained on.
        arch: of the networks.
        batch_size: samples in each training step.
        restarts: how many networks to train along each.
        seed: of the networks and of the order of the minibatches, which no tuning has seen.
        side_by_side: how many are trained in one stack; None for all.
        processes: that share the stacks.
    """
    stack = NetworkStack(arch, restarts, data.input_shape, data.classes, data.x.device)
    units = [(s, part) for s in schedules for part in stack.parts(side_by_side)]

    def measured(unit: int) -> torch.Tensor:
        """The networks' accuracies, and their part of the mean loss."""
        schedule, part = units[unit]
        params = part.take(sample_scaled(stack, evaluation_seed(seed), schedule))
        _train(schedule, data, part, params, batch_size, seed)
        accuracies = part.stack.accuracies(params, data.x_test, data.y_test).double().cpu()
        return torch.cat(
            [accuracies, torch.tensor([_loss(part.stack, params, data) * part.share], dtype=torch.float64)]
        )

    lengths = [part.stack.size + 1 for _, part in units]
    shared = processes.share(lengths, measured, dtype=torch.float64)
    each = len(units) // len(schedules)
    return [_trained(restarts, shared[i : i + each]) for i in range(0, len(units), each)]


def _train(schedule: Schedule, data: Dataset, part: Part, params: Params, batch_size: int, seed: int) -> None:
    members: list[list[str]] = [[] for _ in schedule.groups]
    for name in params:
        members[schedule.group_of(name)].append(name)
    train(
        part.stack,
        params,
        Minibatches(data, batch_size, evaluation_seed(seed)),
        optimizer=OPTIMIZERS[schedule.optimizer],
        groups=list(zip(members, schedule.weight_decay.tolist(), strict=True)),
        lr=schedule.lr.tolist(),
        momentum=schedule.momentum.tolist(),
        seed=part_seed(seed, part.first),
    )


def _trained(restarts: int, parts: Sequence[torch.Tensor]) -> Trained:
    accuracies = torch.cat([part[:-1] for part in parts])
    return Trained(
        restarts,
        sum(float(part[-1]) for part in parts),
        float(accuracies.mean()),
        float(accuracies.std()) if restarts > 1 else 0.0,
        accuracies.tolist(),
    )


@torch.no_grad()
def _loss(stack: NetworkStack, params: dict[str, torch.Tensor], data: Dataset, batch: int = 512) -> float:
    total = 0.0
    for x, y in zip(torch.split(data.x_test, batch), torch.split(data.y_test, batch), strict=True):
        total += float(stack.mean_loss(params, x, y)) * len(x)
    return total / len(data.x_test)
