"""Parameters without a gradient in some pieces of a training, and averages that have not begun."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd

Params = dict[str, Tensor]
Loss = Callable[[Params, Any], Tensor]


def start() -> Params:
    return {n: torch.ones(2, dtype=torch.float64) for n in ("a", "b")}


def both(p: Params, _: Any) -> Tensor:
    return p["a"].square().sum() + p["b"].square().sum()


def without_b(p: Params, _: Any) -> Tensor:
    return p["a"].square().sum()


def zero_for_b(p: Params, _: Any) -> Tensor:
    return p["a"].square().sum() + 0 * p["b"].sum()


def in_pieces(losses: list[Loss], optimizer: Any, state: rd.OptimizerState | None = None) -> Params:
    theta = start()
    for loss in losses:
        theta, state = rd.unroll(loss, theta, lambda k: (), optimizer, steps=2, state=state, return_state=True)
    return theta


def by_torch(losses: list[Loss], make: Callable[..., torch.optim.Optimizer], **settings: Any) -> Params:
    params = {n: p.requires_grad_() for n, p in start().items()}
    optimizer = make(params.values(), **settings)
    for loss in losses:
        for _ in range(2):
            optimizer.zero_grad()
            loss(params, ()).backward()
            optimizer.step()
    return {n: p.detach() for n, p in params.items()}


@pytest.mark.parametrize(
    "adjoint", [rd.Reversible(), rd.Checkpoint(every=1), rd.StoreAll(), rd.Backprop()], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("optimizer", [rd.SGD(0.1, 0.5), rd.Adam(0.1)], ids=["sgd", "adam"])
def test_its_averages_are_passed_on_and_do_not_move_it(optimizer: Any, adjoint: Any) -> None:
    """Regression: dtheta/dv of a parameter that torch skips came out as if its gradient were 0."""
    zeros = {
        name: {n: torch.zeros(2, dtype=torch.float64, requires_grad=True) for n in start()}
        for name in optimizer.slot_names.values()
        if not name.startswith("max")
    }
    theta, end = rd.unroll(
        without_b,
        start(),
        lambda k: (),
        optimizer,
        steps=3,
        state=rd.OptimizerState(2, zeros),
        return_state=True,
        adjoint=adjoint,
    )
    leaves = [of["b"] for of in zeros.values()]
    assert not any(g is not None and g.any() for g in gradients(theta["b"].sum(), leaves))
    assert any(g is not None and bool(g.any()) for g in gradients(theta["a"].sum(), [of["a"] for of in zeros.values()]))
    for slot, of in end.slots.items():
        found = gradients(of["b"].sum(), [zeros[slot]["b"]])[0]
        assert found is not None
        assert found.tolist() == [1.0, 1.0]


def gradients(value: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """None where there is none."""
    if not value.requires_grad:
        return (None,) * len(leaves)
    return torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("begun", ["by hand", "without a step", "at gradients of 0"])
def test_adams_count_of_a_parameter_that_rested_is_another_one(begun: str) -> None:
    """Regression: what rested after a state of zeros was not known to have rested."""
    losses, state = [without_b, both], None
    if begun == "by hand":
        zeros = {n: torch.zeros_like(p) for n, p in start().items()}
        state = rd.OptimizerState(0, {"exp_avg": zeros, "exp_avg_sq": zeros})
    elif begun == "without a step":
        _, state = rd.unroll(both, start(), lambda k: (), rd.Adam(0.1), steps=0, return_state=True)
    else:
        losses = [zero_for_b, *losses]
    with pytest.raises(rd.UnsupportedError, match=r"params\['b'\] a gradient at step ., and gave it none before"):
        in_pieces(losses, rd.Adam(0.1), state)


@pytest.mark.parametrize(
    ("ours", "theirs", "settings", "losses"),
    [
        (rd.RMSprop, torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.75, "eps": 1e-2, "momentum": 0.5}, [without_b, both]),
        (rd.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}, [without_b, both]),
        (rd.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.0}, [both, without_b, both]),
    ],
    ids=["rmsprop", "momentum", "no momentum"],
)
def test_where_nothing_is_counted_it_may_rest(ours: Any, theirs: Any, settings: dict[str, Any], losses: Any) -> None:
    """Regression: it was refused, though neither a bias correction nor dampening knows how many steps there were."""
    found, expected = in_pieces(losses, ours(**settings)), by_torch(losses, theirs, **settings)
    for n in found:
        torch.testing.assert_close(found[n], expected[n], rtol=1e-9, atol=1e-9)


def test_without_a_step_no_velocity_has_begun() -> None:
    """Regression: a piece of 0 steps made zeros of averages that were not there, and dampening began a step early."""
    state, sgd = rd.OptimizerState(3, {}), rd.SGD(0.1, 0.5, dampening=0.5)
    _, same = rd.unroll(both, start(), lambda k: (), sgd, steps=0, state=state, return_state=True)
    a, b = (rd.unroll(both, start(), lambda k: (), sgd, steps=2, state=s) for s in (state, same))
    expected = by_torch([both], torch.optim.SGD, lr=0.1, momentum=0.5, dampening=0.5)
    for n in a:
        assert torch.equal(a[n], b[n])
        torch.testing.assert_close(a[n], expected[n], rtol=1e-9, atol=1e-9)


def test_what_is_passed_on_is_cut_by_a_window_too() -> None:
    zeros = {n: torch.zeros(2, dtype=torch.float64, requires_grad=True) for n in start()}
    for window in (1, None):
        state = rd.OptimizerState(2, {"momentum_buffer": zeros})
        _, end = rd.unroll(
            without_b, start(), lambda k: (), rd.SGD(0.1), steps=2, state=state, window=window, return_state=True
        )
        assert end.slots["momentum_buffer"]["b"].requires_grad is (window is None)
