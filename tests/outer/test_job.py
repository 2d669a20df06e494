"""A job that nobody watches: whatever happens to process, disk or directory, what was saved is not lost."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from revdistill.outer import checkpoint as checkpoints
from revdistill.outer.descent import ClipTo, Descent, cosine
from revdistill.outer.directory import LOCK, DirectoryInUseError, DirectoryLock, read_metrics
from revdistill.outer.hdf5 import reading, writing
from revdistill.outer.job import InterruptedRunError, Job, NotSavedError
from tests.full_disk import file_size_limit

TOTAL = 12
FILES = ["checkpoint.h5", "metrics.jsonl", "result.h5"]


class Fit(Job[np.ndarray]):
    """As small as a job can be: Adam on a quadratic that moves from step to step."""

    noun, verb, checkpoint, results = "run", "fit", "checkpoint.h5", ("result.h5",)

    def __init__(self, directory: Path, **kwargs: Any) -> None:
        self.descent = Descent(
            {"x": torch.linspace(1, 2, 300).requires_grad_()},
            lr=0.1,
            betas=(0.9, 0.99),
            decay=lambda k: cosine(k, TOTAL),
            clip=ClipTo(1.0),
            average_from=4,
        )
        super().__init__(directory, **kwargs)

    @property
    def total(self) -> int:
        return TOTAL

    @property
    def outer_step(self) -> int:
        return self.descent.outer_step

    def step(self) -> tuple[dict[str, Any], str]:
        k = self.outer_step
        outcome = self.descent.step(lambda k: (self.descent.leaves["x"] - 0.1 * k).square().sum())
        entry = {"step": k, "loss": outcome.loss, "norm": outcome.norm}
        return entry, f"loss {outcome.loss}"

    def save(self, path: Path) -> None:
        checkpoints.save(path, self.descent, version=1, config={}, averages=True)

    def restore(self, path: Path) -> None:
        checkpoints.restore(path, self.descent, steps=TOTAL, averages=True)

    def finish(self) -> np.ndarray:
        result = self.descent.averages["x"].numpy()
        with writing(self.directory / "result.h5") as file:
            file.create_dataset("x", data=result)
        return result


def run(directory: Path, **kwargs: Any) -> Fit:
    return Fit(directory, **({"save_every": 0.0} | kwargs))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    directory = tmp_path_factory.mktemp("whole") / "run"
    result = run(directory).run()
    with reading(directory / "result.h5") as file:
        assert same(file.array("x", "float32"), result)
    return result


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b)


@contextmanager
def at_step(monkeypatch: pytest.MonkeyPatch, happens: dict[int, Callable[[], object]]) -> Iterator[None]:
    """Something happens as an outer step begins."""
    step = Fit.step

    def stepping(self: Fit) -> Any:
        happens.get(self.outer_step, lambda: None)()
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "step", stepping)
        yield


# a full disk


def test_a_disk_that_is_full_for_a_while(
    tmp_path: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run goes on, says so once for each failure, and is whole in the end."""
    limit = file_size_limit(1000)
    with at_step(monkeypatch, {3: limit.__enter__, 6: lambda: limit.__exit__(None, None, None)}):
        result = run(tmp_path / "run").run(progress=False)
    assert same(result, whole)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == FILES
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3
    assert all("took nothing ([Errno 27] File too large); going on, and trying again later" in line for line in said)


def test_a_disk_that_is_full_at_the_end(tmp_path: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is put elsewhere; the one in the directory is as it was; either can be resumed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    broken: list[Any] = []
    save = Fit.save

    def saving(self: Fit, path: Path) -> None:
        if broken and path.parent == tmp_path / "run":
            raise OSError(28, "No space left on device")
        save(self, path)

    monkeypatch.setattr(Fit, "save", saving)
    with (
        at_step(monkeypatch, {5: lambda: broken.append(True)}),
        pytest.raises(
            NotSavedError, match=r"took no checkpoint of outer step 12; it is .*checkpoint.h5.*resume"
        ) as caught,
    ):
        run(tmp_path / "run").run(progress=False)
    (rescued,) = elsewhere.iterdir()
    assert str(rescued) in str(caught.value)
    monkeypatch.undo()
    for directory, step in ((rescued, 12), (tmp_path / "run", 5)):
        resumed = run(directory, resume=True)
        assert resumed.outer_step == step
        assert same(resumed.run(progress=False), whole)


def test_a_disk_that_is_full_while_pictures_or_the_result_are_written(tmp_path: Path, whole: np.ndarray) -> None:
    """An error of the system, and nothing half written; resuming makes up for it."""
    directory = tmp_path / "run"
    run(directory).run(progress=False)
    (directory / "result.h5").unlink()
    resumed = run(directory, resume=True)
    size = (directory / "checkpoint.h5").stat().st_size + 1
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "result" in self.name:
            raise OSError(28, "No space left on device", str(self))
        return write(self, data)

    with pytest.MonkeyPatch.context() as patch, file_size_limit(size):
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            resumed.run(progress=False)
    assert sorted(p.name for p in directory.iterdir()) == ["checkpoint.h5", "metrics.jsonl"]
    assert same(run(directory, resume=True).run(progress=False), whole)


# the directory


def test_a_directory_removed_while_running_is_made_again(
    tmp_path: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    with at_step(monkeypatch, {5: lambda: shutil.rmtree(directory)}):
        result = run(directory).run(progress=False)
    assert same(result, whole)
    assert sorted(p.name for p in directory.iterdir()) == FILES
    assert [line["step"] for line in read_metrics(directory / "metrics.jsonl")] == list(range(5, 12))


def test_a_directory_replaced_by_a_file(tmp_path: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))

    def replace_it() -> None:
        shutil.rmtree(directory)
        directory.write_text("not a directory")

    with at_step(monkeypatch, {5: replace_it}), pytest.raises(NotSavedError):
        run(directory).run(progress=False)
    (rescued,) = elsewhere.iterdir()
    assert same(run(rescued, resume=True).run(progress=False), whole)
    assert directory.read_text() == "not a directory"


@pytest.mark.skipif(os.geteuid() != 0, reason="plays a user without permission, which only root can")
def test_a_directory_made_read_only_while_running(
    tmp_path: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = 65534
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    directory, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (directory, elsewhere):
        folder.mkdir()
        os.chown(folder, nobody, nobody)
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    starting = run(directory)
    os.seteuid(nobody)
    try:
        with at_step(monkeypatch, {5: lambda: directory.chmod(0o500)}), pytest.raises(NotSavedError, match="resume"):
            starting.run(progress=False)
    finally:
        os.seteuid(0)
    directory.chmod(0o700)
    (rescued,) = elsewhere.iterdir()
    for folder, step in ((rescued, 12), (directory, 5)):
        resumed = run(folder, resume=True)
        assert resumed.outer_step == step
        assert same(resumed.run(progress=False), whole)


def test_a_second_run_is_refused_and_names_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(DirectoryInUseError) as caught:
            run(tmp_path / "run", resume=True).run(progress=False)
        refused.append(str(caught.value))

    with at_step(monkeypatch, {5: second}):
        run(tmp_path / "run").run(progress=False)
    assert refused == [f"{tmp_path / 'run'} is in use by another run (process {os.getpid()})"]


def test_a_run_that_moved_in_meanwhile_is_left_alone(
    tmp_path: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is removed, and another run starts in it before ours saves again."""
    directory, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    other = DirectoryLock(directory)

    def move_in() -> None:
        shutil.rmtree(directory)
        other.__enter__()
        (directory / "checkpoint.h5").write_text("the other's")

    with at_step(monkeypatch, {5: move_in}), pytest.raises(NotSavedError, match="took no checkpoint"):
        run(directory).run(progress=False)
    assert sorted(p.name for p in directory.iterdir()) == ["checkpoint.h5", LOCK]
    assert (directory / "checkpoint.h5").read_text() == "the other's"
    other.__exit__()
    assert [p.name for p in directory.iterdir()] == ["checkpoint.h5"]


# time, versions, signals


def test_a_clock_that_goes_backwards(tmp_path: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour at each look: nothing but the wall clock, which only the progress bar may look at."""
    now = [1e9]

    def back() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", back)
    assert same(run(tmp_path / "run").run(progress=True), whole)
    seconds = [line["seconds"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0
    assert seconds[-1] < 600


@pytest.mark.usefixtures("heard_signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_to_stop_are_saved_before(
    name: str, tmp_path: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    signum = getattr(signal, name)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    slow = run(tmp_path / "run", save_every=3600)
    with at_step(monkeypatch, {5: lambda: os.kill(os.getpid(), signum)}), pytest.raises(InterruptedRunError) as caught:
        slow.run(progress=False)
    assert (caught.value.outer_step, caught.value.signum) == (6, signum)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    resumed = run(tmp_path / "run", resume=True)
    assert resumed.outer_step == 6
    assert same(resumed.run(progress=False), whole)


@pytest.mark.usefixtures("heard_signals")
def test_a_job_that_stops_within_a_step(tmp_path: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the step had done is lost, and no more; a signal between two steps is heard as well."""
    monkeypatch.setattr(Fit, "stops_within_a_step", True)
    reached: list[str] = []

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("the rest of the step")

    with at_step(monkeypatch, {5: interrupt}), pytest.raises(InterruptedRunError) as caught:
        run(tmp_path / "run", save_every=3600).run(progress=False)
    assert (caught.value.outer_step, caught.value.signum, reached) == (5, signal.SIGTERM, [])
    resumed = run(tmp_path / "run", resume=True)
    assert resumed.outer_step == 5
    save = Fit.save

    def interrupted(self: Fit, path: Path) -> None:
        save(self, path)
        if self.outer_step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "save", interrupted)
        with pytest.raises(InterruptedRunError) as caught:
            resumed.run(progress=False)
    assert caught.value.outer_step == 8
    assert same(run(tmp_path / "run", resume=True).run(progress=False), whole)


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nohup does it, so that a run outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with at_step(monkeypatch, {5: lambda: os.kill(os.getpid(), signal.SIGHUP)}):
            assert same(run(tmp_path / "run").run(progress=False), whole)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_disk_without_locks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match=r"cannot lock .*run.lock: No locks available; another --out"):
        run(tmp_path / "run").run(progress=False)


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    for name in (".checkpoint.h5.abc.tmp", ".result.h5.abc.tmp", ".metrics.jsonl.abc.tmp", ".mine.tmp", "notes.txt"):
        (directory / name).write_text("")
    run(directory).run(progress=False)
    assert sorted(p.name for p in directory.iterdir()) == sorted([*FILES, ".mine.tmp", "notes.txt"])
