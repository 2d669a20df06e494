"""A long loop in a directory that nobody watches: it logs, saves by time, stops when it is told to, and outlives a full
disk.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from revdistill.outer.directory import METRICS, Claim, DirectoryInUseError, Log, resumed_log
from revdistill.outer.files import remove_leftovers

# Ctrl-C; what a batch system sends before it kills; a terminal that was closed
_STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class Job(Protocol[R_co]):
    """verb: beside the bar. total: how many outer steps there are. checkpoint, results: the names of the files that it
    writes.
    """

    total: int

    @property
    def verb(self) -> str: ...
    @property
    def checkpoint(self) -> str: ...
    @property
    def results(self) -> tuple[str, ...]: ...
    @property
    def outer_step(self) -> int:
        """How many are done."""

    def step(self) -> tuple[dict[str, Any] | None, str]:
        """One more; what to log of it, with its number as "step", or None, and what to show beside the bar."""

    def save(self, path: Path) -> None:
        """All that is needed to go on from here to the same bits."""

    def finish(self, directory: Path) -> R_co:
        """When all are done: the results, written and returned."""


class InterruptedRunError(Exception):
    """The run was told to stop, by the signal `signum`; everything up to `outer_step` is saved."""

    def __init__(self, outer_step: int, signum: int) -> None:
        super().__init__(f"stopped after outer step {outer_step}")
        self.outer_step, self.signum = outer_step, signum


class NotSavedError(Exception):
    """The run's directory took no checkpoint at the end; the message says where the checkpoint is instead."""


def run_unattended(directory: Path, job: Job[R], *, save_every: float = 60.0, progress: bool | None = None) -> R:
    """All outer steps that are left, then the job's results.

    save_every: seconds between checkpoints. progress: a bar on standard error; by default only where that is a
    terminal. What cannot be written (a full disk) is reported there, and a checkpoint tried again later. Errors:
    InterruptedRunError after Ctrl-C and other signals to stop, DirectoryInUseError, NotSavedError, OSError where
    nothing can be written at the start or the results cannot be at the end.
    """
    with Claim(directory) as claim, interruptible() as interrupted:
        for name in (job.checkpoint, METRICS, *job.results):
            remove_leftovers(directory / name)
        _Loop(directory, job, claim, save_every).run(interrupted, progress)
        return job.finish(directory)


class _Loop:
    def __init__(self, directory: Path, job: Job[Any], claim: Claim, save_every: float) -> None:
        self._directory, self._job, self._claim, self._save_every = directory, job, claim, save_every
        self._checkpoint = directory / job.checkpoint

    def run(self, interrupted: Callable[[], int | None], progress: bool | None) -> None:
        job, total = self._job, self._job.total
        log, before = resumed_log(self._directory / METRICS, job.outer_step)
        saved = started = time.monotonic()
        job.save(self._checkpoint)
        disable = None if progress is None else not progress
        with tqdm(
            total=total, initial=job.outer_step, disable=disable, unit="step", desc=job.verb, smoothing=0.05
        ) as bar:
            while job.outer_step < total:
                entry, shown = job.step()
                if entry is not None:
                    self._append(log, entry | {"seconds": round(before + time.monotonic() - started, 1)})
                bar.set_postfix_str(shown)
                bar.update()
                signum = interrupted()
                last = signum is not None or job.outer_step == total
                if last or time.monotonic() - saved > self._save_every:
                    fine = self._written(lambda: job.save(self._checkpoint))
                    saved = time.monotonic()
                    if last and not fine:
                        self._rescue()
                if signum is not None and job.outer_step < total:
                    raise InterruptedRunError(job.outer_step, signum)

    def _append(self, log: Log, entry: dict[str, Any]) -> None:
        self._written(lambda: log.append(entry))

    def _written(self, write: Callable[[], None]) -> bool:
        """Whether it could be: the run goes on all the same, so that hours are not lost to a disk that is full for a
        minute.
        """
        try:
            self._claim.renew()
            write()
        except (OSError, DirectoryInUseError) as error:
            tqdm.write(
                f"revdistill: {self._directory} took nothing ({error}); going on, and trying again later",
                file=sys.stderr,
            )
            return False
        return True

    def _rescue(self) -> None:
        """The last checkpoint, elsewhere."""
        failed = f"{self._directory} took no checkpoint of outer step {self._job.outer_step}"
        try:
            directory = Path(tempfile.mkdtemp(prefix="revdistill-"))
            self._job.save(directory / self._job.checkpoint)
        except OSError as error:
            raise NotSavedError(f"{failed}, nor did {tempfile.gettempdir()}: {error}") from error
        saved = directory / self._job.checkpoint
        raise NotSavedError(f"{failed}; it is {saved}: put it there and resume, or resume with --out {directory}")


@contextmanager
def interruptible() -> Iterator[Callable[[], int | None]]:
    """Turn the first signal to stop into its number, so that a step is finished and saved; a second one interrupts at
    once.

    Signals that are ignored stay so: nohup has a run outlive its terminal that way.
    """
    seen: int | None = None

    def note(signum: int, frame: Any) -> None:
        nonlocal seen
        if seen is not None:
            raise KeyboardInterrupt
        seen = signum

    before: dict[int, Any] = {}
    try:
        for signum in _STOPPING:
            if signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, note)
    except ValueError:  # not in the main thread: whoever runs us handles signals
        yield lambda: None
        return
    try:
        yield lambda: seen
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
