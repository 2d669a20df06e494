"""The engine held against autograd on this machine and device: what `revdistill verify` prints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revdistill.engine.adjoints.adjoint import Adjoint
from revdistill.engine.adjoints.backprop import Backprop
from revdistill.engine.adjoints.checkpoint import Checkpoint
from revdistill.engine.adjoints.reversible import Reversible
from revdistill.engine.adjoints.store_all import StoreAll
from revdistill.engine.errors import RevdistillError
from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.history import DeviceHistory
from revdistill.engine.integers.radix import COARSE
from revdistill.engine.jacobian import jacobian
from revdistill.engine.loss.from_module import from_module, stack_modules
from revdistill.engine.loss.randomness import seeded
from revdistill.engine.optimizers.adam import AdamW
from revdistill.engine.optimizers.optimizer import Optimizer
from revdistill.engine.optimizers.sgd import SGD
from revdistill.engine.unroll import unroll

EXACT_STEPS, GRADIENT_STEPS, BIT_STEPS = 1_000, 40, 10_000
TOLERANCE = 1e-6
BIT_TOLERANCE = 1.05
_SGD = SGD(0.02, 0.9)
# Without kept graphs: what is to be seen is that this machine evaluates every gradient to the same bits twice.
_AGAIN = Reversible(graph_bytes=0)


@dataclass(frozen=True)
class Check:
    """kind: "exactness", "gradients" or "bits"; found: the figure in words; seconds: what it took."""

    kind: str
    name: str
    found: str
    passed: bool
    seconds: float


Network = Callable[[], nn.Module]
_NETWORKS: dict[str, tuple[Network, tuple[int, ...]]] = {
    "ReLU MLP": (lambda: nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5)), (20,)),
    "ConvNet, GroupNorm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 5),
        ),
        (2, 8, 8),
    ),
    "BatchNorm, dropout": (
        lambda: nn.Sequential(nn.Linear(20, 40), nn.BatchNorm1d(40), nn.Tanh(), nn.Dropout(0.3), nn.Linear(40, 5)),
        (20,),
    ),
}


def checks(device: torch.device) -> Iterator[Check]:
    """Each check as it is done; nothing is raised for a failure."""
    for name in _NETWORKS:
        for dtype in (torch.float32, torch.float64):
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            yield _timed("exactness", label, lambda name=name, dtype=dtype: _exactness(name, dtype, device))  # type: ignore[misc]
    yield _timed("exactness", "30 stacked networks", lambda: _stacked_exactness(device))
    yield _timed("exactness", "ReLU MLP, AdamW", lambda: _exactness("ReLU MLP", torch.float32, device, AdamW(1e-3)))
    for name in _NETWORKS:
        for adjoint in (_AGAIN, Checkpoint(), StoreAll()):
            label = f"{name}, {type(adjoint).__name__}"
            yield _timed("gradients", label, lambda name=name, adjoint=adjoint: _gradients(name, adjoint, device))  # type: ignore[misc]
    for adjoint in (_AGAIN, Checkpoint(), StoreAll()):
        label = f"ReLU MLP, AdamW, {type(adjoint).__name__}"
        yield _timed("gradients", label, lambda adjoint=adjoint: _gradients("ReLU MLP", adjoint, device, adam=True))  # type: ignore[misc]
    for name in _NETWORKS:
        yield _timed("gradients", f"{name}, many outputs", lambda name=name: _many_outputs(name, device))  # type: ignore[misc]
    for momentum in (0.5, 0.9, 0.98):
        yield _timed("bits", f"momentum {momentum}", lambda momentum=momentum: _bits(momentum, device))  # type: ignore[misc]
    yield _timed("bits", "AdamW, betas 0.9, 0.999", lambda: _adam_bits(device))


def _timed(kind: str, name: str, check: Callable[[], tuple[str, bool]]) -> Check:
    started = time.perf_counter()
    try:
        found, passed = check()
    except (RevdistillError, RuntimeError) as error:
        found, passed = f"{type(error).__name__}: {str(error).splitlines()[0]}", False
    return Check(kind, name, found, passed, time.perf_counter() - started)


def _problem(name: str, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape = _NETWORKS[name]
    with seeded(0, device):
        net = make().to(dtype).to(device)
        x = torch.randn(7, 10, *shape, dtype=dtype).to(device).requires_grad_()
    y = (torch.arange(70, device=device) % 5).reshape(7, 10)
    return net, x, y


def _exactness(name: str, dtype: torch.dtype, device: torch.device, optimizer: Optimizer = _SGD) -> tuple[str, bool]:
    net, x, y = _problem(name, dtype, device)
    loss, params = from_module(net, nn.functional.cross_entropy)
    theta = unroll(loss, params, (x, y), optimizer, steps=EXACT_STEPS, adjoint=_AGAIN, seed=1)
    torch.autograd.grad(_outer(theta), x)  # ReversalError unless every bit is back
    return f"{EXACT_STEPS} steps back, every bit", True


def _stacked_exactness(device: torch.device) -> tuple[str, bool]:
    _, x, y = _problem("ReLU MLP", torch.float32, device)
    with seeded(0, device):
        nets = [_NETWORKS["ReLU MLP"][0]().to(device) for _ in range(30)]
    loss, params = stack_modules(nets, nn.functional.cross_entropy)
    lr = torch.full((EXACT_STEPS, 30), 0.02, device=device, requires_grad=True)
    theta = unroll(loss, params, (x, y), SGD(lr, 0.9), steps=EXACT_STEPS, adjoint=_AGAIN, seed=1)
    torch.autograd.grad(_outer(theta), lr)
    return f"{EXACT_STEPS} steps back, every bit", True


def _gradients(name: str, adjoint: Adjoint, device: torch.device, *, adam: bool = False) -> tuple[str, bool]:
    found = _hypergradient(name, adjoint, device, adam)
    expected = _hypergradient(name, Backprop(), device, adam)
    worst = max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))
    return f"worst relative error {worst:.1e}", worst <= TOLERANCE


def _hypergradient(name: str, adjoint: Adjoint, device: torch.device, adam: bool) -> list[Tensor]:
    net, x, y = _problem(name, torch.float64, device)
    loss, params = from_module(net, nn.functional.cross_entropy)

    def learned(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.float64, device=device, requires_grad=True)

    lr, weight_decay = learned(0.01 if adam else 0.05, GRADIENT_STEPS), learned(0.01)
    momentum, second = learned(0.9, GRADIENT_STEPS), [learned(0.999), learned(1e-8)] if adam else []
    optimizer = (
        AdamW(lr, (momentum, second[0]), second[1], weight_decay)
        if adam
        else SGD(lr, momentum, weight_decay=weight_decay)
    )
    theta = unroll(loss, params, (x, y), optimizer, steps=GRADIENT_STEPS, adjoint=adjoint, seed=1)
    return list(torch.autograd.grad(_outer(theta), [x, lr, momentum, weight_decay, *second, *params.values()]))


def _many_outputs(name: str, device: torch.device) -> tuple[str, bool]:
    """At once, where torch has a batching rule for every operator, against one backward for each."""
    net, x, y = _problem(name, torch.float64, device)
    loss, params = from_module(net, nn.functional.cross_entropy)

    def outputs(adjoint: Adjoint) -> Tensor:
        theta = unroll(loss, params, (x, y), _SGD, steps=GRADIENT_STEPS, adjoint=adjoint, seed=1)
        return torch.stack([p.square().sum() + p.sum() for p in theta.values()])

    found, singly = jacobian(outputs(_AGAIN), x), outputs(Backprop())
    rows = torch.stack([torch.autograd.grad(output, x, retain_graph=True)[0] for output in singly])
    error = float((found - rows).norm() / rows.norm())
    return f"relative error {error:.1e}", error <= TOLERANCE


def _outer(theta: dict[str, Tensor]) -> Tensor:
    return torch.stack([p.square().sum() + p.sum() for p in theta.values()]).sum()


def _bits(momentum: float, device: torch.device) -> tuple[str, bool]:
    n, size = COARSE.quantise(momentum), 64
    store = BitStore(size, device, DeviceHistory())
    draw = torch.Generator().manual_seed(0)
    v = torch.zeros(size, dtype=torch.int64, device=device)
    for _ in range(BIT_STEPS):
        store.decay_(v, n)
        v += torch.randint(-(2**40), 2**40, (size,), generator=draw).to(device)
    kept, ideal = 8 * store.history.nbytes / (size * BIT_STEPS), math.log2(COARSE.base / n)
    return f"{kept:.4f} per parameter and step, entropy bound {ideal:.4f}", kept <= BIT_TOLERANCE * ideal


def _adam_bits(device: torch.device) -> tuple[str, bool]:
    net, x, y = _problem("ReLU MLP", torch.float32, device)
    loss, params = from_module(net, nn.functional.cross_entropy)
    theta, stats = unroll(
        loss, params, (x, y), AdamW(1e-3), steps=2 * EXACT_STEPS, adjoint=_AGAIN, seed=1, return_stats=True
    )
    torch.autograd.grad(_outer(theta), x)
    kept, ideal = stats.history_bits_per_parameter_step, -math.log2(0.9) - math.log2(0.999)
    assert kept is not None
    return f"{kept:.4f} per parameter and step, entropy bound {ideal:.4f}", kept <= BIT_TOLERANCE * ideal
