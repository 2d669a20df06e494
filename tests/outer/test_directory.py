"""A job's directory: its lock, and its log that outlives kills, full disks and strangers."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import revdistill as rd
from revdistill.outer import directory as directories
from revdistill.outer.directory import (
    LOCK,
    METRICS,
    DirectoryInUseError,
    DirectoryLock,
    Log,
    check_writable,
    read_metrics,
    resumed_log,
)


def test_metrics_cut_short_by_a_kill_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.5}\n[1]\n{"step": 1, "lo')
    assert read_metrics(path) == [{"step": 0, "loss": 1.5}]
    assert read_metrics(tmp_path / "none") == []


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


def test_a_log_too_large_to_be_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "MAX_METRICS", 1000)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' * 100)
    with pytest.raises(rd.ArtifactError, match=r"metrics.jsonl: has 1200 bytes; at most 1000 are read"):
        read_metrics(path)


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


def test_whether_a_directory_can_be_written_to_is_tried_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "a/b/c")
    check_writable(tmp_path / "there")
    for place in (tmp_path / "file/run", tmp_path / "file"):
        with pytest.raises(NotADirectoryError):
            check_writable(place)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "there"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files as Linux does")
def test_a_lock_on_a_full_disk_keeps_nothing_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the file that nobody closed tried again in the end, which Python 3.13 reports with a traceback."""
    import resource

    files = []
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda *args: files.append(opened(*args)) or files[-1])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            DirectoryLock(tmp_path).__enter__()
        (file,) = files
        file.flush()  # nothing is left to be written
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.close()
