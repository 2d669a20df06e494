"""A distillation in its directory: its files and pictures, and how it is resumed after being stopped or killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
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
from revdistill.outer.directory import read_metrics

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


KILLS = 200


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_two_hundred_times(tmp_path: Path) -> None:
    """kill -9 at random moments, a checkpoint after every step: each time the saved step has not gone back, and each
    run ends in the uninterrupted run's bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
    config = replace(SMALL, outer_steps=200, learn_labels=False)
    expected = run(tmp_path / "whole", config, save_every=0.0).run(progress=False)
    try:
        draw, kills, finished = random.Random(0), 0, 0
        while kills < KILLS:
            directory = tmp_path / f"run-{finished}"
            more, left = _kill_until_done(directory, config, draw)
            kills, finished = kills + more, finished + 1
            assert sorted(p.name for p in directory.iterdir()) == ["checkpoint.h5", "distilled.h5", "metrics.jsonl"]
            assert all(
                np.array_equal(getattr(read(directory / "distilled.h5"), name), getattr(expected, name))
                for name in ("x", "y", "lr", "momentum")
            )
            assert more, "the run ended before it was killed once"
            print(f"run {finished}: killed {more} times, {left} of them in the middle of writing a file")
    finally:
        torch.set_num_threads(threads)


def _kill_until_done(directory: Path, config: Config, draw: random.Random) -> tuple[int, int]:
    """Kills until the run in the directory was done, and how many of them left a file half written."""
    data, kills, left, reached = load("moons"), 0, 0, 0
    while True:
        child = os.fork()
        if not child:
            code = 1
            try:
                resume = (directory / "checkpoint.h5").exists()
                Distillation(directory, Distiller(config, data), resume=resume, save_every=0.0).run(progress=False)
                code = 0
            finally:
                os._exit(code)
        time.sleep(draw.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return kills, left
        kills += 1
        left += any(p.suffix == ".tmp" for p in directory.iterdir()) if directory.exists() else 0
        if (directory / "checkpoint.h5").exists():
            distiller = Distiller(config, data)
            checkpoints.restore(directory / "checkpoint.h5", distiller)
            assert distiller.outer_step >= reached
            reached = distiller.outer_step
