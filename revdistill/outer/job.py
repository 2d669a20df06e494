"""A long outer loop that is kept in a directory and that nobody needs to watch.

It logs each step, saves by time, stops when it is told to, outlives a full disk, and goes on to the same bits when it
is resumed.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from tqdm import tqdm

from revdistill.engine import RankError
from revdistill.outer.directory import METRICS, DirectoryInUseError, DirectoryLock, Log, resumed_log
from revdistill.outer.files import remove_leftovers
from revdistill.outer.ranks import ALONE, Processes, StoppedError
from revdistill.outer.tensorboard import FOLDER, Events, check_folder

# Ctrl-C; what a batch system sends before it kills; a terminal that was closed
_STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
R = TypeVar("R")
_COMPARED = 64  # outer steps between two comparisons of what several processes have


class InterruptedRunError(Exception):
    """The job was told to stop, by the signal `signum`; everything up to `outer_step` is saved."""

    def __init__(self, outer_step: int, signum: int) -> None:
        super().__init__(f"stopped after outer step {outer_step}")
        self.outer_step, self.signum = outer_step, signum


class NotSavedError(Exception):
    """The directory took no checkpoint at the end; the message says where the checkpoint is instead."""


class Job(ABC, Generic[R]):
    """An outer loop, its directory, and what it ends with: a result of type R. Distillation and tuning are one each.

    A subclass says what a step is, what a checkpoint holds, and how the result is made. It sets what these need before
    it calls `__init__`, which may restore a checkpoint.

    Args:
        directory: made where it does not exist.
        resume: go on with the job in the directory, which must have this one's configuration; otherwise the directory
            must hold none.
        save_every: seconds between checkpoints.
        processes: that make the steps together. Each has the whole job; the first alone keeps it in the directory,
            which the others read where it is resumed.
        tensorboard: whether each step's numbers also go to event files for TensorBoard, in `tensorboard` there.

    Raises:
        ValueError: the directory is not as it must be. Nothing is written before that is checked.
        ArtifactError: the checkpoint is damaged.
        ImportError: tensorboard is asked for, and cannot be imported.
    """

    noun: ClassVar[str]  # in messages
    stops_within_a_step: ClassVar[bool] = False  # at the first signal; what the step had done is lost
    verb: ClassVar[str]  # beside the progress bar
    checkpoint: ClassVar[str]  # the file's name
    results: ClassVar[tuple[str, ...]]  # the names of the files of the result, the main one first

    def __init__(
        self,
        directory: Path,
        *,
        resume: bool = False,
        save_every: float = 60.0,
        processes: Processes = ALONE,
        tensorboard: bool = False,
    ) -> None:
        if tensorboard:
            check_folder(directory / FOLDER)
        self.directory, self._save_every, self.processes = directory, save_every, processes
        self._tensorboard = tensorboard
        if resume:
            self.restore(directory / self.checkpoint)
        elif self.started_in(directory):
            article = "an" if self.noun[0] in "aeiou" else "a"
            raise ValueError(f"{directory} already holds {article} {self.noun}; give another directory, or resume it")
        elif (directory / METRICS).exists() and (directory / METRICS).stat().st_size:
            raise ValueError(f"{directory} already holds the {METRICS} of another job; give another directory")

    @classmethod
    def started_in(cls, directory: Path) -> bool:
        """Whether a job of this kind was started in the directory."""
        return any((directory / name).exists() for name in (cls.checkpoint, cls.results[0]))

    @property
    @abstractmethod
    def total(self) -> int:
        """How many outer steps there are."""

    @property
    @abstractmethod
    def outer_step(self) -> int:
        """How many of them are done."""

    @abstractmethod
    def step(self) -> tuple[dict[str, Any] | None, str]:
        """Make one more outer step.

        Returns:
            What to log of it, with its number as "step", or None; and what to show beside the progress bar.
        """

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write all that is needed to go on from here to the same bits. Raises OSError where that is impossible."""

    @abstractmethod
    def restore(self, path: Path) -> None:
        """Go to where `save` wrote this file.

        Raises:
            ValueError: there is no such file, or its configuration is another one.
            ArtifactError: it is damaged.
        """

    @abstractmethod
    def finish(self) -> R:
        """Make the result once all steps are done, write it to the directory (the first process does), and return
        it.
        """

    def numbers(self) -> dict[str, float]:
        """Of the last step, by name, for event files."""
        return {}

    def reached(self, result: R) -> dict[str, float]:
        """Of the result, likewise."""
        return {}

    def fingerprint(self) -> int:
        """Below 2^53, of what all processes have alike: it is compared now and then."""
        return 0

    def run(self, *, progress: bool | None = None) -> R:
        """Make all outer steps that are left, then the result.

        What cannot be written meanwhile (a full disk) is said on standard error (of event files once), and tried later.

        Args:
            progress: whether to show a bar on standard error; by default only where that is a terminal.

        Returns:
            The result, as `finish` wrote it.

        Raises:
            InterruptedRunError: after Ctrl-C and other signals to stop.
            DirectoryInUseError: another process runs in the directory.
            NotSavedError: the last checkpoint could not be written to the directory.
            OSError: nothing can be written at the start, or the result cannot be at the end.
            RankError: another process is gone, or has something else.
        """
        with DirectoryLock(self.directory) if self.processes.first else nullcontext() as lock:
            events = Events(self.directory / FOLDER, self.outer_step) if lock and self._tensorboard else None
            loop = _Loop(self, lock, self._save_every, events)
            try:
                with interruptible(loop.at_once) as interrupted:
                    loop.run(interrupted, progress)
                    result = self.finish()
                loop.add(self.reached(result))
                return result
            finally:
                loop.close()


class _Loop:
    """The steps. lock: of the process that writes; None in the others."""

    def __init__(
        self, job: Job[Any], lock: DirectoryLock | None, save_every: float, events: Events | None = None
    ) -> None:
        self._events, self._events_failed = events, False
        self._job, self._directory, self._lock, self._save_every = job, job.directory, lock, save_every
        self._processes = job.processes
        self._checkpoint = job.directory / job.checkpoint
        self._stepping = False
        self._logged = job.outer_step  # steps whose entries are in the log

    def at_once(self, first: bool) -> bool:
        """Whether a signal to stop, the first one or a later, is to interrupt what is being done."""
        job = self._job
        if self._processes.size == 1:
            return not first or (job.stops_within_a_step and self._stepping)
        # Together they stop where they meet, and the others wait there for a unit of work that one of them is in.
        return self._processes.computing and (not first or job.stops_within_a_step or self._processes.one_is_gone())

    def run(self, interrupted: Callable[[], int | None], progress: bool | None) -> None:
        job, total = self._job, self._job.total
        self._agree(None, look=True)  # nothing is written before all are here, and have the same
        log, before = self._started()
        saved = started = time.monotonic()
        disable = (None if progress is None else not progress) if self._lock else True
        with tqdm(
            total=total, initial=job.outer_step, disable=disable, unit="step", desc=job.verb, smoothing=0.05
        ) as bar:
            while job.outer_step < total:
                done = job.outer_step
                with self._saved_if_lost():
                    entry, shown = self._step(interrupted)
                    if entry is not None and log is not None:
                        self._append(log, entry | {"seconds": round(before + time.monotonic() - started, 1)})
                    if job.outer_step > done:
                        self.add(job.numbers(), done)
                    self._logged = job.outer_step
                    signum = self._agree(interrupted(), look=job.outer_step % _COMPARED == 0 or job.outer_step == total)
                bar.set_postfix_str(shown)
                bar.update(job.outer_step - done)
                last = signum is not None or job.outer_step == total
                if self._lock and (last or time.monotonic() - saved > self._save_every):
                    fine = self._written(lambda: job.save(self._checkpoint))
                    saved = time.monotonic()
                    if last and not fine:
                        self._rescue()
                if signum is not None and job.outer_step < total:
                    raise InterruptedRunError(job.outer_step, signum)

    def add(self, numbers: dict[str, float], step: int | None = None) -> None:
        """To the event file, where there is one; by default of the end."""
        events = self._events
        if events is not None:
            # At once, so before a checkpoint that has this step behind it: after a kill the step is not made again.
            events.put(self._job.total if step is None else step, numbers)
            self._events_failed = not self._written(events.flush, events.directory, said=self._events_failed)

    def close(self) -> None:
        """The event file is whole, or what it lacks is said."""
        events = self._events
        if events is not None and not self._written(events.close, said=True) and events.waiting is not None:
            tqdm.write(f"revdistill: {events.directory} lacks outer steps from {events.waiting} on", file=sys.stderr)

    def _started(self) -> tuple[Log | None, float]:
        """The log, and the seconds that its steps took; there is a checkpoint then."""
        if self._lock is None:
            return None, 0.0
        for name in (self._job.checkpoint, METRICS, *self._job.results):
            remove_leftovers(self._directory / name)
        found = resumed_log(self._directory / METRICS, self._job.outer_step)
        self._job.save(self._checkpoint)
        return found

    def _agree(self, signum: int | None, look: bool) -> int | None:
        """The signal that any process was told to stop by. look: whether all have the same."""
        job = self._job
        if self._processes.size == 1:
            return signum
        return self._processes.agree(signum, job.outer_step, job.fingerprint() if look else 0)

    @contextmanager
    def _saved_if_lost(self) -> Iterator[None]:
        """Where another process is gone meanwhile, what all had done is saved: steps that are complete, and logged."""
        try:
            yield
        except RankError as error:
            if not self._processes.lost or self._lock is None or self._job.outer_step != self._logged:
                raise
            if not self._written(lambda: self._job.save(self._checkpoint)):
                raise
            raise RankError(
                f"{error}; step {self._job.outer_step} of {self._job.total} is saved, --resume goes on from there",
                rank=error.rank,
            ) from error

    def _step(self, interrupted: Callable[[], int | None]) -> tuple[dict[str, Any] | None, str]:
        """The job's next step; nothing of it where a signal stopped it."""
        self._stepping = True
        try:
            return self._job.step()
        except StoppedError:
            return None, ""
        except KeyboardInterrupt:
            if not self._job.stops_within_a_step or interrupted() is None:
                raise
            return None, ""
        finally:
            self._stepping = False

    def _append(self, log: Log, entry: dict[str, Any]) -> None:
        self._written(lambda: log.append(entry))

    def _written(self, write: Callable[[], None], place: Path | None = None, said: bool = False) -> bool:
        """Whether it was written. If not, the job goes on (a disk full for a minute must not cost hours), and says so
        of `place`, by default the directory, unless that was `said`.
        """
        try:
            if self._lock is not None:
                self._lock.renew()
            write()
        except (OSError, DirectoryInUseError) as error:
            if not said:
                tqdm.write(
                    f"revdistill: {place or self._directory} took nothing ({error}); going on, and trying again later",
                    file=sys.stderr,
                )
            return False
        return True

    def _rescue(self) -> None:
        """Save the last checkpoint to a temporary directory, and raise NotSavedError, which names it."""
        failed = f"{self._directory} took no checkpoint of outer step {self._job.outer_step}"
        try:
            directory = Path(tempfile.mkdtemp(prefix="revdistill-"))
            self._job.save(directory / self._job.checkpoint)
        except OSError as error:
            raise NotSavedError(f"{failed}, nor did {tempfile.gettempdir()}: {error}") from error
        saved = directory / self._job.checkpoint
        raise NotSavedError(f"{failed}; it is {saved}: put it there and resume, or resume with --out {directory}")


@contextmanager
def interruptible(at_once: Callable[[bool], bool]) -> Iterator[Callable[[], int | None]]:
    """Turn the first signal to stop into its number, so that a step is finished and saved.

    Signals that are ignored stay ignored: that is how nohup lets a job outlive its terminal.

    Args:
        at_once: whether it is the first one -> whether a signal is to interrupt.
    """
    seen: int | None = None

    def note(signum: int, frame: Any) -> None:
        nonlocal seen
        first, seen = seen is None, signum if seen is None else seen
        if at_once(first):
            raise KeyboardInterrupt

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
