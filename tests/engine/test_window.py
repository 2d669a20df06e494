"""rd.unroll(window=W): back over the last W steps only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import revdistill as rd
from tests.engine.small import CE, data, mlp, total

T, W = 23, 9
REVERSIBLE = [rd.Reversible(), rd.Reversible(graph_bytes=0), rd.Reversible(graph_bytes=10**6)]
CHECKPOINT = [rd.Checkpoint(), rd.Checkpoint(every=2)]
ADJOINTS: list[rd.Adjoint] = [*REVERSIBLE, *CHECKPOINT, rd.StoreAll(), rd.Backprop()]


def truncated(params: dict[str, Tensor], x: Tensor, y: Tensor, lr: Tensor, momentum: Tensor) -> dict[str, Tensor]:
    """The definition: T steps by hand, cut off from their past before the last W."""
    loss, _ = rd.from_module(mlp().double(), CE)
    theta = {name: p.detach().requires_grad_() for name, p in params.items()}
    v = {name: torch.zeros_like(p) for name, p in params.items()}
    for k in range(T):
        if k == T - W:
            theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
            v = {name: p.detach() for name, p in v.items()}
        gradients = torch.autograd.grad(loss(theta, (x[k % 4], y[k % 4])), list(theta.values()), create_graph=True)
        v = {name: momentum[k] * v[name] + g for name, g in zip(theta, gradients, strict=True)}
        theta = {name: p - lr[k] * v[name] for name, p in theta.items()}
    return theta


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("mu", [0.9, 0.5])
def test_hypergradients_are_those_of_truncated_autograd(adjoint: rd.Adjoint, mu: float) -> None:
    found = []
    for ours in (True, False):
        loss, params = rd.from_module(mlp().double(), CE)
        x, y = data(5)
        x = x.detach().double().requires_grad_()
        lr = torch.full((T,), 0.1, dtype=torch.float64, requires_grad=True)
        momentum = torch.full((T,), mu, dtype=torch.float64)
        # the momentum that acts is the nearest n / 2^16
        quantised = ((momentum * 2**16).round() / 2**16).requires_grad_()
        if ours:
            theta = rd.unroll(loss, params, (x, y), rd.SGD(lr, quantised), steps=T, adjoint=adjoint, window=W)
        else:
            theta = truncated(params, x, y, lr, quantised)
        total(theta).backward()
        assert all(p.grad is None for p in params.values())  # they are beyond the window
        assert lr.grad is not None
        assert not lr.grad[: T - W].any()
        found.append((x.grad, lr.grad, quantised.grad))
    for ours_, reference in zip(*found, strict=True):
        assert ours_ is not None
        assert reference is not None
        assert (ours_ - reference).norm() <= 1e-9 * reference.norm()


@pytest.mark.parametrize("adjoint", ADJOINTS[:-1], ids=repr)
def test_the_way_forward_is_the_same(adjoint: rd.Adjoint) -> None:
    loss, params = rd.from_module(mlp(), CE)
    whole = rd.unroll(loss, params, data(5), rd.SGD(0.1, 0.9), steps=T, adjoint=adjoint)
    cut = rd.unroll(loss, params, data(5), rd.SGD(0.1, 0.9), steps=T, adjoint=adjoint, window=W)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_window_as_long_as_the_unroll_is_no_window() -> None:
    gradients = []
    for window in (None, T, 10 * T):
        loss, params = rd.from_module(mlp(), CE)
        x, y = data(5)
        total(rd.unroll(loss, params, (x, y), rd.SGD(0.1, 0.9), steps=T, window=window)).backward()
        assert all(p.grad is not None for p in params.values())
        gradients.append(x.grad)
    assert all(torch.equal(gradients[0], g) for g in gradients[1:])


def test_bits_are_kept_for_the_window_only() -> None:
    loss, params = rd.from_module(mlp(), CE)
    found = [
        rd.unroll(loss, params, data(5), rd.SGD(0.01, 0.5), steps=400, window=window, return_stats=True)[
            1
        ].history_bytes
        for window in (None, 100)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert 0 < found[1] < 0.3 * found[0]


def test_a_loss_that_differs_within_the_window_is_caught() -> None:
    loss, params = rd.from_module(mlp(), CE)
    calls = 0

    def counting(p: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        nonlocal calls
        calls += 1
        return loss(p, batch) * (1 + 1e-6 * calls)

    x, y = data(5)
    evaluated_again = rd.Reversible(graph_bytes=0)
    theta = rd.unroll(counting, params, (x, y), rd.SGD(0.1, 0.9), steps=T, window=W, adjoint=evaluated_again)
    with pytest.raises(rd.ReversalError, match="step 22"):
        total(theta).backward()


def test_a_bit_changed_between_the_passes_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from revdistill.engine.adjoints.trajectory import Trajectory

    undo = Trajectory.undo_to_theta

    def flipping(self: Trajectory, k: int) -> None:
        undo(self, k)
        if k == T - W:
            self.state.numbers["v"][3] += 1

    loss, params = rd.from_module(mlp(), CE)
    x, y = data(5)
    theta = rd.unroll(loss, params, (x, y), rd.SGD(0.1, 0.9), steps=T, window=W)
    monkeypatch.setattr(Trajectory, "undo_to_theta", flipping)
    with pytest.raises(rd.ReversalError, match=f"way back over {W} steps"):
        total(theta).backward()


@pytest.mark.parametrize(("window", "error"), [(0, ValueError), (-3, ValueError), (1.5, TypeError), (True, TypeError)])
def test_window_is_an_integer_of_at_least_1(window: object, error: type[Exception]) -> None:
    loss, params = rd.from_module(mlp(), CE)
    with pytest.raises(error, match="window"):
        rd.unroll(loss, params, data(5), rd.SGD(0.1, 0.9), steps=T, window=window)  # type: ignore[call-overload]
