"""compile=True never changes exactness: the same bits for integers, checked values for floats, eager where it fails."""

from __future__ import annotations

import itertools
import shutil
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from revdistill.engine.compiled import CompiledKernels
from revdistill.engine.scaling import COARSE, FINE, WIDE
from revdistill.engine.trajectory import Kernels

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler"
)
# The compiler's own imports and sub-processes warn; only ours matter here.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.filterwarnings("error::revdistill.CompileWarning")]


def problem() -> tuple[Any, dict[str, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    loss, params = rd.from_module(net, nn.functional.cross_entropy)
    return loss, params, (torch.randn(4, 6, 5, requires_grad=True), torch.arange(24).reshape(4, 6) % 3)


def hypergradient(loss: Any, params: dict[str, Tensor], batches: tuple[Tensor, ...], **kwargs: Any) -> tuple[Tensor, ...]:
    lr = torch.full((20,), 0.1, requires_grad=True)
    theta = rd.unroll(loss, params, batches, rd.SGD(lr, 0.9), steps=20, **kwargs)
    outer = torch.stack([p.square().sum() for p in theta.values()]).sum()
    return torch.autograd.grad(outer, [batches[0], lr, *params.values()])


@pytest.mark.slow
@needs_compiler
def test_compiled_hypergradient_is_eagers() -> None:
    loss, params, batches = problem()
    eager = hypergradient(loss, params, batches)
    for _ in range(2):  # the second time without comparing
        for mine, theirs in zip(hypergradient(loss, params, batches, compile=True), eager, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@needs_compiler
def test_compiled_integers_have_eagers_bits() -> None:
    draw = torch.Generator().manual_seed(0)
    kernels, eager = CompiledKernels(), Kernels()
    for n in (58982, 1, 65535):
        v = torch.randint(-(2**60), 2**60, (1001,), generator=draw)
        head = torch.randint(0, min(n << 36, 2**52), (1001,), generator=draw)  # what multiply_ promises for
        g = torch.randn(1001, generator=draw)
        mine, theirs = (v.clone(), head.clone()), (v.clone(), head.clone())
        for k, tensors in ((kernels, mine), (eager, theirs)):
            k.forward([(COARSE, *tensors, n)], [(tensors[0], g, 2.0**44 * 0.37)])
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        kernels.inverse([(COARSE, *mine, n)], [(mine[0], g, 2.0**44 * 0.37)])
        assert torch.equal(mine[0], v)
        assert torch.equal(mine[1], head)


@pytest.mark.slow
@needs_compiler
def test_compiled_integers_of_adam_have_eagers_bits() -> None:
    draw = torch.Generator().manual_seed(0)
    kernels, eager = CompiledKernels(), Kernels()
    for n in (FINE.quantise(0.9), 1, FINE.quantise(0.999)):
        theta = torch.randint(-(2**60), 2**60, (1001,), generator=draw)
        m = torch.stack([torch.randint(-(2**60), 2**60, (1001,), generator=draw), torch.randint(0, 2**60, (1001,), generator=draw)])
        heads = [torch.randint(0, min(n << 22, 2**52), (1001,), generator=draw) for _ in range(2)]
        g = torch.randn(1001, generator=draw)
        mine, theirs = ([t.clone() for t in (theta, m, *heads)] for _ in range(2))
        for k, (th, mo, h1, h2) in ((kernels, mine), (eager, theirs)):
            k.forward([(FINE, th, h1, n), (WIDE, mo, h2, n)], [(mo, g, 2.0**94 * 0.37)])
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        th, mo, h1, h2 = mine
        kernels.inverse([(FINE, th, h1, n), (WIDE, mo, h2, n)], [(mo, g, 2.0**94 * 0.37)])
        assert all(torch.equal(a, b) for a, b in zip(mine, (theta, m, *heads), strict=True))


def _fake_compile(change: Any) -> Any:
    return lambda function, **_: lambda *args: change(function, *args)


def test_what_does_not_compile_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, params, batches = problem()
    eager = hypergradient(loss, params, batches)

    def fails(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", _fake_compile(fails))
    with pytest.warns(rd.CompileWarning, match="could not be compiled.*no compiler here"):
        found = hypergradient(loss, params, batches, compile=True)
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


def test_wrong_values_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.13 did with a LeNet: a compiled gradient that is far off, with no error."""
    loss, params, batches = problem()
    eager = hypergradient(loss, params, batches)

    def wrong(function: Any, *args: Any) -> Any:
        found = function(*args)
        return (found[0] * 1.5, found[1])

    monkeypatch.setattr(torch, "compile", _fake_compile(wrong))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = hypergradient(loss, params, batches, compile=True)
    messages = [str(w.message) for w in caught if issubclass(w.category, rd.CompileWarning)]
    assert any("compiled gradient differs from eager" in m for m in messages)
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


def test_integers_with_one_wrong_bit_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(function: Any, pushes: Any, adds: Any) -> None:
        function(pushes, adds)
        adds[-1][0].bitwise_xor_(1)

    monkeypatch.setattr(torch, "compile", _fake_compile(wrong))
    kernels, eager = CompiledKernels(), Kernels()
    for _ in range(2):
        mine, theirs = torch.arange(5), torch.arange(5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kernels.forward([], [(mine, torch.ones(5), 3.0)])
        eager.forward([], [(theirs, torch.ones(5), 3.0)])
        assert torch.equal(mine, theirs)
        messages = [str(w.message) for w in caught]
        assert messages == [] or "other bits than eager" in messages[0]


@pytest.mark.parametrize("adjoint", [rd.Reversible(), rd.Checkpoint(), rd.StoreAll()], ids=repr)
def test_a_product_whose_gradient_has_other_bits_does_not_feed_the_reversal(monkeypatch: pytest.MonkeyPatch, adjoint: Any) -> None:
    """As torch 2.13 does with an MLP: the same bits on the first use, and other bits at one step of a hundred."""
    loss, params, batches = problem()
    eager = hypergradient(loss, params, batches, adjoint=adjoint)
    products = itertools.count()
    separate = []

    def nearly(function: Any, *args: Any) -> Any:
        if len(args) == 3:
            separate.append(1)
        found = function(*args)
        if len(args) == 4 and next(products) % 5 == 1:  # the product, which returns a gradient too
            return found[0] * (1 + 1e-6), found[1]
        return found

    monkeypatch.setattr(torch, "compile", _fake_compile(nearly))
    found = hypergradient(loss, params, batches, compile=True, adjoint=adjoint)  # no ReversalError
    for mine, theirs in zip(found, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    again = 20 if isinstance(adjoint, rd.Checkpoint) else 0
    assert len(separate) == 1 + 20 + again + 4  # the check, the steps forward, and only where the product's had other bits
