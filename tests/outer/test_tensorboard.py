"""Event files for TensorBoard: what is read back of them is what happened, once."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from revdistill.cli import main as command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import revdistill as rd
from revdistill.distill.artifact import read
from revdistill.distill.distillation import Distillation
from revdistill.distill.distiller import Distiller
from revdistill.outer.directory import read_metrics

MOONS = ["--dataset", "moons", "--arch", "linearnet", "--device", "cpu", "--threads", "1"]
TRAIN = ["train", *MOONS, "--steps", "2", "--epochs", "1", "--outer-steps", "6", "--batch-size", "8"]
TUNE = ["tune", *MOONS, "--steps", "3", "--outer-steps", "3", "--batch-size", "8"]
Curves = dict[str, list[tuple[int, float]]]


def curves(directory: Path) -> Curves:
    """What TensorBoard shows of a run: by name the points (step, value), in the order of the files."""
    read = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    read.Reload()
    return {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}


def steps(found: Curves, name: str) -> list[int]:
    return [step for step, _ in found[name]]


def test_train_writes_each_step_and_what_was_reached(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command.run([*TRAIN, "--outer-steps", "200", "--tensorboard", "--out", str(run)]) == 0
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "held_out_accuracy" not in line] == list(range(0, 200, 2))
    assert set(lines[0]) == {"step", "loss", "hypergradient_norm", "seconds"}
    found = curves(run / "tensorboard")
    assert set(found) == {"loss", "hypergradient_norm", "held_out_accuracy", "test_accuracy/LinearNet"}
    for name in ("loss", "hypergradient_norm"):
        assert steps(found, name) == list(range(200))  # of which the log has half
        for line in lines:
            assert found[name][line["step"]][1] == pytest.approx(line[name], rel=1e-6)
    accuracies = [(line["step"], line["held_out_accuracy"]) for line in lines if "held_out_accuracy" in line]
    assert steps(found, "held_out_accuracy") == [step for step, _ in accuracies]
    reached = read(run / "distilled.h5").evaluation["LinearNet"]["mean"]
    assert found["test_accuracy/LinearNet"] == [(200, pytest.approx(reached))]


def test_tune_writes_each_step_and_what_was_reached(tmp_path: Path) -> None:
    assert command.run([*TUNE, "--tensorboard", "--out", str(tmp_path / "run")]) == 0
    found = curves(tmp_path / "run" / "tensorboard")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for name in ("loss", "hypergradient_norm", "longest_theta_bar"):
        expected = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
        assert found[name] == expected
    assert steps(found, "test_accuracy/start") == steps(found, "test_accuracy/learned") == [3]


def at_step(monkeypatch: pytest.MonkeyPatch, at: int, event: Callable[[], None]) -> None:
    made = Distiller.step

    def step(self: Distiller) -> Any:
        if self.outer_step == at:
            event()
        return made(self)

    monkeypatch.setattr(Distiller, "step", step)


def test_a_stopped_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        at_step(patched, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert command.run([*TRAIN, "--tensorboard", "--out", str(out)]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"  revdistill train --resume --out {out} --tensorboard"
    assert steps(curves(out / "tensorboard"), "loss") == [0, 1, 2]
    assert command.run(line.split()[1:]) == 0
    assert steps(curves(out / "tensorboard"), "loss") == list(range(6))
    assert command.run(line.split()[1:]) == 0  # of a finished run, again
    assert steps(curves(out / "tensorboard"), "loss") == list(range(6))
    assert steps(curves(out / "tensorboard"), "test_accuracy/LinearNet") == [6]


def test_points_after_the_last_checkpoint_are_not_doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill: four steps were written, and two of them saved."""

    def killed() -> None:
        raise KeyError("killed")

    save = Distillation.save

    def saved(self: Distillation, path: Path) -> None:
        if (
            0 < self.outer_step <= 2
        ):  # what a checkpoint has behind it is in the file, even if the process is killed now
            assert steps(curves(tmp_path / "tensorboard"), "loss") == list(range(self.outer_step))
        if self.outer_step <= 2:
            save(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "save", saved)
        at_step(patched, 4, killed)
        with pytest.raises(KeyError):
            command.run([*TRAIN, "--tensorboard", "--save-every", "0", "--out", str(tmp_path)])
    first = curves(tmp_path / "tensorboard")["loss"]
    assert [step for step, _ in first] == [0, 1, 2, 3]
    assert command.run(["train", "--resume", "--tensorboard", "--out", str(tmp_path)]) == 0
    again = curves(tmp_path / "tensorboard")["loss"]
    assert [step for step, _ in again] == list(range(6))
    assert again[:4] == first  # made again to the same bits


def test_a_disk_that_takes_nothing_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    assert command.run([*TRAIN, "--tensorboard", "--out", str(tmp_path)]) == 0
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "distilled.h5").exists()


@pytest.mark.parametrize("arguments", [TRAIN, TUNE], ids=lambda a: a[0])
def test_without_the_package_a_line_says_what_to_install(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert command.run([*arguments, "--tensorboard", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err == (
        "revdistill: --tensorboard needs the package tensorboard, which is not installed: "
        "pip install 'revdistill[log]'\n"
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(ImportError, match=r"TensorBoard needs .* pip install 'revdistill\[log\]'"):
        rd.TensorBoard(tmp_path)


def unroll(board: rd.TensorBoard, seen: dict[int, float], norms: rd.BackwardNorms, **options: Any) -> None:
    def on_step(k: int, theta: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
        seen[k] = float(loss)
        board.on_step(k, theta, loss)

    def on_step_back(k: int, norm: float) -> None:
        norms(k, norm)
        board.on_step_back(k, norm)

    w = torch.ones(4, requires_grad=True)
    theta = rd.unroll(
        lambda p, _: (p["w"] ** 3).sum(),
        {"w": w},
        lambda k: (),
        rd.SGD(0.01),
        steps=7,
        on_step=on_step,
        on_step_back=on_step_back,
        **options,
    )
    theta["w"].sum().backward()


@pytest.mark.parametrize("adjoint", [rd.Reversible(), rd.Checkpoint(every=3)], ids=repr)
def test_the_steps_of_unrolls(tmp_path: Path, adjoint: rd.Reversible | rd.Checkpoint) -> None:
    seen: dict[int, float] = {}
    norms = rd.BackwardNorms()
    with rd.TensorBoard(tmp_path) as board:
        for outer_step in range(2):
            unroll(board, seen, norms, adjoint=adjoint)
            board.scalars(outer_step, {"outer_loss": 0.5 * outer_step})
        assert repr(board) == f"TensorBoard({str(tmp_path)!r}, every=1, unrolls=2)"
    for name in ("unroll-1", "unroll-2"):
        found = curves(tmp_path / name)
        assert found["loss"] == [(k, pytest.approx(seen[k])) for k in range(7)]
        assert found["hypergradient_norm"] == [(k, pytest.approx(norms.norms[k])) for k in reversed(range(7))]
    assert curves(tmp_path)["outer_loss"] == [(0, 0.0), (1, 0.5)]


def test_every_other_step_and_none_at_all(tmp_path: Path) -> None:
    board = rd.TensorBoard(str(tmp_path / "runs"), every=3)
    board.close()
    assert not (tmp_path / "runs").exists()
    unroll(board, {}, rd.BackwardNorms())
    board.close()
    found = curves(tmp_path / "runs" / "unroll-1")
    assert (steps(found, "loss"), steps(found, "hypergradient_norm")) == ([0, 3, 6], [6, 3, 0])
    board.on_step(1, {}, torch.tensor(math.nan))
    board.on_step(3, {}, torch.tensor(math.nan))
    board.close()
    assert math.isnan(curves(tmp_path / "runs" / "unroll-2")["loss"][0][1])


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_the_argument_is_checked(tmp_path: Path, every: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="every must be"):
        rd.TensorBoard(tmp_path, every=every)
