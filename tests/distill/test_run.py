from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import revdistill as rd
from revdistill.distill import checkpoint as checkpoints
from revdistill.distill.artifact import read
from revdistill.distill.config import Config
from revdistill.distill.distillation import Distillation
from revdistill.distill.distiller import Distiller
from revdistill.distill.plots import draw_all, images
from revdistill.outer.data import load
from revdistill.outer.directory import METRICS, Log, read_metrics, resumed_log

SMALL = Config(
    dataset="moons", architectures=("NonLinearNet",), steps=4, epochs=2, outer_steps=8, batch_size=64, learn_labels=True
)


def run(directory: Path, config: Config = SMALL, **kwargs: Any) -> Distillation:
    return Distillation(directory, Distiller(config, load(config.dataset)), **kwargs)


def test_a_run_leaves_its_files(tmp_path: Path) -> None:
    finished = run(tmp_path / "run").run()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint.h5", "distilled.h5", "metrics.jsonl"]
    assert read(tmp_path / "run" / "distilled.h5").evaluation == finished.evaluation
    entry = finished.evaluation["NonLinearNet"]
    assert set(entry) == {"schedule", "restarts", "mean", "std", "accuracies"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    with pytest.raises(ValueError, match="already holds a run"):
        run(tmp_path / "run")


@pytest.mark.parametrize(
    ("stop", "config"),
    [
        *((stop, SMALL) for stop in (1, 3, 7)),
        *(
            (stop, replace(SMALL, average=0.5, outer_lr_rates=0.01, outer_beta1=0.9, grow=0.5, window=3))
            for stop in (2, 6)
        ),
        (3, replace(SMALL, dataset="digits", architectures=("MLP",), augment=("crop", "rotate"), average=1.0)),
    ],
)
def test_resuming_gives_the_same_bits(
    stop: int, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", config).run()
    step = Distiller.step

    class Killed(BaseException):
        pass

    def dying(self: Distiller) -> Any:
        if self.outer_step == stop:
            raise Killed
        return step(self)

    monkeypatch.setattr(Distiller, "step", dying)
    with pytest.raises(Killed):
        run(tmp_path / "part", config, save_every=0.0).run()
    monkeypatch.undo()
    resumed = run(tmp_path / "part", config, resume=True)
    assert resumed.distiller.outer_step == stop
    result = resumed.run()
    for name in ("x", "y", "lr", "momentum"):
        assert (getattr(result, name) == getattr(whole, name)).all()
    assert result.evaluation == whole.evaluation
    lines = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in ("part", "whole")}
    seconds = {name: [line.pop("seconds") for line in found] for name, found in lines.items()}
    assert lines["part"] == lines["whole"]
    assert all(found == sorted(found) for found in seconds.values())  # goes on counting


def test_resuming_needs_the_same_run(tmp_path: Path) -> None:
    run(tmp_path).run()
    with pytest.raises(ValueError, match="seed is 1 here, but 0 in the run"):
        run(tmp_path, replace(SMALL, seed=1), resume=True)
    with pytest.raises(ValueError, match=r"holds no checkpoint.h5"):
        run(tmp_path / "none", resume=True)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    run(tmp_path).run()
    path = tmp_path / "checkpoint.h5"
    whole = path.read_bytes()
    distiller = Distiller(SMALL, load("moons"))
    before = [leaf.detach().clone() for leaf in distiller.synthetic.leaves.values()]
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(rd.ArtifactError, match=r"checkpoint.h5"):
            checkpoints.restore(path, distiller)
    assert all(torch.equal(a, b) for a, b in zip(before, distiller.synthetic.leaves.values(), strict=True))


def test_metrics_cut_short_by_a_kill_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.5}\n[1]\n{"step": 1, "lo')
    assert read_metrics(path) == [{"step": 0, "loss": 1.5}]
    assert read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SMALL, {"rates", "outer", "points", "decisions"}),
        (Config(dataset="digits", steps=2, epochs=2, outer_steps=1, learn_momentum=True), {"rates", "outer", "images"}),
        (replace(SMALL, dataset="blobs", steps=1, epochs=1, outer_steps=1), {"rates", "outer", "points", "decisions"}),
    ],
)
def test_pictures(config: Config, expected: set[str], tmp_path: Path) -> None:
    result = run(tmp_path, config).run()
    written = draw_all(tmp_path, result, load(config.dataset), read_metrics(tmp_path / "metrics.jsonl"))
    assert {p.stem for p in written} == expected
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)
    assert len(list((tmp_path / "plots").iterdir())) == len(expected)


@pytest.mark.parametrize("learn_labels", [True, False])
def test_columns_are_named_by_their_class(learn_labels: bool) -> None:
    """Regression: they were named by the first image's label, which may have been learned to favour another class."""
    config = Config(dataset="digits", architectures=("MLP",), steps=3, per_class=2, learn_labels=learn_labels)
    artifact = Distiller(config, load("digits")).artifact()
    if learn_labels:
        artifact.y[0, 2] = np.eye(10)[9]  # an image of class 1
    titles = [ax.get_title() for ax in images(artifact).axes]
    assert [title for title in titles if title] == [str(c) for c in range(10)]


def test_the_log_is_json_where_numbers_are_not(tmp_path: Path) -> None:
    Log(tmp_path / METRICS).append(
        {"step": 3, "loss": math.nan, "hypergradient_norm": math.inf, "seconds": 1.5, "diverged": "why"}
    )
    assert "NaN" not in (tmp_path / METRICS).read_text()
    (line,) = read_metrics(tmp_path / METRICS)
    assert line == {"step": 3, "loss": None, "hypergradient_norm": None, "seconds": 1.5, "diverged": "why"}


@pytest.mark.parametrize("damaged", ['"ten"', "null", "-3", "1e999", "1" + "0" * 400, "[]"])
def test_a_resumed_run_counts_the_seconds_that_its_log_has(damaged: str, tmp_path: Path) -> None:
    """Regression: a log from elsewhere whose seconds were no number ended in a traceback."""
    path = tmp_path / METRICS
    lines = ('"step": 0, "seconds": 1.5', f'"step": 1, "seconds": {damaged}', '"step": 2', '"step": 7, "seconds": 9')
    path.write_text("".join(f"{{{line}}}\n" for line in lines))
    log, seconds = resumed_log(path, 7)
    assert seconds == 1.5
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2]
    log.append({"step": 7})
    assert read_metrics(path)[-1] == {"step": 7}
