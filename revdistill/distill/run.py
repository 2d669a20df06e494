"""One distillation in one directory: distil, survive being killed, and evaluate at the end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from revdistill.distill import artifact as artifacts
from revdistill.distill import checkpoint as checkpoints
from revdistill.distill.distiller import Distiller, OuterStep
from revdistill.distill.evaluation import evaluate
from revdistill.outer.job import run_unattended

RESTARTS = 10


class Run:
    """One distillation and the directory that it is kept in.

    resume: go on with the run in the directory, which must have the distiller's configuration; otherwise the directory
    must not hold a run. save_every: seconds between checkpoints. Errors: ValueError where the directory is not as it
    must be; nothing is written before that is checked.
    """

    def __init__(
        self, directory: Path, distiller: Distiller, *, resume: bool = False, save_every: float = 60.0
    ) -> None:
        self.directory, self.distiller, self.config = directory, distiller, distiller.config
        self._save_every = save_every
        if resume:
            self._restore(directory / checkpoints.FILE_NAME)
        elif holds_run(directory):
            raise ValueError(f"{directory} already holds a run; give another directory, or resume it")

    def _restore(self, path: Path) -> None:
        if not path.exists():
            raise ValueError(f"{self.directory} holds no {path.name} to resume from")
        difference = checkpoints.describe_difference(self.config, checkpoints.read_config(path))
        if difference:
            raise ValueError(f"cannot resume {self.directory} with another configuration: {difference}")
        checkpoints.restore(path, self.distiller)

    def distil(self, *, progress: bool | None = None) -> artifacts.Artifact:
        """All outer steps that are left, then the evaluation; returns the artifact that was written.

        progress, errors: of `run_unattended`.
        """
        return run_unattended(
            self.directory, _Distillation(self.distiller), save_every=self._save_every, progress=progress
        )


class _Distillation:
    """The distiller as a Job."""

    verb, checkpoint, results = "distil", checkpoints.FILE_NAME, (artifacts.FILE_NAME,)

    def __init__(self, distiller: Distiller) -> None:
        self._distiller, self._accuracy, self.total = distiller, math.nan, distiller.config.outer_steps

    @property
    def outer_step(self) -> int:
        return self._distiller.outer_step

    def step(self) -> tuple[dict[str, Any] | None, str]:
        report = self._distiller.step()
        validated = self.outer_step % max(1, self.total // 10) == 0 or self.outer_step == self.total
        if validated:
            self._accuracy = self._distiller.validation_accuracy()
        logged = validated or report.step % max(1, self.total // 100) == 0 or report.diverged
        shown = f"loss {report.loss:.4f}" + (
            "" if math.isnan(self._accuracy) else f", held-out accuracy {self._accuracy:.1%}"
        )
        return _entry(report, self._accuracy if validated else None) if logged else None, shown

    def save(self, path: Path) -> None:
        checkpoints.save(path, self._distiller)

    def finish(self, directory: Path) -> artifacts.Artifact:
        result, device = self._distiller.artifact(), self._distiller.config.device
        found = {
            name: evaluate(result, self._distiller.data, name, restarts=RESTARTS, device=device).to_dict()
            for name in result.architectures
        }
        result = replace(result, evaluation=found)
        artifacts.write(directory / artifacts.FILE_NAME, result)
        return result


def holds_run(directory: Path) -> bool:
    """Whether a run was started in the directory."""
    return any((directory / name).exists() for name in (checkpoints.FILE_NAME, artifacts.FILE_NAME))


def _entry(report: OuterStep, accuracy: float | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": report.step, "loss": report.loss, "hypergradient_norm": report.norm}
    if accuracy is not None:
        entry["held_out_accuracy"] = accuracy
    if report.diverged:
        entry["diverged"] = report.diverged
    return entry
