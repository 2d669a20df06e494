"""An independent SGD with a graph, written from torch.optim.SGD's documentation; nothing of the engine is in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.engine.problems import Case


def at(value: Any, name: str, k: int) -> Any:
    value = value[name] if isinstance(value, dict) else value
    return value[k] if isinstance(value, Tensor) and value.ndim else value


def quantised(momentum: Any) -> Any:
    """The nearest n / 2^16, with the derivative of the identity."""
    if not isinstance(momentum, Tensor):
        return round(momentum * 65536) / 65536
    return momentum + ((momentum.detach() * 65536).round() / 65536 - momentum.detach())


def train(case: Case, settings: dict[str, Any], steps: int, seeds: Any) -> dict[str, Tensor]:
    """theta_T; `seeds(k)` seeds torch's generator before step k's loss."""
    theta = dict(case.params)
    velocity = {name: torch.zeros_like(p) for name, p in theta.items()}
    dampening, nesterov = settings.get("dampening", 0.0), settings.get("nesterov", False)
    for k in range(steps):
        batch = tuple(t[k % len(t)] for t in case.batches)
        extra = () if case.hyper is None else (case.hyper,)
        seeds(k)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = case.loss(theta, batch, *extra)
            gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        for (name, p), gradient in zip(list(theta.items()), gradients, strict=True):
            g = gradient + at(settings.get("weight_decay", 0.0), name, k) * p
            raw = settings["momentum"][name] if isinstance(settings["momentum"], dict) else settings["momentum"]
            mu = quantised(at(raw, name, k))
            has_momentum = isinstance(raw, Tensor) or raw > 0
            kick = 1.0 if k == 0 or not has_momentum else 1.0 - dampening
            velocity[name] = mu * velocity[name] + kick * g
            step = g + mu * velocity[name] if nesterov else velocity[name]
            theta[name] = p - at(settings["lr"], name, k) * step
    return theta
