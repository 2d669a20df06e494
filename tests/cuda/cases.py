"""Small networks with data, on any device and in either precision, and the hypergradient of an unroll of each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import revdistill as rd

DEVICE = os.environ.get("REVDISTILL_DEVICE", "cuda")
STEPS = int(os.environ.get("REVDISTILL_STEPS") or (200 if DEVICE == "cuda" else 40))
ROWS, BATCH, CLASSES, FEATURES, WORDS = 5, 8, 4, 12, 30
CPU = torch.device("cpu")
RATE = 0.01
EXACT, NEAR = 1e-9, 1e-3  # float64 against autograd's, float32 against float64
CE = nn.functional.cross_entropy

Optimizer = Callable[[Tensor], Any]  # of the rates


class Attention(nn.Module):
    """One layer of self-attention over a sequence, and a mean over it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        logits: Tensor = self.out((x + mixed).mean(1))
        return logits


class Words(nn.Module):
    """An embedding of whole numbers, whose gradient adds up where a number occurs twice; x scales what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 6)
        self.out = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.arange(BATCH * FEATURES, device=x.device).reshape(BATCH, FEATURES) % (WORDS - 7)
        logits: Tensor = self.out((self.table(numbers) * x[..., None]).mean(1))
        return logits


class Recurrent(nn.Module):
    """cuDNN's recurrent layers have no second derivatives; torch's own have."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 6, batch_first=True)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            hidden, _ = self.gru(x)
        logits: Tensor = self.out(hidden[:, -1])
        return logits


# name -> (network, the shape of one input); smooth, so that float32 stays near float64
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES)), (FEATURES,)),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, CLASSES)),
        (FEATURES,),
    ),
    "batchnorm": (
        lambda: nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, CLASSES)),
        (FEATURES,),
    ),
    "groupnorm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.GroupNorm(2, 6),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Softplus(),
            nn.Flatten(),
            nn.Linear(96, CLASSES),
        ),
        (2, 8, 8),
    ),
    "lenet": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 5),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(24, CLASSES),
        ),
        (1, 16, 16),
    ),
    "attention": (Attention, (5, 8)),
    "embedding": (Words, (FEATURES,)),
    "recurrent": (Recurrent, (4, 3)),
}


@dataclass(frozen=True)
class Case:
    """loss, params and batches of one unroll; the same numbers on every device and, rounded, in both precisions."""

    loss: Callable[..., Tensor]
    params: dict[str, Tensor]
    x: Tensor
    y: Tensor

    def rates(self, steps: int) -> Tensor:
        """Small, so that 200 steps are no chaos that blows roundings up: a hundredth of what the tests allow is what
        was seen.
        """
        return torch.full((steps,), RATE, dtype=torch.float64, device=self.x.device, requires_grad=True)

    @property
    def batches(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y


def case(name: str, dtype: torch.dtype, device: torch.device) -> Case:
    make, shape = NETWORKS[name]
    draw = torch.Generator().manual_seed(3)
    net = make().to(device, dtype)
    fill(net, draw, dtype)
    loss, params = rd.from_module(net, CE)
    x = torch.randn(ROWS, BATCH, *shape, generator=draw).to(device, dtype).requires_grad_()
    y = (torch.arange(ROWS * BATCH) % CLASSES).reshape(ROWS, BATCH).to(device)
    return Case(loss, params, x, y)


def fill(net: nn.Module, draw: torch.Generator, dtype: torch.dtype) -> None:
    """Parameters from this generator: the process's own is left alone, and every precision has the same numbers."""
    with torch.no_grad():
        for p in net.parameters():
            p.copy_((torch.randn(p.shape, generator=draw) / max(1, p[0].numel()) ** 0.5).to(dtype))


def outer(theta: dict[str, Tensor]) -> Tensor:
    return torch.stack([(p.square() + p).sum() for p in theta.values()]).sum()


def hypergradient(
    of: Case, adjoint: Any, steps: int = STEPS, optimizer: Optimizer = lambda lr: rd.SGD(lr, 0.9), **kwargs: Any
) -> dict[str, Tensor]:
    """d outer / d (x, lr, params), on the CPU; ReversalError where the way back is not exact."""
    lr = of.rates(steps)
    theta = rd.unroll(of.loss, of.params, of.batches, optimizer(lr), steps=steps, adjoint=adjoint, seed=1, **kwargs)
    names, tensors = ["x", "lr", *of.params], [of.x, lr, *of.params.values()]
    found = torch.autograd.grad(outer(theta), tensors, allow_unused="window" in kwargs)
    return {name: g.detach().cpu() for name, g in zip(names, found, strict=True) if g is not None}


def on_the_cpu(
    name: str, dtype: torch.dtype = torch.float64, optimizer: Optimizer = lambda lr: rd.SGD(lr, 0.9)
) -> dict[str, Tensor]:
    """The same training's hypergradient, by Reversible."""
    return hypergradient(case(name, dtype, CPU), rd.Reversible(graph_bytes=0), optimizer=optimizer)


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each of x and lr, and the parameters together, up to `tolerance` of the norm."""
    assert found.keys() == expected.keys()
    for names in (["x"], ["lr"], [name for name in found if name not in ("x", "lr")]):
        if names:
            mine, theirs = (torch.cat([g[name].reshape(-1).double() for name in names]) for g in (found, expected))
            assert torch.linalg.vector_norm(theirs) > 0
            off = float(torch.linalg.vector_norm(mine - theirs) / torch.linalg.vector_norm(theirs))
            assert off <= tolerance, f"{names[0]} differs by {off:.1e} of its norm"


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
