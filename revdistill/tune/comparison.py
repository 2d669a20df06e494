"""What a schedule is worth: fresh networks trained along it by plain torch.optim, on data that were used for nothing
else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from revdistill.distill.evaluation import SEED_OFFSET, plain_optimizer, set_momentum
from revdistill.engine.loss.randomness import seeded
from revdistill.outer.data import Dataset
from revdistill.outer.networks import Population
from revdistill.outer.random_streams import Batches
from revdistill.tune.schedule import Schedule
from revdistill.tune.tuner import sample_scaled


@dataclass(frozen=True)
class Trained:
    """Test loss and accuracy over fresh networks: means, and standard deviations (n - 1) of the accuracy."""

    restarts: int
    loss: float
    accuracy: float
    accuracy_std: float
    accuracies: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(schedule: Schedule, data: Dataset, arch: str, *, batch_size: int, restarts: int, seed: int) -> Trained:
    """Train `restarts` fresh networks side by side, on minibatches in an order that no tuning saw."""
    device = data.x.device
    population = Population(arch, restarts, data.input_shape, data.classes, device)
    params = {n: p.requires_grad_() for n, p in sample_scaled(population, SEED_OFFSET + seed, schedule).items()}
    batch = Batches(data, batch_size, SEED_OFFSET + seed)
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": float(w)} for w in schedule.weight_decay]
    for name, p in params.items():
        groups[schedule.group_of(name)]["params"].append(p)
    optimizer = plain_optimizer(schedule.optimizer, groups)
    with seeded(seed, device):
        for k, (rates, momenta) in enumerate(zip(schedule.lr.tolist(), schedule.momentum.tolist(), strict=True)):
            for group, lr, momentum in zip(optimizer.param_groups, rates, momenta, strict=True):
                group["lr"] = lr
                set_momentum(group, momentum)
            optimizer.zero_grad(set_to_none=True)
            population.loss(params, batch(k)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    accuracies = population.accuracies(params, data.x_test, data.y_test).double().cpu()
    return Trained(
        restarts,
        _loss(population, params, data),
        float(accuracies.mean()),
        float(accuracies.std()) if restarts > 1 else 0.0,
        accuracies.tolist(),
    )


@torch.no_grad()
def _loss(population: Population, params: dict[str, torch.Tensor], data: Dataset, batch: int = 512) -> float:
    total = 0.0
    for x, y in zip(torch.split(data.x_test, batch), torch.split(data.y_test, batch), strict=True):
        total += float(population.mean_loss(params, x, y)) * len(x)
    return total / len(data.x_test)
