"""One distillation in one directory: distil, survive being killed, and evaluate at the end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from revdistill.distill import artifact as artifacts
from revdistill.distill import checkpoint as checkpoints
from revdistill.distill.distiller import Distiller, OuterStep
from revdistill.distill.evaluation import evaluate_all
from revdistill.outer.job import Job
from revdistill.outer.tensorboard import numbers_of

RESTARTS = 10


class Distillation(Job[artifacts.Artifact]):
    """A distiller's outer steps, then the evaluation; the result is the artifact, with its evaluation.

    Args:
        directory: see Job.
        distiller: what makes the steps.
        resume: see Job.
        save_every: see Job.
        tensorboard: see Job.
    """

    noun, verb = "run", "distil"
    checkpoint, results = checkpoints.FILE_NAME, (artifacts.FILE_NAME,)

    def __init__(
        self,
        directory: Path,
        distiller: Distiller,
        *,
        resume: bool = False,
        save_every: float = 60.0,
        tensorboard: bool = False,
    ) -> None:
        self.distiller, self._accuracy = distiller, math.nan
        self._entry: dict[str, Any] = {}
        super().__init__(
            directory,
            resume=resume,
            save_every=save_every,
            processes=distiller.processes,
            tensorboard=tensorboard,
        )

    @property
    def total(self) -> int:
        return self.distiller.config.outer_steps

    @property
    def outer_step(self) -> int:
        return self.distiller.outer_step

    def step(self) -> tuple[dict[str, Any] | None, str]:
        report = self.distiller.step()
        validated = self.outer_step % max(1, self.total // 10) == 0 or self.outer_step == self.total
        if validated:
            self._accuracy = self.distiller.validation_accuracy()
        logged = validated or report.step % max(1, self.total // 100) == 0 or report.diverged
        shown = f"loss {report.loss:.4f}" + (
            "" if math.isnan(self._accuracy) else f", held-out accuracy {self._accuracy:.1%}"
        )
        self._entry = _entry(report, self._accuracy if validated else None)
        return self._entry if logged else None, shown

    def numbers(self) -> dict[str, float]:
        return numbers_of(self._entry)

    def reached(self, result: artifacts.Artifact) -> dict[str, float]:
        return {f"test_accuracy/{name}": found["mean"] for name, found in result.evaluation.items()}

    def save(self, path: Path) -> None:
        checkpoints.save(path, self.distiller)

    def restore(self, path: Path) -> None:
        checkpoints.restore(path, self.distiller)

    def fingerprint(self) -> int:
        return self.distiller.descent.fingerprint()

    def finish(self) -> artifacts.Artifact:
        result, config = self.distiller.artifact(), self.distiller.config
        evaluations = evaluate_all(
            result,
            self.distiller.given,
            result.architectures,
            restarts=RESTARTS,
            device=config.device,
            side_by_side=config.side_by_side,
            processes=self.processes,
        )
        result = replace(result, evaluation={name: found.to_dict() for name, found in evaluations.items()})
        if self.processes.first:
            artifacts.write(self.directory / artifacts.FILE_NAME, result)
        return result


def _entry(report: OuterStep, accuracy: float | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": report.step, "loss": report.loss, "hypergradient_norm": report.norm}
    if accuracy is not None:
        entry["held_out_accuracy"] = accuracy
    if report.diverged:
        entry["diverged"] = report.diverged
    return entry
