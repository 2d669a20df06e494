"""One run in one directory: distil, log, save, survive being killed, and evaluate at the end."""

from __future__ import annotations

import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from revdistill.distill import artifact as artifacts
from revdistill.distill import checkpoint as checkpoints
from revdistill.distill.directory import METRICS, Claim, DirectoryInUseError, read_metrics, resumed_log
from revdistill.distill.distiller import Distiller, OuterStep
from revdistill.distill.evaluation import evaluate
from revdistill.distill.files import remove_leftovers

RESTARTS = 10
# Ctrl-C; what a batch system sends before it kills; a terminal that was closed
_STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class InterruptedRunError(Exception):
    """The run was told to stop, by the signal `signum`; everything up to `outer_step` is saved."""

    def __init__(self, outer_step: int, signum: int) -> None:
        super().__init__(f"stopped after outer step {outer_step}")
        self.outer_step, self.signum = outer_step, signum


class NotSavedError(Exception):
    """The run's directory took no checkpoint at the end; the message says where the checkpoint is instead."""


class Run:
    """One distillation and the directory that it is kept in.

    resume: go on with the run in the directory, which must have the distiller's configuration; otherwise the directory must not
    hold a run. save_every: seconds between checkpoints. Errors: ValueError where the directory is not as it must be; nothing
    is written before that is checked.
    """

    def __init__(self, directory: Path, distiller: Distiller, *, resume: bool = False, save_every: float = 60.0) -> None:
        self.directory, self.distiller, self.config = directory, distiller, distiller.config
        self._save_every = save_every
        self._checkpoint = directory / checkpoints.FILE_NAME
        if resume:
            self._check_resumable()
            checkpoints.restore(self._checkpoint, self.distiller)
        elif holds_run(directory):
            raise ValueError(f"{directory} already holds a run; give another directory, or resume it")

    def _check_resumable(self) -> None:
        if not self._checkpoint.exists():
            raise ValueError(f"{self.directory} holds no {checkpoints.FILE_NAME} to resume from")
        difference = checkpoints.describe_difference(self.config, checkpoints.read_config(self._checkpoint))
        if difference:
            raise ValueError(f"cannot resume {self.directory} with another configuration: {difference}")

    def distil(self, *, progress: bool | None = None) -> artifacts.Artifact:
        """All outer steps that are left, then the evaluation; returns the artifact that was written.

        progress: a bar on standard error; by default only where that is a terminal. A checkpoint that cannot be written (a
        full disk) is reported there, and tried again at the next one. Errors: InterruptedRunError after Ctrl-C and other
        signals to stop, DirectoryInUseError, NotSavedError, OSError where nothing can be written at the start.
        """
        with Claim(self.directory) as claim, interruptible() as interrupted:
            for path in (self._checkpoint, self.directory / artifacts.FILE_NAME, self.directory / METRICS):
                remove_leftovers(path)
            self._distil(claim, interrupted, progress)
            result = self._evaluated()
            artifacts.write(self.directory / artifacts.FILE_NAME, result)
        return result

    def _distil(self, claim: Claim, interrupted: Callable[[], int | None], progress: bool | None) -> None:
        distiller, total = self.distiller, self.config.outer_steps
        log_every = max(1, total // 100)
        validate_every = max(1, total // 10)
        saved = started = time.monotonic()
        metrics = resumed_log(self.directory / METRICS, distiller.outer_step)
        before = _seconds_of(read_metrics(self.directory / METRICS), distiller.outer_step)
        disable = None if progress is None else not progress
        checkpoints.save(self._checkpoint, distiller)
        with tqdm(total=total, initial=distiller.outer_step, disable=disable, unit="step", desc="distil", smoothing=0.05) as bar:
            accuracy = math.nan
            while distiller.outer_step < total:
                report = distiller.step()
                done = distiller.outer_step
                validated = done % validate_every == 0 or done == total
                if validated:
                    accuracy = distiller.validation_accuracy()
                if validated or report.step % log_every == 0 or report.diverged:
                    entry = _entry(report, accuracy if validated else None, before + time.monotonic() - started)
                    self._written(claim, lambda entry=entry: metrics.append(entry))  # type: ignore[misc]
                bar.set_postfix_str(
                    f"loss {report.loss:.4f}" + ("" if math.isnan(accuracy) else f", held-out accuracy {accuracy:.1%}")
                )
                bar.update()
                signum = interrupted()
                last = signum is not None or done == total
                if last or time.monotonic() - saved > self._save_every:
                    fine = self._written(claim, lambda: checkpoints.save(self._checkpoint, distiller))
                    saved = time.monotonic()
                    if last and not fine:
                        self._rescue()
                if signum is not None and done < total:
                    raise InterruptedRunError(done, signum)

    def _written(self, claim: Claim, write: Callable[[], None]) -> bool:
        """Whether it could be: the run goes on all the same, so that hours are not lost to a disk that is full for a minute."""
        try:
            claim.renew()
            write()
        except (OSError, DirectoryInUseError) as error:
            tqdm.write(f"revdistill: {self.directory} took nothing ({error}); going on, and trying again later", file=sys.stderr)
            return False
        return True

    def _rescue(self) -> None:
        """The last checkpoint, elsewhere."""
        failed = f"{self.directory} took no checkpoint of outer step {self.distiller.outer_step}"
        try:
            directory = Path(tempfile.mkdtemp(prefix="revdistill-"))
            checkpoints.save(directory / checkpoints.FILE_NAME, self.distiller)
        except OSError as error:
            raise NotSavedError(f"{failed}, nor did {tempfile.gettempdir()}: {error}") from error
        saved = directory / checkpoints.FILE_NAME
        raise NotSavedError(f"{failed}; it is {saved}: put it there and resume, or resume with --out {directory}")

    def _evaluated(self) -> artifacts.Artifact:
        result = self.distiller.artifact()
        found = {
            name: evaluate(result, self.distiller.data, name, restarts=RESTARTS, device=self.config.device).to_dict()
            for name in self.config.architectures
        }
        return replace(result, evaluation=found)


def holds_run(directory: Path) -> bool:
    """Whether a run was started in the directory."""
    return any((directory / name).exists() for name in (checkpoints.FILE_NAME, artifacts.FILE_NAME))


def _seconds_of(metrics: list[dict[str, Any]], outer_step: int) -> float:
    """What the run had taken when it was at `outer_step`."""
    return max((float(line.get("seconds", 0)) for line in metrics if line["step"] < outer_step), default=0.0)


def _entry(report: OuterStep, accuracy: float | None, seconds: float) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": report.step, "loss": _finite(report.loss), "hypergradient_norm": _finite(report.norm)}
    entry["seconds"] = round(seconds, 1)
    if accuracy is not None:
        entry["held_out_accuracy"] = _finite(accuracy)
    if report.diverged:
        entry["diverged"] = report.diverged
    return entry


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


@contextmanager
def interruptible() -> Iterator[Callable[[], int | None]]:
    """Turn the first signal to stop into its number, so that a step is finished and saved; a second one interrupts at once.

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
