"""What can be seen of the way back, and clipped on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd
from tests.engine.small import CE, data, mlp, total

ADJOINTS: list[Any] = [
    rd.Reversible(),
    rd.Reversible(graph_bytes=2**20),
    rd.Checkpoint(every=4),
    rd.StoreAll(),
    rd.Backprop(),
]
T = 15


def hypergradient(adjoint: Any, optimizer: Any = None, **kwargs: Any) -> tuple[dict[int, float], list[Tensor]]:
    loss, params = rd.from_module(mlp().double(), CE)
    x, y = data(5)
    x = x.detach().double().requires_grad_()
    lr = torch.full((T,), 0.1, dtype=torch.float64, requires_grad=True)
    norms = rd.BackwardNorms()
    optimizer = rd.SGD(lr, 0.9) if optimizer is None else optimizer(lr)
    theta = rd.unroll(loss, params, (x, y), optimizer, steps=T, adjoint=adjoint, on_step_back=norms, **kwargs)
    found = torch.autograd.grad(total(theta), [x, lr, *params.values()])
    return norms.norms, list(found)


@pytest.mark.parametrize("optimizer", [None, rd.AdamW])
@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_norms_and_clipping_are_those_of_plain_autograd(adjoint: Any, clip: float | None, optimizer: Any) -> None:
    norms, found = hypergradient(adjoint, optimizer, clip_back=clip)
    expected_norms, expected = hypergradient(rd.Backprop(), optimizer, clip_back=clip)
    assert list(norms) == list(reversed(range(T)))
    assert norms == pytest.approx(expected_norms, rel=1e-8)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)
    if clip:
        assert max(norms.values()) > clip  # as they came
        _, free = hypergradient(rd.Backprop(), optimizer)
        assert not torch.allclose(found[0], free[0], rtol=1e-3)


def test_norms_are_the_gradients_of_saved_parameters() -> None:
    """The norm at step 0 is that of the parameters' own gradient; a clip longer than all of them changes no bit."""
    norms, found = hypergradient(rd.Reversible())
    assert norms[0] == pytest.approx(float(torch.cat([g.flatten() for g in found[2:]]).norm()), rel=1e-12)
    _, clipped = hypergradient(rd.Reversible(), clip_back=1e9)
    assert all(map(torch.equal, found, clipped))


def test_an_explosion_is_found_where_it_starts() -> None:
    """A quadratic at a rate beyond 2 / curvature: theta grows by |1 - 3| at each step, and so does dL/dtheta_k going
    back.
    """
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    norms = rd.BackwardNorms()
    assert norms.explosion() is None
    for _ in range(2):  # the second way back replaces the first
        theta = rd.unroll(
            lambda p, b: 0.5 * p["w"].square().sum() + 0 * b[0].sum(),
            {"w": w},
            (torch.zeros(1, 1, dtype=torch.float64),),
            rd.SGD(3.0, 0.0),
            steps=12,
            on_step_back=norms,
        )
        theta["w"].sum().backward()
        assert len(norms.norms) == 12
    assert norms.norms[11] == pytest.approx(2 * 3**0.5)
    assert norms.explosion(factor=100) == 11 - 7  # 2^7 = 128 above step 11
    assert norms.explosion(factor=1e6) is None
    _, found = hypergradient(rd.Reversible())
    assert len(found) == 6


def test_a_shorter_way_back_replaces_a_longer_one() -> None:
    """Regression: the last steps of the longer one stayed among its norms."""
    norms = rd.BackwardNorms()
    for steps in (6, 3):
        loss, params = rd.from_module(mlp(), CE)
        total(rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=steps, on_step_back=norms)).backward()
        assert list(norms.norms) == list(reversed(range(steps)))


@pytest.mark.parametrize("window", [None, 2])
def test_a_norm_is_of_all_that_depends_on_theta(window: int | None) -> None:
    """Of what is saved at its very step too. Regression: Backprop left that out where theta_k required no grad."""

    def norms(adjoint: Any) -> dict[int, float]:
        seen: dict[int, float] = {}
        params = {"w": torch.ones(2, dtype=torch.float64)}
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        theta = rd.unroll(
            lambda p, b: p["w"].square().sum(),
            params,
            lambda k: (),
            rd.SGD(lr, 0.5),
            steps=3,
            window=window,
            save_at=range(4),
            adjoint=adjoint,
            on_step_back=seen.__setitem__,
        )
        theta["w"].sum().backward()
        return seen

    # theta_{k+1} = 0.8 theta_k + 0.5 (theta_k - theta_{k-1})
    first = 0 if window is None else 1
    bar_theta, bar_v, expected = 1.0, 0.0, {}
    for k in reversed(range(first, 3)):
        bar_v -= 0.1 * bar_theta
        bar_theta += 2 * bar_v + 1
        bar_v *= 0.5
        expected[k] = 2**0.5 * bar_theta
    for adjoint in (rd.Reversible(), rd.Backprop()):
        assert norms(adjoint) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_what_a_step_is_shown_is_a_copy(adjoint: Any) -> None:
    """Regression: Backprop showed its own tensors, and what was changed in them was an error of autograd's."""

    def change(k: int, theta: dict[str, Tensor], value: Tensor) -> None:
        for p in theta.values():
            p.zero_()
        value.zero_()

    def found(**options: Any) -> list[Tensor]:
        loss, params = rd.from_module(mlp(), CE)
        theta = rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=4, adjoint=adjoint, seed=0, **options)
        return list(torch.autograd.grad(total(theta), list(params.values())))

    assert all(map(torch.equal, found(), found(on_step=change)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"clip_back": 0.0}, ValueError, "clip_back must be above 0"),
        ({"clip_back": "1"}, TypeError, "clip_back must be a float"),
        ({"on_step_back": 3}, TypeError, r"on_step_back must be callable as on_step_back\(k, norm\)"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    loss, params = rd.from_module(mlp(), CE)
    with pytest.raises(error, match=message):
        rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=3, **arguments)
