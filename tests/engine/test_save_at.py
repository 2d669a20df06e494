"""rd.unroll(save_at=[...]): theta along the way. Its hypergradient is in the adjoints' contract (test_adjoints)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd
from revdistill.engine.loss.gradient import Gradient
from tests.engine.small import CE, data, mlp, total

ADJOINTS: list[Any] = [
    rd.Reversible(),
    rd.Reversible(graph_bytes=2**20),
    rd.Checkpoint(),
    rd.Checkpoint(every=4),
    rd.StoreAll(),
    rd.Backprop(),
]
T = 20


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_each_is_the_end_of_a_shorter_unroll_to_the_bit(adjoint: Any) -> None:
    loss, params = rd.from_module(mlp(), CE)
    along = rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=T, adjoint=adjoint, save_at=range(T + 1))
    with torch.no_grad():
        again = rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=T, adjoint=adjoint, save_at=range(T + 1))
    for name, p in along.items():
        assert p.shape == (T + 1, *params[name].shape)
        assert torch.equal(p, again[name])
    for k in (0, 1, 7, T):
        end = rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=k, adjoint=adjoint)
        assert all(torch.equal(along[name][k], p) for name, p in end.items())


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_the_end_alone_is_the_unroll_itself(adjoint: Any) -> None:
    loss, params = rd.from_module(mlp(), CE)
    x, y = data(5)
    end = torch.autograd.grad(total(rd.unroll(loss, params, (x, y), rd.SGD(0.1), steps=T, adjoint=adjoint)), x)[0]
    saved = torch.autograd.grad(
        total(rd.unroll(loss, params, (x, y), rd.SGD(0.1), steps=T, adjoint=adjoint, save_at=[T])), x
    )[0]
    torch.testing.assert_close(saved, end, rtol=0, atol=0)


def test_the_average_of_all_iterates_costs_no_pass_more(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    linearize = Gradient.linearize
    monkeypatch.setattr(Gradient, "linearize", lambda self, k, theta: calls.append(k) or linearize(self, k, theta))
    loss, params = rd.from_module(mlp(), CE)
    again = rd.Reversible(graph_bytes=0)
    along = rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=T, save_at=range(1, T + 1), adjoint=again)
    total({name: p.mean(0) for name, p in along.items()}).backward()
    assert calls == [*range(T), *reversed(range(T))]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_before_a_window_theta_is_saved_without_a_gradient(adjoint: Any) -> None:
    loss, params = rd.from_module(mlp().double(), CE)
    x, y = data(5)
    lr = torch.full((T,), 0.1, dtype=torch.float64, requires_grad=True)

    def hypergradient(save_at: list[int], chosen: Any) -> tuple[Tensor | None, ...]:
        batches = (x.detach().double(), y)
        theta = rd.unroll(loss, params, batches, rd.SGD(lr), steps=T, adjoint=chosen, window=8, save_at=save_at)
        return torch.autograd.grad(total(theta), [lr, *params.values()], allow_unused=True)

    with_early, without = hypergradient([2, 12, 15, T], adjoint), hypergradient([15, T], adjoint)
    reference = hypergradient([2, 12, 15, T], rd.Backprop())
    assert with_early[0] is not None
    assert reference[0] is not None
    # what was saved at the window's start and before is a constant
    torch.testing.assert_close(with_early[0], without[0], rtol=0, atol=0)
    torch.testing.assert_close(with_early[0], reference[0], rtol=1e-9, atol=1e-12)
    assert all(g is None for g in with_early[1:])


def test_a_loss_along_the_way_may_be_the_only_one() -> None:
    """Nothing of the end is used: its bar is zero, and the way back begins all the same."""
    found = []
    for adjoint in (rd.Reversible(), rd.Backprop()):
        loss, params = rd.from_module(mlp().double(), CE)
        x, y = data(5)
        batches = (x.detach().double().requires_grad_(), y)
        theta = rd.unroll(loss, params, batches, rd.SGD(0.1), steps=T, adjoint=adjoint, save_at=[6])
        found.append(torch.autograd.grad(total(theta), [batches[0], *params.values()]))
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)
