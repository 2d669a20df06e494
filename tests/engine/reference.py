"""Independent optimizers with a graph, written from torch.optim's documentation; nothing of the engine is in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.engine.problems import Case


def at(value: Any, name: str, k: int) -> Any:
    value = value[name] if isinstance(value, dict) else value
    return value[k] if isinstance(value, Tensor) and value.ndim else value


def quantised(momentum: Any, radix: int = 2**16) -> Any:
    """The nearest n / radix, with the derivative of the identity."""
    if not isinstance(momentum, Tensor):
        return round(momentum * radix) / radix
    return momentum + ((momentum.detach() * radix).round() / radix - momentum.detach())


def gradients_of(case: Case, theta: dict[str, Tensor], k: int, seeds: Any) -> dict[str, Tensor]:
    """Step k's gradient, with its graph; `seeds(k)` seeds torch's generator before the loss."""
    batch = tuple(t[k % len(t)] for t in case.batches)
    extra = () if case.hyper is None else (case.hyper,)
    seeds(k)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = case.loss(theta, batch, *extra)
        return dict(zip(theta, torch.autograd.grad(loss, list(theta.values()), create_graph=True), strict=True))


def train(
    case: Case, settings: dict[str, Any], steps: int, seeds: Any, *, decoupled: bool = False
) -> dict[str, Tensor]:
    """theta_T by SGD; by RMSprop where there is an alpha; by Adam where there is an eps, or by AdamW where that is
    decoupled.
    """
    if "alpha" in settings:
        return train_by_rmsprop(case, settings, steps, seeds)
    if "eps" in settings:
        return train_by_adam(case, settings, steps, seeds, decoupled)
    theta = dict(case.params)
    velocity = {name: torch.zeros_like(p) for name, p in theta.items()}
    dampening, nesterov = settings.get("dampening", 0.0), settings.get("nesterov", False)
    for k in range(steps):
        gradients = gradients_of(case, theta, k, seeds)
        for name, p in list(theta.items()):
            g = gradients[name] + at(settings.get("weight_decay", 0.0), name, k) * p
            raw = settings["momentum"][name] if isinstance(settings["momentum"], dict) else settings["momentum"]
            mu = quantised(at(raw, name, k))
            has_momentum = isinstance(raw, Tensor) or raw > 0
            kick = 1.0 if k == 0 or not has_momentum else 1.0 - dampening
            velocity[name] = mu * velocity[name] + kick * g
            step = g + mu * velocity[name] if nesterov else velocity[name]
            theta[name] = p - at(settings["lr"], name, k) * step
    return theta


def train_by_adam(case: Case, settings: dict[str, Any], steps: int, seeds: Any, decoupled: bool) -> dict[str, Tensor]:
    theta = dict(case.params)
    first = {name: torch.zeros_like(p) for name, p in theta.items()}
    second = {name: torch.zeros_like(p) for name, p in theta.items()}
    peak = dict(second)
    betas = settings.get("betas", (0.9, 0.999))
    for k in range(steps):
        gradients = gradients_of(case, theta, k, seeds)
        for name, p in list(theta.items()):
            lr, eps = at(settings["lr"], name, k), at(settings["eps"], name, k)
            decay = at(settings.get("weight_decay", 0.0), name, k)
            beta1, beta2 = (quantised(at(beta, name, k), 2**30) for beta in betas)
            g = gradients[name]
            if decoupled:
                p = p * quantised(1 - lr * decay, 2**30)
            else:
                g = g + decay * p
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g * g
            peak[name] = torch.maximum(peak[name], second[name]) if settings.get("amsgrad") else second[name]
            corrected = peak[name] / (1 - beta2 ** (k + 1)) + at(settings.get("eps_root", 0.0), name, k)
            root = (corrected + (corrected == 0)).sqrt() * (corrected != 0)  # 0 has derivative 0
            denominator = root + eps
            theta[name] = p - lr / (1 - beta1 ** (k + 1)) * first[name] / denominator
    return theta


def train_by_rmsprop(case: Case, settings: dict[str, Any], steps: int, seeds: Any) -> dict[str, Tensor]:
    theta = dict(case.params)
    square, mean, buffer = ({name: torch.zeros_like(p) for name, p in theta.items()} for _ in range(3))
    for k in range(steps):
        gradients = gradients_of(case, theta, k, seeds)
        for name, p in list(theta.items()):
            lr, eps = at(settings["lr"], name, k), at(settings["eps"], name, k)
            alpha = quantised(at(settings["alpha"], name, k), 2**30)
            g = gradients[name] + at(settings.get("weight_decay", 0.0), name, k) * p
            square[name] = alpha * square[name] + (1 - alpha) * g * g
            mean[name] = alpha * mean[name] + (1 - alpha) * g
            variance = square[name] - mean[name] ** 2 if settings.get("centered") else square[name]
            positive = variance > 0
            root = torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)
            buffer[name] = quantised(at(settings.get("momentum", 0.0), name, k)) * buffer[name] + g / (root + eps)
            theta[name] = p - lr * buffer[name]
    return theta
