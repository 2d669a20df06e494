"""compile=True never changes exactness: the same bits for integers, checked values for floats, eager where it fails."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from revdistill.engine import compiled
from revdistill.engine.compiled import CompiledKernels
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
        head = torch.randint(0, n << 46, (1001,), generator=draw)
        g = torch.randn(1001, generator=draw)
        mine, theirs = (v.clone(), head.clone()), (v.clone(), head.clone())
        for k, tensors in ((kernels, mine), (eager, theirs)):
            k.forward([(*tensors, n)], [(tensors[0], g, 2.0**44 * 0.37)])
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        kernels.inverse([(*mine, n)], [(mine[0], g, 2.0**44 * 0.37)])
        assert torch.equal(mine[0], v)
        assert torch.equal(mine[1], head)


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
        if found is None:  # the integer work is in place
            args[1][-1][0].add_(1)
            return None
        return (found[0] * 1.5, found[1])

    monkeypatch.setattr(torch, "compile", _fake_compile(wrong))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = hypergradient(loss, params, batches, compile=True)
    messages = [str(w.message) for w in caught if issubclass(w.category, rd.CompileWarning)]
    assert any("compiled gradient differs from eager" in m for m in messages)
    assert any("other bits than eager" in m for m in messages)
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


def test_a_product_whose_gradient_has_other_bits_does_not_feed_the_reversal(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, params, batches = problem()
    eager = hypergradient(loss, params, batches)

    def nearly(function: Any, *args: Any) -> Any:
        found = function(*args)
        if found is not None and len(args) == 4:  # the product, which returns a gradient too
            return found[0] * (1 + 1e-6), found[1]
        return found

    monkeypatch.setattr(torch, "compile", _fake_compile(nearly))
    found = hypergradient(loss, params, batches, compile=True)  # no ReversalError: the gradient was evaluated separately
    for mine, theirs in zip(found, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    (functions,) = compiled._functions[loss].values()
    assert functions.product_checked
    assert not functions.product_gradient_is_equal
