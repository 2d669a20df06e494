"""Distillation and evaluation on a device that is no CPU: as on the CPU, but for the last bits; and twice the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from revdistill.distill import distiller
from revdistill.distill.artifact import Artifact
from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.distill.evaluation import evaluate
from revdistill.outer.data import load
from tests import standin

pytestmark = pytest.mark.standin

SMALL = Config(
    dataset="digits",
    architectures=("MLP",),
    steps=3,
    epochs=2,
    per_class=1,
    outer_steps=3,
    batch_size=64,
    lr=0.05,
    learn_labels=True,
)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adam": {"optimizer": "adam", "lr": 0.01, "learn_momentum": True},
    "augmented": {"augment": ("crop", "scale", "rotate", "color", "cutout"), "average": 0.5, "weight_decay": 0.01},
    "windows": {"window": 3, "grow": 0.5, "momentum": 0.0, "inits": 2},
}


def distilled(
    where: torch.device, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Tensor], Artifact, float]:
    """(the hypergradients of the first outer step, the artifact after three, its accuracy on the validation data)"""
    monkeypatch.setattr(distiller, "check_device", lambda name: where)
    run = Distiller(Config(**(SMALL.to_dict() | {"architectures": ("MLP",)} | changes)), load("digits"))
    assert run.step().diverged is None
    first = {
        name: standin.take(leaf.grad).clone() for name, leaf in run.synthetic.leaves.items() if leaf.grad is not None
    }
    for _ in range(2):
        assert run.step().diverged is None
    return first, run.artifact(), run.validation_accuracy()


@pytest.mark.parametrize("name", OPTIONS)
def test_distilling_is_as_on_the_cpu(counts: standin.Counts, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One outer step: ReLU networks make much of a last bit in many."""
    places = (torch.device("cpu"), standin.device(), standin.device())
    here, there, again = (distilled(where, OPTIONS[name], monkeypatch) for where in places)
    assert len(here[0]) >= 3
    for leaf, expected in here[0].items():
        torch.testing.assert_close(there[0][leaf], expected, rtol=1e-4, atol=1e-6)
    for part in ("x", "y", "lr", "momentum"):
        assert np.array_equal(getattr(there[1], part), getattr(again[1], part)), part
    assert there[2] == again[2]


def test_evaluation_is_as_on_the_cpu(counts: standin.Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    _, artifact, _ = distilled(torch.device("cpu"), {}, monkeypatch)
    here, there = (
        evaluate(artifact, load("digits"), "MLP", restarts=2, device=where) for where in ("cpu", str(standin.device()))
    )
    assert here.accuracies == pytest.approx(there.accuracies, abs=0.01)
