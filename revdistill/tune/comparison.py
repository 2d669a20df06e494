"""What a schedule is worth: fresh networks that plain torch.optim trains along it, measured on data used for nothing
else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from revdistill.outer.data import Dataset
from revdistill.outer.networks import NetworkStack
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.outer.random_streams import Minibatches, evaluation_seed
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


def measure(schedule: Schedule, data: Dataset, arch: str, *, batch_size: int, restarts: int, seed: int) -> Trained:
    """Train fresh networks side by side along a schedule and measure them on the test data.

    Args:
        schedule: to follow.
        data: the training part is trained on.
        arch: of the networks.
        batch_size: samples in each training step.
        restarts: how many networks to train.
        seed: of the networks and of the order of the minibatches, which no tuning has seen.
    """
    device = data.x.device
    stack = NetworkStack(arch, restarts, data.input_shape, data.classes, device)
    params = sample_scaled(stack, evaluation_seed(seed), schedule)
    members: list[list[str]] = [[] for _ in schedule.groups]
    for name in params:
        members[schedule.group_of(name)].append(name)
    train(
        stack,
        params,
        Minibatches(data, batch_size, evaluation_seed(seed)),
        optimizer=OPTIMIZERS[schedule.optimizer],
        groups=list(zip(members, schedule.weight_decay.tolist(), strict=True)),
        lr=schedule.lr.tolist(),
        momentum=schedule.momentum.tolist(),
        seed=seed,
    )
    accuracies = stack.accuracies(params, data.x_test, data.y_test).double().cpu()
    return Trained(
        restarts,
        _loss(stack, params, data),
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
