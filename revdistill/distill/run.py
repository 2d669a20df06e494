"""One run in one directory: distil, log, save, survive being killed, and evaluate at the end."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from revdistill.distill import artifact as artifacts
from revdistill.distill import checkpoint as checkpoints
from revdistill.distill.distiller import Distiller, OuterStep
from revdistill.distill.evaluation import evaluate
from revdistill.distill.files import replacing
from revdistill.engine import ArtifactError

METRICS = "metrics.jsonl"
LOCK = "run.lock"
RESTARTS = 10


class InterruptedRunError(Exception):
    """The user stopped the run; everything up to `outer_step` is saved."""

    def __init__(self, outer_step: int) -> None:
        super().__init__(f"stopped after outer step {outer_step}")
        self.outer_step = outer_step


class DirectoryInUseError(Exception):
    """Another process is running in the directory."""


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

        progress: a bar on standard error; by default only where that is a terminal. Errors: InterruptedRunError after Ctrl-C,
        DirectoryInUseError.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with _locked(self.directory / LOCK), _interruptible() as interrupted:
            self._distil(interrupted, progress)
            result = self._evaluated()
            artifacts.write(self.directory / artifacts.FILE_NAME, result)
        return result

    def _distil(self, interrupted: Callable[[], bool], progress: bool | None) -> None:
        distiller, total = self.distiller, self.config.outer_steps
        log_every = max(1, total // 100)
        validate_every = max(1, total // 10)
        saved = started = time.monotonic()
        before = _seconds_of(read_metrics(self.directory / METRICS), distiller.outer_step)
        disable = None if progress is None else not progress
        with (
            self._metrics() as metrics,
            tqdm(total=total, initial=distiller.outer_step, disable=disable, unit="step", desc="distil", smoothing=0.05) as bar,
        ):
            checkpoints.save(self._checkpoint, distiller)
            accuracy = math.nan
            while distiller.outer_step < total:
                report = distiller.step()
                done = distiller.outer_step
                validated = done % validate_every == 0 or done == total
                if validated:
                    accuracy = distiller.validation_accuracy()
                if validated or report.step % log_every == 0 or report.diverged:
                    _log(metrics, report, accuracy if validated else None, before + time.monotonic() - started)
                bar.set_postfix_str(
                    f"loss {report.loss:.4f}" + ("" if math.isnan(accuracy) else f", held-out accuracy {accuracy:.1%}")
                )
                bar.update()
                if interrupted() or time.monotonic() - saved > self._save_every or done == total:
                    checkpoints.save(self._checkpoint, distiller)
                    saved = time.monotonic()
                if interrupted() and done < total:
                    raise InterruptedRunError(done)

    def _evaluated(self) -> artifacts.Artifact:
        result = self.distiller.artifact()
        found = {
            name: evaluate(result, self.distiller.data, name, restarts=RESTARTS, device=self.config.device).to_dict()
            for name in self.config.architectures
        }
        return replace(result, evaluation=found)

    @contextmanager
    def _metrics(self) -> Iterator[TextIO]:
        """metrics.jsonl, without the lines of steps that the checkpoint does not have behind it."""
        path = self.directory / METRICS
        kept = [line for line in read_metrics(path) if line["step"] < self.distiller.outer_step]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        with path.open("a") as file:
            yield file


def holds_run(directory: Path) -> bool:
    """Whether a run was started in the directory."""
    return any((directory / name).exists() for name in (checkpoints.FILE_NAME, artifacts.FILE_NAME))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut short by a kill is left out."""
    lines = []
    try:
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
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            lines.append(entry)
    return lines


def _seconds_of(metrics: list[dict[str, Any]], outer_step: int) -> float:
    """What the run had taken when it was at `outer_step`."""
    return max((float(line.get("seconds", 0)) for line in metrics if line["step"] < outer_step), default=0.0)


def _log(file: TextIO, report: OuterStep, accuracy: float | None, seconds: float) -> None:
    entry: dict[str, Any] = {"step": report.step, "loss": _finite(report.loss), "hypergradient_norm": _finite(report.norm)}
    entry["seconds"] = round(seconds, 1)
    if accuracy is not None:
        entry["held_out_accuracy"] = _finite(accuracy)
    if report.diverged:
        entry["diverged"] = report.diverged
    file.write(json.dumps(entry) + "\n")
    file.flush()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that a step is finished and saved; a second one interrupts at once."""
    seen = False

    def note(signum: int, frame: Any) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread: whoever runs us handles Ctrl-C
        yield lambda: False
        return
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One run at a time in a directory. The lock of a process that is gone does not count."""
    import fcntl

    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise DirectoryInUseError(
                f"{path.parent} is in use by another run (process {file.read().strip() or 'unknown'})"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
