"""What `revdistill verify` says of a machine it has seen there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from revdistill.engine import selfcheck
from revdistill.engine.loss.gradient import Gradient


def test_every_gradient_of_a_way_back_is_evaluated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: with the graphs of all steps kept, "every bit back" said nothing of a second evaluation."""
    calls: list[int] = []
    linearize = Gradient.linearize

    def watched(self: Gradient, k: int, theta: torch.Tensor) -> Any:
        calls.append(k)
        return linearize(self, k, theta)

    monkeypatch.setattr(Gradient, "linearize", watched)
    for name, value in (("EXACT_STEPS", 5), ("GRADIENT_STEPS", 4), ("BIT_STEPS", 50)):
        monkeypatch.setattr(selfcheck, name, value)
    again = {"exactness": 5, "gradients": 4, "bits": 10}
    seen = set()
    for check in selfcheck.checks(torch.device("cpu")):
        if check.kind == "exactness" or "Reversible" in check.name or check.name.startswith("AdamW"):
            steps = range(again[check.kind])
            assert calls == [*steps, *reversed(steps)], check.name
            seen.add(check.kind)
        calls.clear()
    assert seen == set(again)
