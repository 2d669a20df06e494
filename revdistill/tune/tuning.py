"""One tuning in one directory: learn, survive being killed, and compare at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from revdistill.outer.job import Job
from revdistill.outer.tensorboard import numbers_of
from revdistill.tune import checkpoint as checkpoints
from revdistill.tune import schedule as schedules
from revdistill.tune.comparison import measure_all
from revdistill.tune.schedule import Schedule
from revdistill.tune.tuner import Tuner, TuneStep

RESTARTS = 10


class Tuning(Job[Schedule]):
    """A tuner's outer steps, then the comparison; the result is the schedule, with its comparison.

    Args:
        directory: see Job.
        tuner: what makes the steps.
        resume: see Job.
        save_every: see Job.
        tensorboard: see Job.
    """

    noun, verb = "tuning", "tune"
    checkpoint, results = checkpoints.FILE_NAME, (schedules.FILE_NAME, schedules.JSON_NAME)

    def __init__(
        self,
        directory: Path,
        tuner: Tuner,
        *,
        resume: bool = False,
        save_every: float = 60.0,
        tensorboard: bool = False,
    ) -> None:
        self.tuner = tuner
        self._entry: dict[str, Any] = {}
        super().__init__(
            directory, resume=resume, save_every=save_every, processes=tuner.processes, tensorboard=tensorboard
        )

    @property
    def total(self) -> int:
        return self.tuner.config.outer_steps

    @property
    def outer_step(self) -> int:
        return self.tuner.outer_step

    def step(self) -> tuple[dict[str, Any], str]:
        report = self.tuner.step()
        exploding = "" if report.explosion is None else f", hypergradient explodes from step {report.explosion} down"
        self._entry = _entry(report)
        return self._entry, f"held-out loss {report.loss:.4f}{exploding}"

    def numbers(self) -> dict[str, float]:
        return numbers_of(self._entry)

    def reached(self, result: Schedule) -> dict[str, float]:
        return {f"test_accuracy/{name}": found["accuracy"] for name, found in result.comparison.items()}

    def save(self, path: Path) -> None:
        checkpoints.save(path, self.tuner)

    def restore(self, path: Path) -> None:
        checkpoints.restore(path, self.tuner)

    def fingerprint(self) -> int:
        return self.tuner.descent.fingerprint()

    def finish(self) -> Schedule:
        result = compared(self.tuner)
        if self.processes.first:
            schedules.write(self.directory, result)
        return result


def compared(tuner: Tuner) -> Schedule:
    """The learned schedule, with what fresh networks reach on the test data with it and with the starting one."""
    c, schedule = tuner.config, tuner.schedule()
    found = measure_all(
        [tuner.starting_schedule(), schedule],
        tuner.data,
        c.arch,
        batch_size=c.batch_size,
        restarts=RESTARTS,
        seed=c.seed,
        side_by_side=c.side_by_side,
        processes=tuner.processes,
    )
    named = zip(("start", "learned"), found, strict=True)
    return replace(schedule, comparison={name: trained.to_dict() for name, trained in named})


def _entry(report: TuneStep) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": report.step, "loss": report.loss, "hypergradient_norm": report.norm}
    entry["longest_theta_bar"] = report.longest
    if report.explosion is not None:
        entry["explodes_at"] = report.explosion
    if report.diverged:
        entry["diverged"] = report.diverged
    return entry
