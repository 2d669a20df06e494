"""Training by plain torch.optim: what distilled data and learned schedules are measured by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from revdistill.engine.loss.randomness import seeded
from revdistill.outer.networks import NetworkStack, Params
from revdistill.outer.optimizers import Family, Group


def train(
    stack: NetworkStack,
    params: Params,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    *,
    optimizer: Family,
    groups: Sequence[tuple[Sequence[str], float]],
    lr: Sequence[Sequence[float]],
    momentum: Sequence[Sequence[float]],
    seed: int,
) -> None:
    """One step of torch.optim for each entry of `lr`, of all networks side by side; changes `params` in place.

    Args:
        stack: the E networks.
        params: their parameters, each [E, ...].
        batch: k -> (x, y), what step k trains on.
        optimizer: of OPTIMIZERS.
        groups: for each of G parameter groups the names of its parameters, and its weight decay.
        lr: the step sizes [T][G].
        momentum: the momenta [T][G], whatever the optimizer calls them.
        seed: of the random numbers that the networks draw while they train.
    """
    for p in params.values():
        p.requires_grad_()
    members: list[Group] = [
        {"params": [params[name] for name in names], "weight_decay": decay} for names, decay in groups
    ]
    steps = optimizer.plain(members, 0.0)
    with seeded(seed, next(iter(params.values())).device):
        for k, (rates, momenta) in enumerate(zip(lr, momentum, strict=True)):
            for group, rate, m in zip(steps.param_groups, rates, momenta, strict=True):
                group["lr"] = rate
                optimizer.set_momentum(group, m)
            steps.zero_grad(set_to_none=True)
            torch.autograd.backward(stack.loss(params, batch(k)))
            steps.step()
