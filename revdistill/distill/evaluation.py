"""What distilled data are worth: train fresh networks on them with plain torch.optim.SGD (or Adam), measure test
accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from revdistill.distill.artifact import ADAM_BETA2, ADAM_EPS, Artifact
from revdistill.distill.distiller import fixed_network_seed
from revdistill.distill.strategies import plan
from revdistill.engine.loss.randomness import seeded
from revdistill.outer.data import Dataset
from revdistill.outer.networks import Population

# Far from the seeds of training, so that no network evaluated was ever distilled for.
SEED_OFFSET = 2**40


@dataclass(frozen=True)
class Evaluation:
    """accuracies: of each restart; std: over them (n - 1), 0 for one."""

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
    """Train `restarts` fresh networks on the artifact's batches and measure them on the test data.

    A network distilled with init="fixed" is evaluated from that initialisation. Errors: ValueError where the data or
    the architecture do not go with the artifact.
    """
    check_compatible(artifact, data)
    if schedule == "strategy1" and artifact.optimizer == "adam":
        raise ValueError(
            "schedule is 'strategy1', whose rates are for SGD, but the data were distilled for Adam; accepted are "
            "raw, strategy2, strategy3"
        )
    where = torch.device(device)
    data = data.to(where)
    population = Population(architecture, restarts, data.input_shape, data.classes, where)
    if artifact.config.get("init") == "fixed":
        params = _fixed_start(artifact, data, architecture, restarts, where)
    else:
        params = population.sample(_seed(artifact))
    rates, momenta = plan(schedule, artifact.lr.tolist(), artifact.momentum.tolist(), artifact.batches)
    accuracies = []
    for first, part, own in population.parts(params):
        train_plainly(artifact, part, own, rates, momenta, first)
        accuracies.append(part.accuracies(own, data.x_test, data.y_test).double().cpu())
    found = torch.cat(accuracies)
    std = float(found.std()) if restarts > 1 else 0.0
    return Evaluation(schedule, restarts, float(found.mean()), std, found.tolist())


def train_plainly(
    artifact: Artifact,
    population: Population,
    params: dict[str, torch.Tensor],
    rates: Sequence[float],
    momenta: Sequence[float],
    first: int = 0,
) -> None:
    """One step of torch.optim's SGD or Adam per rate and momentum, on the artifact's batches in turn; changes params in
    place.

    first: the number of the first of these networks, where they are some of many: each part has random numbers of its
    own.
    """
    device = next(iter(params.values())).device
    x, y = torch.from_numpy(artifact.x).to(device), torch.from_numpy(artifact.y).to(device)
    for p in params.values():
        p.requires_grad_()
    optimizer = plain_optimizer(
        artifact.optimizer, [{"params": list(params.values()), "weight_decay": artifact.weight_decay}]
    )
    with seeded(_seed(artifact) + first, device):
        for k, (lr, momentum) in enumerate(zip(rates, momenta, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = lr
                set_momentum(group, momentum)
            optimizer.zero_grad(set_to_none=True)
            population.loss(params, (x[k % len(x)], y[k % len(x)])).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def plain_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torch.optim's "sgd" or "adam" for these parameter groups; rate and momentum are to be set at each step."""
    return torch.optim.Adam(groups, eps=ADAM_EPS) if name == "adam" else torch.optim.SGD(groups, lr=0.0)


def set_momentum(group: dict[str, Any], momentum: float) -> None:
    """Of a parameter group of torch.optim's: SGD's momentum, or Adam's beta1."""
    group |= {"betas": (momentum, ADAM_BETA2)} if "betas" in group else {"momentum": momentum}


def check_compatible(artifact: Artifact, data: Dataset) -> None:
    """ValueError where distilled and real data have different shapes or classes."""
    if tuple(artifact.x.shape[2:]) != data.input_shape:
        raise ValueError(
            f"the distilled data have entries of shape {list(artifact.x.shape[2:])}, "
            f"but dataset {data.name!r} of {list(data.input_shape)}"
        )
    classes = artifact.y.shape[2] if artifact.has_soft_labels else int(artifact.y.max()) + 1
    if classes > data.classes or (artifact.has_soft_labels and classes != data.classes):
        raise ValueError(f"the distilled data have {classes} classes, but dataset {data.name!r} has {data.classes}")


def _seed(artifact: Artifact) -> int:
    return SEED_OFFSET + artifact.seed


def _fixed_start(
    artifact: Artifact, data: Dataset, architecture: str, restarts: int, device: torch.device
) -> dict[str, torch.Tensor]:
    index = artifact.architectures.index(architecture) if architecture in artifact.architectures else 0
    one = Population(architecture, 1, data.input_shape, data.classes, device).sample(
        fixed_network_seed(artifact.seed, index)
    )
    return {name: p.expand(restarts, *p.shape[1:]).clone() for name, p in one.items()}
