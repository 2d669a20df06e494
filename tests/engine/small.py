"""One small classification problem, for tests that need any."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import revdistill as rd

CE = nn.functional.cross_entropy
EVERY = [  # adjoint; with graphs and without
    rd.Reversible(graph_bytes=0),
    rd.Reversible(graph_bytes=2**20),
    rd.Checkpoint(every=2),
    rd.StoreAll(),
    rd.Backprop(),
]


def data(*shape: int, batches: int = 4, size: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batches, size, *shape).requires_grad_(), torch.arange(batches * size).reshape(batches, size) % 3


def mlp() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def total(theta: dict[str, Tensor]) -> Tensor:
    return torch.stack([p.square().sum() for p in theta.values()]).sum()
