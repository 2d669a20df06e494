"""UnrollStats.amplification: what training makes of a small change of its start."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import revdistill as rd

ADJOINTS: list[Any] = [rd.Reversible(graph_bytes=0), rd.Checkpoint(), rd.StoreAll()]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("curvature", [0.5, -0.5])
def test_of_a_quadratic(curvature: float, adjoint: Any) -> None:
    """theta <- (1 - lr curvature) theta: it is that factor, to the power of the steps."""
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    theta, stats = rd.unroll(
        lambda p, b: curvature / 2 * p["w"].square().sum(),
        {"w": w},
        lambda k: (),
        rd.SGD(0.1, 0.0),
        steps=20,
        adjoint=adjoint,
        return_stats=True,
    )
    assert stats.amplification is None  # until the way back is over
    theta["w"].sum().backward()
    assert stats.amplification == pytest.approx((1 - 0.1 * curvature) ** 20)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_of_what_was_clipped_is_none(adjoint: Any) -> None:
    """Regression: a training that amplifies a thousandfold looked tame where clip_back had cut that off."""
    for clip_back, expected in ((1.0, None), (1e6, 3.0**7)):
        w = torch.ones(3, dtype=torch.float64, requires_grad=True)
        theta, stats = rd.unroll(
            lambda p, b: 0.5 * p["w"].square().sum(),
            {"w": w},
            lambda k: (),
            rd.SGD(4.0, 0.0),
            steps=7,
            adjoint=adjoint,
            clip_back=clip_back,
            return_stats=True,
        )
        theta["w"].sum().backward()
        assert stats.amplification == (None if expected is None else pytest.approx(expected))


def test_of_nothing_is_none() -> None:
    w = torch.ones(3, requires_grad=True)
    options: dict[str, Any] = dict(steps=3, return_stats=True)
    for adjoint, scale in ((rd.Backprop(), 1.0), (None, 0.0)):
        theta, stats = rd.unroll(
            lambda p, b: p["w"].square().sum(), {"w": w}, lambda k: (), rd.SGD(0.1), adjoint=adjoint, **options
        )
        (scale * theta["w"].sum()).backward()
        assert stats.amplification is None
