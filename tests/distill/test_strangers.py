"""Results from strangers, as `revdistill show` and `evaluate` meet them: nothing runs, nothing else is read, memory
stays bounded.

What a single file may do to the reader is in test_artifact.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from revdistill.cli import main as command

from revdistill.distill.artifact import write
from revdistill.outer.directory import read_metrics
from tests.distill.fuzz import artifact

HERE = Path(__file__).resolve().parents[2]


def fuzzed(seconds: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.distill.fuzz", str(seconds)],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_hostile_results_for_some_seconds() -> None:
    looks = re.search(r"(\d+) looks at (\d+) inputs", fuzzed(5))
    assert looks
    assert int(looks[2]) >= 100


@pytest.mark.slow
def test_hostile_results_for_ten_minutes() -> None:
    print(fuzzed(600))


def test_a_result_does_not_say_which_file_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = np.random.default_rng(0).normal(size=(60, 2)), np.arange(60) % 2
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    run = tmp_path / "run"
    run.mkdir()
    write(run / "distilled.h5", replace(artifact(images=False), dataset=str(tmp_path / "mine.npz")))
    for name in ("evaluate", "show"):
        assert command.run([name, str(run)]) == 2
        assert "mine.npz'; give --dataset with that file" in capsys.readouterr().err
        assert command.run([name, str(run), "--dataset", str(tmp_path / "mine.npz")]) == 0
        assert "NonLinearNet" in capsys.readouterr().out


def test_texts_do_not_reach_the_terminal_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        tmp_path / "distilled.h5",
        replace(artifact(images=True), dataset="\x1b[2Jdigits", architectures=["\x1b]0;owned\x07"]),
    )
    assert command.run(["show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "?[2Jdigits" in out
    assert not set(out) & {"\x1b", "\x07"}


def test_a_log_that_cannot_be_drawn_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by the fuzz: a loss that is not above 0 made matplotlib warn."""
    write(tmp_path / "distilled.h5", artifact(images=True))
    odd = [False, 0, -1, 10**400, 1e308, float("nan"), None, "x", []]
    lines = [{"step": i, "loss": value, "held_out_accuracy": value} for i, value in enumerate(odd)]
    lines += [{"step": step, "loss": 1.0} for step in (True, -1, 10**30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert command.run(["show", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == len(odd)
