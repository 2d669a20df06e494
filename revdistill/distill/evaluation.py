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
from revdistill.outer.networks import NetworkStack
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.outer.random_streams import evaluation_seed
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
    """Train fresh networks on the artifact's batches and measure them on the test data.

    Data distilled with init="fixed" are evaluated from that initialisation.

    Args:
        artifact: the distilled data.
        data: the real data; the test part is used. Its classes go by their names.
        architecture: of the networks.
        restarts: how many networks to train.
        schedule: a name of STRATEGIES.
        device: cpu, cuda or cuda:N.

    Raises:
        ValueError: the data, the architecture or the schedule do not go with the artifact.
    """
    data = fitted(artifact, data)
    family = OPTIMIZERS[artifact.optimizer]
    if schedule == "strategy1" and not family.takes_rates_of_sgd:
        raise ValueError(
            f"schedule is 'strategy1', whose rates are for SGD, but the data were distilled for {family.title}; "
            "accepted are raw, strategy2, strategy3"
        )
    where = torch.device(device)
    data = data.to(where)
    stack = NetworkStack(architecture, restarts, data.input_shape, data.classes, where)
    if artifact.config.get("init") == "fixed":
        params = _fixed_start(artifact, data, architecture, restarts, where)
    else:
        params = stack.sample(evaluation_seed(artifact.seed))
    rates, momenta = plan(schedule, artifact.lr.tolist(), artifact.momentum.tolist(), artifact.batches)
    accuracies = []
    for first, part, own in stack.parts(params):
        train_plainly(artifact, part, own, rates, momenta, first)
        accuracies.append(part.accuracies(own, data.x_test, data.y_test).double().cpu())
    found = torch.cat(accuracies)
    std = float(found.std()) if restarts > 1 else 0.0
    return Evaluation(schedule, restarts, float(found.mean()), std, found.tolist())


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


def _fixed_start(
    artifact: Artifact, data: Dataset, architecture: str, restarts: int, device: torch.device
) -> dict[str, torch.Tensor]:
    index = artifact.architectures.index(architecture) if architecture in artifact.architectures else 0
    one = NetworkStack(architecture, 1, data.input_shape, data.classes, device).sample(
        fixed_network_seed(artifact.seed, index)
    )
    return {name: p.expand(restarts, *p.shape[1:]).clone() for name, p in one.items()}
