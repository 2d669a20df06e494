"""A tiny training with weights, written out: what attributions are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import revdistill as rd

N, K = 7, 3
NONE = -1
# A ragged row, an example twice in a row, and example 5, which no step takes.
ORDER = torch.tensor([[0, 1, 2], [3, 3, 4], [6, NONE, NONE], [2, 4, 0], [6, 1, NONE], [4, 6, 3]])
OPTIMIZERS: dict[str, tuple[rd.SGD | rd.AdamW, Callable[[Any], torch.optim.Optimizer]]] = {
    "SGD": (rd.SGD(0.1, 0.5), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5)),
    "AdamW": (
        rd.AdamW(0.05, eps=1e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.05, eps=1e-3, weight_decay=0.1),
    ),
}
Params = dict[str, Tensor]


def data(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=draw, dtype=torch.float64), torch.randint(0, 4, (n,), generator=draw)


def params(dtype: torch.dtype = torch.float64) -> Params:
    draw = torch.Generator().manual_seed(1)
    shapes = {"a": (3, 5), "b": (5,), "c": (5, 4)}
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def loss(p: Params, examples: tuple[Tensor, ...]) -> Tensor:
    """[B]"""
    x, y = examples
    logits = torch.tanh(x.to(p["a"].dtype) @ p["a"] + p["b"]) @ p["c"]
    return nn.functional.cross_entropy(logits, y, reduction="none")


def trained(weights: Tensor, optimizer: Callable[[Any], torch.optim.Optimizer], order: Tensor = ORDER) -> Params:
    """theta_T by a plain loop."""
    theta = {name: p.clone().requires_grad_() for name, p in params().items()}
    steps = optimizer(list(theta.values()))
    x, y = data(len(weights))
    for row in order.tolist():
        chosen = [i for i in row if i != NONE]
        total = sum(weights[i] * loss(theta, (x[[i]], y[[i]]))[0] for i in chosen)
        steps.zero_grad()
        (total / len(chosen)).backward()  # type: ignore[union-attr]
        steps.step()
    return {name: p.detach() for name, p in theta.items()}


def queries() -> tuple[Tensor, Tensor]:
    return data(K, seed=5)


def attributed(name: str = "SGD", **changes: Any) -> rd.Attribution:
    given: dict[str, Any] = dict(
        loss=loss, params=params(), data=data(), optimizer=OPTIMIZERS[name][0], order=ORDER, queries=queries()
    )
    return rd.attribute(**(given | changes))
