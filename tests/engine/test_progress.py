"""rd.unroll(progress=True): a bar forward and back on a terminal, and nothing elsewhere."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch

import revdistill as rd

ADJOINTS: list[Any] = [rd.Reversible(), rd.Checkpoint(every=4), rd.StoreAll()]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def unroll(adjoint: Any, **options: Any) -> None:
    w = torch.ones(4, requires_grad=True)
    theta = rd.unroll(
        lambda p, b: (p["w"] ** 3).sum(), {"w": w}, lambda k: (), rd.SGD(0.01), steps=13, adjoint=adjoint, **options
    )
    theta["w"].sum().backward()


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_a_bar_each_way(adjoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    unroll(adjoint, progress=True)
    written = terminal.getvalue()
    for label, figure in (("forward", "loss "), ("back", "|dL/dtheta| ")):
        last = next(line for line in reversed(written.split("\r")) if line.startswith(label))
        assert "13/13" in last
        assert figure in written


def test_backprop_has_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    unroll(rd.Backprop(), progress=True)
    assert "13/13" in terminal.getvalue()


@pytest.mark.parametrize("adjoint", [*ADJOINTS, rd.Backprop()], ids=repr)
def test_logs_stay_quiet(adjoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    unroll(adjoint, progress=True)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    unroll(adjoint)
    assert log.getvalue() == terminal.getvalue() == ""


def test_a_bar_is_closed_where_the_way_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with pytest.raises(rd.NonFiniteError):
        rd.unroll(
            lambda p, b: p["w"].sum() * float("nan"),
            {"w": torch.ones(1)},
            lambda k: (),
            rd.SGD(0.1),
            steps=3,
            progress=True,
        )
    assert terminal.getvalue().endswith("\n")


def test_the_argument_is_checked() -> None:
    with pytest.raises(TypeError, match="progress must be a bool, got int"):
        rd.unroll(lambda p, b: p["w"].sum(), {"w": torch.ones(1)}, lambda k: (), rd.SGD(0.1), steps=1, progress=1)
