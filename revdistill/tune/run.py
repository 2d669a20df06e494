"""One tuning in one directory: learn, survive being killed, and compare at the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import revdistill
from revdistill.distill.checkpoint import read_tensors, restore_adam, write_adam
from revdistill.outer.hdf5 import reading, writing
from revdistill.outer.job import run_unattended
from revdistill.tune import schedule as schedules
from revdistill.tune.comparison import train
from revdistill.tune.config import TuneConfig
from revdistill.tune.schedule import Schedule
from revdistill.tune.tuner import Tuner, TuneStep

CHECKPOINT = "tuning.h5"
FORMAT_VERSION = 1
RESTARTS = 10


def holds_tuning(directory: Path) -> bool:
    """Whether a tuning was started in the directory."""
    return any((directory / name).exists() for name in (CHECKPOINT, schedules.FILE_NAME))


class Tuning:
    """One tuning and the directory that it is kept in.

    resume: go on with the tuning in the directory; otherwise it must hold none. save_every: seconds between
    checkpoints.
    Errors: ValueError where the directory is not as it must be; nothing is written before that is checked.
    """

    def __init__(self, directory: Path, tuner: Tuner, *, resume: bool = False, save_every: float = 60.0) -> None:
        self.directory, self.tuner, self._save_every = directory, tuner, save_every
        if resume:
            restore(directory / CHECKPOINT, tuner)
        elif holds_tuning(directory):
            raise ValueError(f"{directory} already holds a tuning; give another directory, or resume it")

    def tune(self, *, progress: bool | None = None) -> Schedule:
        """All outer steps that are left, then the comparison; returns the schedule that was written to schedule.h5 and
        .json.

        progress, errors: of `run_unattended`.
        """
        return run_unattended(self.directory, _Job(self.tuner), save_every=self._save_every, progress=progress)


class _Job:
    """The tuner as a Job."""

    verb, checkpoint, results = "tune", CHECKPOINT, (schedules.FILE_NAME, schedules.JSON_NAME)

    def __init__(self, tuner: Tuner) -> None:
        self._tuner, self.total = tuner, tuner.config.outer_steps

    @property
    def outer_step(self) -> int:
        return self._tuner.outer_step

    def step(self) -> tuple[dict[str, Any], str]:
        report = self._tuner.step()
        exploding = "" if report.explosion is None else f", hypergradient explodes from step {report.explosion} down"
        return _entry(report), f"held-out loss {report.loss:.4f}{exploding}"

    def save(self, path: Path) -> None:
        save(path, self._tuner)

    def finish(self, directory: Path) -> Schedule:
        result = compared(self._tuner)
        schedules.write(directory, result)
        return result


def compared(tuner: Tuner) -> Schedule:
    """The schedule, with what fresh networks reach with it and with the starting one, on the test data."""
    c, schedule = tuner.config, tuner.schedule()
    found = {
        name: train(s, tuner.data, c.arch, batch_size=c.batch_size, restarts=RESTARTS, seed=c.seed).to_dict()
        for name, s in (("start", tuner.starting_schedule()), ("learned", schedule))
    }
    return replace(schedule, comparison=found)


def save(path: Path, tuner: Tuner) -> None:
    """Write the file whole, or leave what was there."""
    with writing(path) as file:
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["revdistill_version"] = revdistill.__version__
        file.attrs["config"] = json.dumps(tuner.config.to_dict())
        file.attrs["outer_step"] = tuner.outer_step
        write_adam(file, tuner.leaves, tuner.optimizer)


def read_config(path: Path) -> TuneConfig:
    """The configuration of the tuning that wrote the checkpoint. Errors: ValueError, ArtifactError."""
    if not path.exists():
        raise ValueError(f"{path.parent} holds no {path.name} to resume from")
    with reading(path) as file:
        file.check_version(FORMAT_VERSION)
        try:
            return TuneConfig.from_dict(file.json("config", dict))
        except (TypeError, ValueError) as error:
            raise file.fail(f"attribute 'config' is not a configuration of this release ({error})") from error


def restore(path: Path, tuner: Tuner) -> None:
    """Put a tuner of the same configuration where `save` was called. Errors: ValueError, ArtifactError."""
    if read_config(path) != tuner.config:
        raise ValueError(f"cannot resume {path.parent} with another configuration")
    with reading(path) as file:
        outer_step, adam_step = file.integer("outer_step"), file.integer("adam_step")
        if not 0 <= adam_step <= outer_step <= tuner.config.outer_steps:
            raise file.fail(
                f"attributes outer_step {outer_step} and adam_step {adam_step} do not go with its configuration"
            )
        tensors = read_tensors(file, tuner.leaves)
    restore_adam(tuner.leaves, tuner.optimizer, tensors, adam_step)
    tuner.outer_step = outer_step


def _entry(report: TuneStep) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": report.step, "loss": report.loss, "hypergradient_norm": report.norm}
    entry["longest_theta_bar"] = report.longest
    if report.explosion is not None:
        entry["explodes_at"] = report.explosion
    if report.diverged:
        entry["diverged"] = report.diverged
    return entry
