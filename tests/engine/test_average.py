"""rd.unroll(average=...): averages of the iterates, differentiable, without storing any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd
from tests.engine.small import CE, data, mlp, total

T = 12
ADJOINTS: list[Any] = [rd.Reversible(graph_bytes=0), rd.Reversible(), rd.Checkpoint(), rd.StoreAll(), rd.Backprop()]


def problem() -> tuple[Any, dict[str, Tensor], tuple[Tensor, Tensor]]:
    loss, params = rd.from_module(mlp().double(), CE)
    x, y = data(5)
    return loss, params, (x.detach().double().requires_grad_(), y)


def moving(iterates: dict[str, Tensor], decay: float) -> dict[str, Tensor]:
    """As it is done in training loops."""
    average = {n: p[0] for n, p in iterates.items()}
    for k in range(1, T + 1):
        average = {n: decay * a + (1 - decay) * iterates[n][k] for n, a in average.items()}
    return average


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_the_moving_average_and_its_hypergradient(decay: float, adjoint: Any) -> None:
    loss, params, (x, y) = problem()
    lr = torch.full((T,), 0.1, dtype=torch.float64, requires_grad=True)
    leaves = [x, lr, *params.values()]
    options: dict[str, Any] = dict(steps=T, adjoint=adjoint)
    theta, average = rd.unroll(loss, params, (x, y), rd.SGD(lr), average=decay, **options)
    iterates = rd.unroll(loss, params, (x, y), rd.SGD(lr), save_at=range(T + 1), **options)
    expected = moving(iterates, decay)
    for n, p in theta.items():
        assert torch.equal(p, iterates[n][T])
        torch.testing.assert_close(average[n], expected[n], rtol=1e-12, atol=1e-14)
    found = torch.autograd.grad(total(average) + total(theta), leaves, allow_unused=True)
    wanted = torch.autograd.grad(
        total(expected) + total({n: p[T] for n, p in iterates.items()}), leaves, allow_unused=True
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_any_weights_and_what_else_is_asked_for() -> None:
    """Stochastic weight averaging of the last iterates; with stats and state, in this order."""
    loss, params, batches = problem()
    weights = torch.zeros(T + 1)
    weights[-4:] = 0.25
    theta, average, stats, state = rd.unroll(
        loss, params, batches, rd.SGD(0.1), steps=T, average=weights, return_stats=True, return_state=True
    )
    iterates = rd.unroll(loss, params, batches, rd.SGD(0.1), steps=T, save_at=range(T - 3, T + 1))
    for n in theta:
        torch.testing.assert_close(average[n], iterates[n].mean(0), rtol=1e-12, atol=1e-14)
    assert (stats.steps, state.step) == (T, T)


def test_in_pieces_it_is_the_users_sum() -> None:
    """In a window, the iterates before it are in the average and have no gradient."""
    loss, params, (x, y) = problem()
    _, average = rd.unroll(loss, params, (x, y), rd.SGD(0.1), steps=T, average=0.5, window=2)
    iterates = rd.unroll(loss, params, (x, y), rd.SGD(0.1), steps=T, save_at=range(T + 1), window=2)
    found, expected = (torch.autograd.grad(total(a), x)[0] for a in (average, moving(iterates, 0.5)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("average", "kind", "message"),
    [
        (1.5, ValueError, "average must be a decay from 0 to 1, got 1.5"),
        ("ema", TypeError, r"average must be a float, a tensor \[steps \+ 1\] or None, got str"),
        (torch.ones(3), ValueError, r"average has shape \[3\]; with steps=12 .* shape \[13\]"),
        (torch.ones(T + 1, requires_grad=True), ValueError, "average requires grad"),
        (torch.full((T + 1,), float("nan")), ValueError, "average has weights that are not finite"),
    ],
)
def test_bad_averages_are_named(average: Any, kind: type[Exception], message: str) -> None:
    loss, params, batches = problem()
    with pytest.raises(kind, match=message):
        rd.unroll(loss, params, batches, rd.SGD(0.1), steps=T, average=average)
