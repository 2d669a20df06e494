"""Runs that nobody watches: whatever happens to the process, the disk or the directory, what was saved is not lost."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from revdistill.distill import checkpoint as checkpoints
from revdistill.distill.artifact import Artifact, read
from revdistill.distill.checkpoint import read_config
from revdistill.distill.config import Config
from revdistill.distill.distillation import Distillation
from revdistill.distill.distiller import Distiller
from revdistill.outer.data import load
from revdistill.outer.directory import LOCK, DirectoryInUseError, DirectoryLock, read_metrics
from revdistill.outer.job import InterruptedRunError, NotSavedError

SMALL = Config(dataset="moons", architectures=("NonLinearNet",), steps=4, epochs=2, outer_steps=12, batch_size=64)
FILES = ["checkpoint.h5", "distilled.h5", "metrics.jsonl"]


def run(directory: Path, config: Config = SMALL, **kwargs: Any) -> Distillation:
    return Distillation(directory, Distiller(config, load(config.dataset)), save_every=0.0, **kwargs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(tmp_path_factory.mktemp("whole") / "run").run()


def same(a: Artifact, b: Artifact) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("x", "y", "lr", "momentum"))


@contextmanager
def at_step(monkeypatch: pytest.MonkeyPatch, happens: dict[int, Callable[[], object]]) -> Iterator[None]:
    """Something happens as an outer step begins."""
    step = Distiller.step

    def stepping(self: Distiller) -> Any:
        happens.get(self.outer_step, lambda: None)()
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "step", stepping)
        yield


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a disk that is full, for this process alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


# --- a full disk
# ----------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_for_a_while(
    tmp_path: Path, whole: Artifact, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
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


def test_a_disk_that_is_full_at_the_end(tmp_path: Path, whole: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is put elsewhere; the one in the directory is as it was; either can be resumed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    broken: list[Any] = []
    save = checkpoints.save

    def saving(path: Path, distiller: Distiller) -> None:
        if broken and path.parent == tmp_path / "run":
            raise OSError(28, "No space left on device")
        save(path, distiller)

    monkeypatch.setattr(checkpoints, "save", saving)
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
        assert resumed.distiller.outer_step == step
        assert same(resumed.run(progress=False), whole)


def test_a_disk_that_is_full_while_pictures_or_the_result_are_written(tmp_path: Path, whole: Artifact) -> None:
    """An error of the system, and nothing half written; resuming makes up for it."""
    directory = tmp_path / "run"
    run(directory).run(progress=False)
    (directory / "distilled.h5").unlink()
    resumed = run(directory, resume=True)
    size = (directory / "checkpoint.h5").stat().st_size + 1
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "distilled" in self.name:
            raise OSError(28, "No space left on device", str(self))
        return write(self, data)

    with pytest.MonkeyPatch.context() as patch, file_size_limit(size):
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            resumed.run(progress=False)
    assert sorted(p.name for p in directory.iterdir()) == ["checkpoint.h5", "metrics.jsonl"]
    assert same(run(directory, resume=True).run(progress=False), whole)


def mounted(folder: Path, size: str) -> bool:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    return done.returncode == 0


TRAIN = [
    sys.executable,
    "-m",
    "revdistill.cli",
    "train",
    "--dataset",
    "moons",
    "--arch",
    "NonLinearNet",
    "--steps",
    "4",
]
TRAIN += ["--epochs", "2", "--outer-steps", "12", "--batch-size", "64", "--save-every", "0"]


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_the_command_on_a_disk_that_is_full(tmp_path: Path) -> None:
    """A real one. Regression: HDF5 ended the process with a segmentation fault when it closed a file on a full disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted(disk, "40k"):
        pytest.skip("this system does not let root mount a tmpfs")
    try:
        (disk / "ballast").write_bytes(bytes(4096))
        done = subprocess.run([*TRAIN, "--out", str(disk / "run")], capture_output=True, text=True, check=False)
        # checkpoints are replaced, which needs room for two: one fits here, with little beside it
        assert done.returncode in (0, 1)
        assert "Traceback" not in done.stderr
        assert "Segmentation" not in done.stderr
        (disk / "more").write_bytes(bytes(disk_free(disk)))  # now really full
        full = subprocess.run([*TRAIN, "--out", str(disk / "other")], capture_output=True, text=True, check=False)
        assert full.returncode == 1
        assert (
            full.stderr.splitlines() == ["revdistill: [Errno 28] No space left on device"]
            or "No space left" in full.stderr
        )
        assert full.stderr.count("\n") == 1
        saved = read_config(disk / "run" / "checkpoint.h5")
        assert saved.outer_steps == 12
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def disk_free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


# --- the directory
# --------------------------------------------------------------------------------------------------------------


def test_a_directory_removed_while_running_is_made_again(
    tmp_path: Path, whole: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    with at_step(monkeypatch, {5: lambda: shutil.rmtree(directory)}):
        result = run(directory).run(progress=False)
    assert same(result, whole)
    assert sorted(p.name for p in directory.iterdir()) == FILES
    assert [line["step"] for line in read_metrics(directory / "metrics.jsonl")] == list(range(5, 12))


def test_a_directory_replaced_by_a_file(tmp_path: Path, whole: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
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
    tmp_path: Path, whole: Artifact, monkeypatch: pytest.MonkeyPatch
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
        assert resumed.distiller.outer_step == step
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
    tmp_path: Path, whole: Artifact, monkeypatch: pytest.MonkeyPatch
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


def test_a_lock_removed_between_opening_and_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that held it ends just then: the lock on its file is worth nothing, and another is taken."""
    import fcntl

    flock, removed = fcntl.flock, []

    def racing(file: Any, flags: int) -> None:
        flock(file, flags)
        if not removed:
            removed.append(True)
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", racing)
    with DirectoryLock(tmp_path):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())
        with pytest.raises(DirectoryInUseError):
            DirectoryLock(tmp_path).__enter__()
    assert not list(tmp_path.iterdir())


# --- time, versions, signals
# ----------------------------------------------------------------------------------------------------


def test_a_clock_that_goes_backwards(tmp_path: Path, whole: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_checkpoint_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from revdistill.cli import main as command

    run(tmp_path / "run").run(progress=False)
    with h5py.File(tmp_path / "run" / "checkpoint.h5", "a") as file:
        file.attrs["revdistill_version"] = "9.9.9"
    assert command.run(["train", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert "note: the checkpoint was written by revdistill 9.9.9, this is" in capfd.readouterr().err
    with h5py.File(tmp_path / "run" / "checkpoint.h5", "a") as file:
        file.attrs["format_version"] = 99
    assert command.run(["train", "--resume", "--out", str(tmp_path / "run")]) == 2
    assert "format version 99" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_to_stop_are_saved_before(
    name: str, tmp_path: Path, whole: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    signum = getattr(signal, name)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    slow = Distillation(tmp_path / "run", Distiller(SMALL, load("moons")), save_every=3600)
    with at_step(monkeypatch, {5: lambda: os.kill(os.getpid(), signum)}), pytest.raises(InterruptedRunError) as caught:
        slow.run(progress=False)
    assert (caught.value.outer_step, caught.value.signum) == (6, signum)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    resumed = run(tmp_path / "run", resume=True)
    assert resumed.distiller.outer_step == 6
    assert same(resumed.run(progress=False), whole)


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path, whole: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
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
    for name in (".checkpoint.h5.abc.tmp", ".distilled.h5.abc.tmp", ".metrics.jsonl.abc.tmp", ".mine.tmp", "notes.txt"):
        (directory / name).write_text("")
    run(directory).run(progress=False)
    assert sorted(p.name for p in directory.iterdir()) == sorted([*FILES, ".mine.tmp", "notes.txt"])


KILLS = 200


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_two_hundred_times(tmp_path: Path, whole: Artifact) -> None:
    """kill -9 at random moments, a checkpoint after every step: each time the saved step has not gone back, and each
    run ends in the uninterrupted run's bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
    config = replace(SMALL, outer_steps=200)
    expected = run(tmp_path / "whole", config).run(progress=False)
    try:
        draw, kills, finished = random.Random(0), 0, 0
        while kills < KILLS:
            directory = tmp_path / f"run-{finished}"
            more, left = _kill_until_done(directory, config, draw)
            kills, finished = kills + more, finished + 1
            assert sorted(p.name for p in directory.iterdir()) == FILES
            assert same(read(directory / "distilled.h5"), expected)
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
