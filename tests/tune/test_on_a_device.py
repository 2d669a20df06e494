"""Tuning on a device that is no CPU: as on the CPU, but for the last bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from revdistill.outer.data import load
from revdistill.tune import tuner
from revdistill.tune.comparison import Trained, measure
from revdistill.tune.config import TuneConfig
from revdistill.tune.schedule import Schedule
from revdistill.tune.tuner import Tuner
from tests import standin

pytestmark = pytest.mark.standin


def tuned(where: torch.device, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Schedule, Trained]:
    monkeypatch.setattr(tuner, "check_device", lambda name: where)
    learn = ("lr", "momentum", "weight-decay", "init")
    config = TuneConfig(
        dataset="digits", arch="MLP", steps=5, outer_steps=2, learn=learn, per_layer=True, optimizer=optimizer
    )
    run = Tuner(config, load("digits"))
    for _ in range(2):
        assert run.step().diverged is None
    schedule = run.schedule()
    return schedule, measure(schedule, load("digits").to(where), "MLP", batch_size=32, restarts=2, seed=1)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_tuning_is_as_on_the_cpu(counts: standin.Counts, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    (here, mine), (there, theirs) = (
        tuned(where, optimizer, monkeypatch) for where in (torch.device("cpu"), standin.device())
    )
    for part in ("lr", "momentum", "weight_decay", "init_scale"):
        assert np.allclose(getattr(here, part), getattr(there, part), rtol=1e-4, atol=1e-5), part
    assert mine.loss == pytest.approx(theirs.loss, rel=1e-3)
    assert mine.accuracies == pytest.approx(theirs.accuracies, abs=0.01)
