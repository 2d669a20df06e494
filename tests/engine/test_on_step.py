"""on_step and on_step_back: what they are called with, when, and that nothing that they do reaches the training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import revdistill as rd

ADJOINTS = (rd.Reversible(), rd.Reversible(graph_bytes=0), rd.Checkpoint(every=2), rd.StoreAll(), rd.Backprop())
STEPS = 5


def loss(params: dict[str, Tensor], batch: tuple[Tensor]) -> Tensor:
    return (batch[0] @ params["w"]).square().mean() + params["b"].square()


def start() -> tuple[dict[str, Tensor], tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)
    return {"w": drawn[3, 0].clone().requires_grad_(), "b": torch.tensor(1.5, dtype=torch.float64)}, (drawn[:3],)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_what_they_are_called_with(adjoint: rd.Reversible) -> None:
    params, batches = start()
    seen: list[tuple[int, dict[str, Tensor], Tensor]] = []
    norms: list[tuple[int, float]] = []

    def on_step(k: int, theta: dict[str, Tensor], value: Tensor) -> str:
        seen.append((k, {name: p.clone() for name, p in theta.items()}, value.clone()))
        assert not any(t.requires_grad for t in (*theta.values(), value))
        for t in (*theta.values(), value):
            t.fill_(torch.nan)  # its own copies
        return "ignored"

    def unroll(**options: object) -> dict[str, Tensor]:
        return rd.unroll(
            loss,
            params,
            batches,
            rd.SGD(0.1, momentum=0.5),
            steps=STEPS,
            adjoint=adjoint,
            save_at=[*range(6)],
            **options,
        )  # type: ignore[call-overload]

    theta = unroll(on_step=on_step, on_step_back=lambda k, norm: norms.append((k, norm)))
    (bar,) = torch.autograd.grad(theta["w"][STEPS].square().sum(), params["w"])
    assert [k for k, _, _ in seen] == list(range(STEPS))
    for k, before, value in seen:
        assert list(before) == ["w", "b"]
        assert all(torch.equal(before[name], theta[name][k].detach()) for name in before)
        torch.testing.assert_close(value, loss(before, (batches[0][k % 3],)))
    assert [k for k, _ in norms] == list(reversed(range(STEPS)))

    plain = unroll()
    assert all(torch.equal(theta[name], plain[name]) for name in theta)
    (expected,) = torch.autograd.grad(plain["w"][STEPS].square().sum(), params["w"])
    torch.testing.assert_close(bar, expected)
    assert norms[-1][1] == pytest.approx(float(bar.norm()))  # nothing of the loss goes to b at the start
