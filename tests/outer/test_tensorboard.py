"""Event files for TensorBoard: what is read back of them is what happened, once."""

from __future__ import annotations

import importlib
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from click.shell_completion import BashComplete
from revdistill.cli import main as command
from revdistill.cli.main import cli
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import revdistill as rd
from revdistill.distill.artifact import read
from revdistill.distill.distillation import Distillation
from revdistill.distill.distiller import Distiller
from revdistill.outer.directory import LOCK, read_metrics
from revdistill.outer.tensorboard import Events
from tests.full_disk import file_size_limit

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


def at_step(monkeypatch: pytest.MonkeyPatch, at: int, event: Callable[[], object]) -> None:
    made = Distiller.step

    def step(self: Distiller) -> Any:
        if self.outer_step == at:
            event()
        return made(self)

    monkeypatch.setattr(Distiller, "step", step)


@pytest.mark.usefixtures("heard_signals")
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


def test_points_are_there_once_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the directory is what a kill leaves of the run: at a checkpoint, and two steps later."""
    run, at_checkpoint, later = (tmp_path / name for name in ("run", "at checkpoint", "later"))
    save = Distillation.save

    def saved(self: Distillation, path: Path) -> None:
        if self.outer_step <= 2:
            save(self, path)
        if self.outer_step == 2:
            shutil.copytree(run, at_checkpoint, ignore=shutil.ignore_patterns(LOCK))

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "save", saved)
        at_step(patched, 4, lambda: shutil.copytree(run, later, ignore=shutil.ignore_patterns(LOCK)))
        assert command.run([*TRAIN, "--tensorboard", "--save-every", "0", "--out", str(run)]) == 0
    whole = curves(run / "tensorboard")["loss"]
    assert [step for step, _ in whole] == list(range(6))
    for killed, there in ((at_checkpoint, 2), (later, 4)):
        assert curves(killed / "tensorboard")["loss"] == whole[:there]
        assert command.run(["train", "--resume", "--tensorboard", "--out", str(killed)]) == 0
        assert curves(killed / "tensorboard")["loss"] == whole  # nothing is missing, and nothing there twice


def test_a_disk_that_is_full_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run says so once, goes on, and its event file is whole in the end."""
    with ExitStack() as full, monkeypatch.context() as patched:
        at_step(patched, 1, lambda: full.enter_context(file_size_limit(300)))  # within a record
        at_step(patched, 4, full.close)
        assert command.run([*TRAIN, "--tensorboard", "--out", str(tmp_path)]) == 0
    found = curves(tmp_path / "tensorboard")
    assert steps(found, "loss") == steps(found, "hypergradient_norm") == list(range(6))
    assert steps(found, "test_accuracy/LinearNet") == [6]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    err = capsys.readouterr().err
    said = f"revdistill: {tmp_path / 'tensorboard'} took nothing ([Errno 27] File too large); going on, and trying "
    assert err.count(said) == err.count("tensorboard") == 1
    assert "Traceback" not in err


def test_a_disk_that_is_full_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of the run are whole, the event file is not, and what it lacks is said."""
    path = tmp_path / "tensorboard"
    at_step(monkeypatch, 2, lambda: (path.rename(tmp_path / "before"), path.touch()))
    assert command.run([*TRAIN, "--tensorboard", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"revdistill: {path} took nothing ([Errno 17] File exists: '{path}'); going on, and trying again later",
        f"revdistill: {path} lacks outer steps from 2 on",
    ]
    assert (tmp_path / "distilled.h5").exists()


def test_a_file_is_where_the_event_files_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").touch()
    assert command.run([*TRAIN, "--tensorboard", "--out", str(tmp_path)]) == 2
    assert f"revdistill: --out: {tmp_path / 'tensorboard'} is a file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


def test_an_event_file_that_somebody_removes(tmp_path: Path) -> None:
    events = Events(tmp_path / "run")
    events.add(0, {"loss": 1.0})
    (path,) = (tmp_path / "run").iterdir()
    with file_size_limit(path.stat().st_size + 10), pytest.raises(OSError, match="File too large"):
        events.add(1, {"loss": 2.0})
    shutil.rmtree(tmp_path / "run")  # with the beginning of a point
    events.flush()
    events.add(2, {"loss": 3.0})
    assert curves(tmp_path / "run") == {"loss": [(1, 2.0), (2, 3.0)]}


@pytest.mark.parametrize("arguments", [TRAIN, TUNE], ids=lambda a: a[0])
def test_without_the_package_a_line_says_what_to_install(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert command.run([*arguments, "--tensorboard", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err == (
        "revdistill: --tensorboard needs the package tensorboard, which is not installed: "
        "python -m pip install tensorboard\n"
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(ImportError, match=r"TensorBoard needs .* python -m pip install tensorboard"):
        rd.TensorBoard(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        TypeError("Descriptors cannot be created directly.\nIf this call came from a _pb2.py file, regenerate it."),
        ModuleNotFoundError("No module named 'google'", name="google"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_package_that_is_broken_is_not_called_absent(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> Any:
        if name.endswith("event_pb2"):
            raise error
        return importlib.import_module(name)

    monkeypatch.setattr("revdistill.outer.tensorboard.import_module", broken)
    assert command.run([*TRAIN, "--tensorboard", "--out", str(tmp_path / "run")]) == 2
    reason = f"cannot be imported ({type(error).__name__}: {str(error).splitlines()[0]})"
    assert capsys.readouterr().err == f"revdistill: --tensorboard needs the package tensorboard, which {reason}\n"
    with pytest.raises(ImportError, match=re.escape(reason)):
        rd.TensorBoard(tmp_path)


def test_a_shell_that_completes_the_line_does_not_wait_for_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("revdistill.outer.tensorboard.import_module", asked.append)
    for name in ("train", "tune"):
        found = BashComplete(cli, {}, "revdistill", "").get_completions([name, "--tensorboard"], "--sav")
        assert [item.value for item in found] == ["--save-every"]
    assert asked == []


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
        # TensorBoard forgets points of a curve whose steps do not grow
        assert found["hypergradient_norm"] == [(k, pytest.approx(norms.norms[k])) for k in range(7)]
    assert curves(tmp_path)["outer_loss"] == [(0, 0.0), (1, 0.5)]


def told(board: rd.TensorBoard, steps: Iterable[int], back: Iterable[int]) -> None:
    """As by an unroll."""
    for k in steps:
        board.on_step(k, {}, torch.tensor(float(k)))
    for k in back:
        board.on_step_back(k, 10.0 + k)


def norms_of(directory: Path, name: str = "unroll-1") -> list[int]:
    found = curves(directory / name)["hypergradient_norm"]
    assert [norm for _, norm in found] == [10.0 + k for k, _ in found]
    return [k for k, _ in found]


def test_norms_are_written_once_the_way_back_is_over(tmp_path: Path) -> None:
    board = rd.TensorBoard(tmp_path)
    told(board, range(5), [4, 3, 2, 1])
    assert "hypergradient_norm" not in curves(tmp_path / "unroll-1")
    told(board, [], [0])
    assert norms_of(tmp_path) == [0, 1, 2, 3, 4]
    told(board, range(5, 9), [8, 7, 6, 5])  # goes on with state=, from what was gone back through
    assert norms_of(tmp_path) == list(range(9))
    told(board, range(9, 15), [14, 13])  # a window
    assert norms_of(tmp_path) == list(range(9))
    told(board, range(15, 17), [])
    assert norms_of(tmp_path) == [*range(9), 13, 14]
    told(board, range(17, 19), range(18, 14, -1))
    assert norms_of(tmp_path) == [*range(9), *range(13, 19)]
    told(board, range(19, 21), [20])  # an error ends it
    board.close()
    assert norms_of(tmp_path) == [*range(9), *range(13, 19), 20]
    assert steps(curves(tmp_path / "unroll-1"), "loss") == list(range(21))


def test_a_way_back_of_its_own_is_a_run_of_its_own(tmp_path: Path) -> None:
    with rd.TensorBoard(tmp_path) as board:
        told(board, range(4), [3, 2, 1, 0])
        told(board, [], [3, 2, 1])
        told(board, [], [2, 1, 0])
        told(board, range(4, 6), [])
    assert [norms_of(tmp_path, f"unroll-{i}") for i in (1, 2, 3)] == [[0, 1, 2, 3], [1, 2, 3], [0, 1, 2]]
    assert set(curves(tmp_path / "unroll-3")) == {"hypergradient_norm"}
    assert steps(curves(tmp_path / "unroll-4"), "loss") == [4, 5]


def test_a_state_gone_on_from_in_one_graph(tmp_path: Path) -> None:
    """Two unrolls, one way back through both."""
    w = torch.ones(4, requires_grad=True)
    with rd.TensorBoard(tmp_path) as board:
        options: dict[str, Any] = {"on_step": board.on_step, "on_step_back": board.on_step_back, "return_state": True}

        def loss(p: dict[str, torch.Tensor], _: Any) -> torch.Tensor:
            return (p["w"] ** 3).sum()

        theta, state = rd.unroll(loss, {"w": w}, lambda k: (), rd.SGD(0.01), steps=3, **options)
        theta, _ = rd.unroll(loss, theta, lambda k: (), rd.SGD(0.01), steps=4, state=state, **options)
        theta["w"].sum().backward()
        found = curves(tmp_path / "unroll-1")
    assert steps(found, "loss") == steps(found, "hypergradient_norm") == list(range(7))


def test_every_other_step_and_none_at_all(tmp_path: Path) -> None:
    board = rd.TensorBoard(str(tmp_path / "runs"), every=3)
    board.close()
    assert not (tmp_path / "runs").exists()
    unroll(board, {}, rd.BackwardNorms())
    found = curves(tmp_path / "runs" / "unroll-1")
    assert (steps(found, "loss"), steps(found, "hypergradient_norm")) == ([0, 3, 6], [0, 3, 6])
    board.close()
    board.on_step(1, {}, torch.tensor(math.nan))
    board.on_step(3, {}, torch.tensor(math.nan))
    board.close()
    assert math.isnan(curves(tmp_path / "runs" / "unroll-2")["loss"][0][1])


def test_what_comes_after_close_hides_nothing(tmp_path: Path) -> None:
    board = rd.TensorBoard(tmp_path)
    for step in range(12):  # more than nine files within a second, in the order in which they were made
        board.scalars(step, {"loss": float(step)})
        board.close()
        board.scalars(step, {"accuracy": 0.5})
        board.close()
    found = curves(tmp_path)
    assert found["loss"] == [(step, float(step)) for step in range(12)]
    assert steps(found, "accuracy") == list(range(12))
    with rd.TensorBoard(tmp_path) as another:  # as another process that goes on
        another.scalars(10, {"loss": 0.5})
        another.scalars(11, {"loss": 0.25})
    assert curves(tmp_path)["loss"] == [*((step, float(step)) for step in range(10)), (10, 0.5), (11, 0.25)]
    board.scalars(3, {"loss": 0.0})  # begins again
    board.close()
    assert steps(curves(tmp_path), "loss") == [0, 1, 2, 3]


def test_points_that_the_disk_did_not_take_are_kept(tmp_path: Path) -> None:
    board = rd.TensorBoard(tmp_path)
    told(board, range(2), [])
    (path,) = (tmp_path / "unroll-1").iterdir()
    with file_size_limit(path.stat().st_size + 10):
        for k in range(2, 4):
            with pytest.raises(OSError, match="File too large"):
                told(board, [k], [])
        with pytest.raises(OSError, match="File too large"):
            told(board, [], [3, 2, 1, 0])
        with pytest.raises(OSError, match="File too large"):
            board.close()
    board.close()
    assert curves(tmp_path / "unroll-1")["loss"] == [(k, float(k)) for k in range(4)]
    assert norms_of(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_the_argument_is_checked(tmp_path: Path, every: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="every must be"):
        rd.TensorBoard(tmp_path, every=every)
