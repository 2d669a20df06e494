"""A job's directory while the job runs: one process at a time works in it, and its log outlives a full disk."""

from __future__ import annotations

import json
import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from revdistill.engine import ArtifactError
from revdistill.outer.files import replacing

MAX_METRICS = 64 * 2**20  # bytes; a run of 10^5 outer steps that all diverge writes half of it
MAX_STEP = 2**53  # no run gets there; a file from somebody else may say so
LOCK, METRICS = "run.lock", "metrics.jsonl"


class DirectoryInUseError(Exception):
    """Another process is running in the directory."""


def check_writable(directory: Path) -> None:
    """Try whether files can be kept in the directory; in the end everything is as it was before.

    Raises:
        OSError: the directory cannot be made, or no file in it.
    """
    made: list[Path] = []
    try:
        for path in reversed([p for p in (directory, *directory.parents) if not p.exists()]):
            path.mkdir()
            made.append(path)
        with tempfile.TemporaryFile(dir=directory):
            pass
    finally:
        for path in reversed(made):
            with suppress(OSError):  # somebody else has put something there meanwhile
                path.rmdir()


class DirectoryLock:
    """A context manager: within it no other process can lock the directory.

    The directory is made where it does not exist. The lock of a process that is gone is released by the system.

    Args:
        directory: to lock.

    Raises:
        DirectoryInUseError: another process, which the message names, has locked it.
        OSError: the directory cannot be written to, or its disk has no locks.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._path = directory, directory / LOCK
        self._file: TextIO | None = None

    def __enter__(self) -> DirectoryLock:
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._is_held():
                # before unlocking, so that whoever has opened the file sees that it is gone
                self._path.unlink(missing_ok=True)
        except OSError:
            pass  # a file that is left without a lock on it locks nothing
        finally:
            self._close()

    def renew(self) -> None:
        """Make and lock the directory again where somebody has removed it, or the lock in it.

        Raises:
            DirectoryInUseError, OSError: as when it was first locked.
        """
        if not self._is_held():
            self._close()
            self._take()

    def _take(self) -> None:
        import fcntl  # not on every system; only a run needs it

        self._directory.mkdir(parents=True, exist_ok=True)
        while not self._is_held():  # the process that had the lock may remove the file after we opened it
            self._close()
            file = self._file = self._path.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                process = file.read().strip() or "unknown"
                self._close()
                raise DirectoryInUseError(f"{self._directory} is in use by another run (process {process})") from None
            except OSError as error:
                self._close()
                raise OSError(
                    error.errno, f"cannot lock {self._path}: {error.strerror}; another --out may be on a disk that can"
                ) from error
        assert self._file is not None
        number = self._file.fileno()  # past the buffer: on a full disk it would keep what it cannot write, to the end
        os.ftruncate(number, 0)
        os.write(number, str(os.getpid()).encode())

    def _is_held(self) -> bool:
        if self._file is None:
            return False
        try:
            there = self._path.stat()
        except OSError:
            return False
        ours = os.fstat(self._file.fileno())
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Log:
    """A file with one JSON object a line. A line that could not be written whole does not spoil the next one.

    JSON has no NaN and no infinity: they are written as null.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._torn = path, False

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            OSError: it could not be written. What is there of it is left out by `read_metrics`.
        """
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in entry.items()
        }
        torn, self._torn = self._torn, True
        with self._path.open("a") as file:
            file.write("\n" * torn + json.dumps(line) + "\n")
        self._torn = False


def resumed_log(path: Path, outer_step: int) -> tuple[Log, float]:
    """Rewrite the log of a job that is resumed, without the steps that will be made again.

    Args:
        path: the log.
        outer_step: how many steps the checkpoint has behind it; lines of later ones are deleted.

    Returns:
        The log, and the seconds that the kept steps took.
    """
    kept = [line for line in read_metrics(path) if line["step"] < outer_step]
    taken = [line.get("seconds") for line in kept]
    with replacing(path) as temporary:
        log = Log(temporary)
        for line in kept:
            log.append(line)
    return Log(path), max((float(t) for t in taken if isinstance(t, int | float) and 0 <= t < MAX_STEP), default=0.0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The log's entries, without lines that a kill or a full disk has cut short.

    Raises:
        ArtifactError: the file is too large, or cannot be read.
    """
    lines = []
    try:
        if path.stat().st_size > MAX_METRICS:
            raise ArtifactError(f"{path}: has {path.stat().st_size} bytes; at most {MAX_METRICS} are read")
        text = path.read_text()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int and 0 <= entry["step"] < MAX_STEP:
            lines.append(entry)
    return lines
