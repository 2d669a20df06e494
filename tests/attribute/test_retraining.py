"""Trainings again, side by side or one after another: each is what it would be alone, written as a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from revdistill.attribute import side_by_side
from revdistill.attribute.retraining import retrain
from revdistill.attribute.side_by_side import how_many
from tests.attribute.small import OPTIMIZERS, N, attributed, loss, queries, trained


def weights(rows: int = 4) -> Tensor:
    """All of them, without two of them, by halves."""
    drawn = torch.ones(rows, N, dtype=torch.float64)
    drawn[1, [0, 3]] = 0
    drawn[2] = 0.5
    drawn[3, 6] = 0
    return drawn


def test_the_same_weights_give_the_same_losses() -> None:
    for name in OPTIMIZERS:
        found = attributed(name)
        assert found.run is not None
        again = retrain(found.run, torch.ones(3, N), return_theta=True)
        assert again.theta is not None
        assert found.theta is not None
        for e in range(3):
            torch.testing.assert_close(again.losses[e], found.losses, rtol=1e-9, atol=1e-9)
            for key, p in found.theta.items():
                torch.testing.assert_close(again.theta[key][e], p, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_weights_are_a_plain_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = attributed(name).run
    assert run is not None
    monkeypatch.setattr(side_by_side, "MOST", 3)  # in two parts, the last of one training
    found = retrain(run, weights(), return_theta=True)
    assert run.side_by_side == 3
    assert found.theta is not None
    for e, row in enumerate(weights()):
        theta = trained(row, OPTIMIZERS[name][1])
        torch.testing.assert_close(found.losses[e], loss(theta, queries()), rtol=1e-9, atol=1e-9)
        for key, p in theta.items():
            torch.testing.assert_close(found.theta[key][e], p, rtol=1e-9, atol=1e-9)
    assert torch.equal(retrain(run, weights() == 1).losses[1], found.losses[1])  # bool: left out or not


def test_clipping_is_of_each_training_by_itself() -> None:
    run = attributed(optimizer=rd.SGD(0.1, 0.5, max_norm=0.3)).run
    assert run is not None
    together = retrain(run, weights())
    for e, row in enumerate(weights()):
        torch.testing.assert_close(together.losses[e], retrain(run, row[None]).losses[0], rtol=1e-9, atol=1e-9)


def dropping(**changes: Any) -> rd.Attribution:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 4)).double()
    each, p = rd.from_module(net, nn.CrossEntropyLoss(reduction="none"))
    return attributed(loss=each, params=p, seed=3, **changes)


def test_random_numbers_are_those_of_the_training() -> None:
    """The same dropout in every one of them, in training and in what is measured."""
    found = dropping()
    assert found.run is not None
    again = retrain(found.run, torch.ones(3, N))
    assert found.run.side_by_side == side_by_side.MOST
    torch.testing.assert_close(again.losses, found.losses.expand(3, -1), rtol=1e-9, atol=1e-9)
    together = retrain(found.run, weights()).losses
    for e, row in enumerate(weights()):
        torch.testing.assert_close(together[e], retrain(found.run, row[None]).losses[0], rtol=1e-9, atol=1e-9)


@contextmanager
def told(reason: str) -> Iterator[None]:
    with pytest.warns(UserWarning, match=f"one after another, which takes longer|{reason}") as caught:
        yield
    assert len(caught) == 1
    assert reason in str(caught[0].message)


def counting(p: dict[str, Tensor], examples: tuple[Tensor, ...]) -> Tensor:
    return loss(p, examples) * (1.0 if p["a"][0, 0].item() else 2.0)


def test_one_after_another_where_vmap_cannot() -> None:
    found = attributed(loss=counting)
    assert found.run is not None
    with told(".item()"):
        again = retrain(found.run, weights())
    torch.testing.assert_close(again.losses[0], found.losses, rtol=0, atol=0)
    torch.testing.assert_close(again.losses[1], loss(trained(weights()[1], OPTIMIZERS["SGD"][1]), queries()))
    retrain(found.run, weights())  # it is said once


def differently(p: dict[str, Tensor], examples: tuple[Tensor, ...]) -> Tensor:
    """Under vmap another loss, as one with random numbers of its own would be."""
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    return loss(p, examples) * (2.0 if inside else 1.0)


def test_one_after_another_where_it_would_be_another_training() -> None:
    found = attributed(loss=differently)
    assert found.run is not None
    with told("other losses"):
        again = retrain(found.run, weights())
    torch.testing.assert_close(again.losses[0], found.losses, rtol=0, atol=0)


def test_how_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By memory; convolutions on a CPU one at a time; batch normalization that vmap cannot have too."""
    run = attributed().run
    assert run is not None
    monkeypatch.setattr(side_by_side, "BYTES", 200_000)
    assert 1 < how_many(run) < side_by_side.MOST
    torch.manual_seed(0)
    net = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(4, 4)).double()
    each, p = rd.from_module(net, nn.CrossEntropyLoss(reduction="none"))
    run = attributed(loss=each, params=p).run
    assert run is not None
    assert how_many(run) == (1 if run.device.type == "cpu" else side_by_side.MOST)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([[1.0]], TypeError, r"weights must be a bool or float tensor \[R, 7\], got list"),
        (torch.ones(2, N, dtype=torch.int64), TypeError, "got a tensor of torch.int64"),
        (torch.ones(N), ValueError, r"weights has shape \[7\]; accepted is \[R, 7\]"),
        (torch.ones(2, N - 1), ValueError, r"weights has shape \[2, 6\]"),
        (torch.ones(0, N), ValueError, "at least 1"),
        (torch.full((1, N), torch.nan), ValueError, "weights has entries that are not finite"),
    ],
)
def test_bad_weights(given: Any, error: type[Exception], message: str) -> None:
    run = attributed().run
    assert run is not None
    with pytest.raises(error, match=message):
        retrain(run, given)
