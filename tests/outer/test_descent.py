"""Outer steps: Adam with its rates, clipping, means of iterates, and steps that fail."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd
from revdistill.outer.checkpoint import restore, save
from revdistill.outer.descent import MAX_FAILURES, ClipTo, Descent, cosine, total_norm


def leaves() -> dict[str, Tensor]:
    return {"x": torch.linspace(-1, 1, 6).requires_grad_(), "raw": torch.ones(3).requires_grad_()}


def descent(found: dict[str, Tensor], **changes: Any) -> Descent:
    usual: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "decay": lambda k: 1.0, "clip": ClipTo(0.0)}
    return Descent(found, **(usual | changes))


def loss_of(found: dict[str, Tensor]) -> Tensor:
    return (found["x"] - 2).square().sum() + (found["raw"] * found["x"][:3]).sum()


def test_the_steps_are_torchs_adams() -> None:
    """A rate for each leaf, that decays, and a clipped gradient: by hand, bit for bit."""
    mine, theirs = leaves(), leaves()
    made = descent(mine, lr={"x": 0.2, "raw": 0.01}, decay=lambda k: cosine(k, 5), clip=ClipTo(0.5))
    adam = torch.optim.Adam([{"params": [leaf]} for leaf in theirs.values()], betas=(0.9, 0.99))
    for k in range(5):
        outcome = made.step(lambda _: loss_of(mine))
        for group, rate in zip(adam.param_groups, (0.2, 0.01), strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * k / 5))
        adam.zero_grad()
        loss = loss_of(theirs)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        adam.step()
        assert (outcome.loss, outcome.norm) == (loss.item(), norm.item())
    assert made.outer_step == 5
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("clip", [0.0, 3.0])
def test_clipping_at_a_multiple_of_the_running_mean(clip: float, tmp_path: Path) -> None:
    """By hand, in a step that fails too; and the mean outlives a resume, to the bit."""

    def scaled(found: dict[str, Tensor], k: int) -> Tensor:
        return loss_of(found) * ([1.0, 5.0, math.inf, 0.1, 20.0, 20.0][k])

    mine, theirs = leaves(), leaves()
    made = descent(mine, clip=ClipTo(clip, 1.5))
    adam = torch.optim.Adam(theirs.values(), lr=0.1, betas=(0.9, 0.99))
    mean, clipped = 0.0, []
    for k in range(6):
        if k == 4:
            save(tmp_path / "a.h5", made, version=1, config={})
            mine = leaves()
            made = descent(mine, clip=ClipTo(clip, 1.5))
            restore(tmp_path / "a.h5", made, steps=6)
        outcome = made.step(lambda k: scaled(mine, k))  # noqa: B023
        if k == 2:
            assert outcome.diverged
            continue
        grads = torch.autograd.grad(scaled(theirs, k), list(theirs.values()))
        norm = torch.cat(grads).double().norm().item()
        assert outcome.norm == pytest.approx(norm, rel=1e-4)
        most = min([norm] + [clip] * (clip > 0) + [1.5 * mean] * (k > 0))
        clipped.append(most < norm)
        for leaf, grad in zip(theirs.values(), grads, strict=True):
            leaf.grad = grad * (most / norm)
        adam.step()
        mean = 0.95 * mean + 0.05 * most if k else most
        assert made.clip.mean == pytest.approx(mean, rel=1e-4)  # type: ignore[attr-defined]
        for name in mine:
            torch.testing.assert_close(mine[name].grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)
    assert clipped == [clip > 0, True, False, True, True]
    for times in (0.5, 1.0):
        with pytest.raises(ValueError, match=f"clip_mean is {times}; accepted is 0 .none. or a number above 1"):
            ClipTo(clip, times)


def test_a_clip_of_ones_own_and_what_happens_after_a_step() -> None:
    """As the study's benchmark has them: a clip per part, and leaves that are changed once more."""
    found, seen = leaves(), []

    def clip(those: dict[str, Tensor]) -> float:
        norm = total_norm(those)
        those["raw"].grad = None
        return norm

    def after(k: int) -> None:
        seen.append(k)
        with torch.no_grad():
            found["x"].zero_()

    made = descent(found, clip=clip, after_step=after, average_from=1)
    for _ in range(3):
        assert made.step(lambda _: loss_of(found)).norm > 0
    assert seen == [0, 1, 2]
    assert torch.equal(found["raw"], torch.ones(3))
    assert made.averaged == 2
    assert torch.equal(made.averages["x"], torch.zeros(6))  # what was changed is averaged


def test_a_step_that_fails_changes_nothing_but_its_number() -> None:
    found = leaves()
    made = descent(found, average_from=0, advice="courage")

    def failing(k: int) -> Tensor:
        if k % 3 == 0:
            raise rd.RangeError("too far", parameter="w", step=k, value=1e9)
        return loss_of(found) * (math.inf if k % 3 == 1 else 1.0)

    before = {name: leaf.detach().clone() for name, leaf in found.items()}
    for k in range(2):
        outcome = made.step(failing)
        assert outcome.diverged
        assert math.isnan(outcome.loss)
        assert made.outer_step == k + 1
    assert all(torch.equal(found[name], before[name]) for name in found)
    assert made.step(failing).diverged is None
    assert made.averaged == 1
    for _ in range(MAX_FAILURES - 1):
        assert made.step(lambda _: loss_of(found) * math.nan).diverged
    with pytest.raises(rd.NonFiniteError, match=f"{MAX_FAILURES} outer steps in a row diverged; courage avoids it"):
        made.step(lambda _: loss_of(found) * math.nan)
