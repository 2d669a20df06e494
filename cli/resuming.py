"""What `train`, `tune` and `attribute` share: a run that was stopped, and one that is resumed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from revdistill.outer.directory import DirectoryInUseError
from revdistill.outer.image_files import FROM_FILES
from revdistill.outer.job import InterruptedRunError, Job

from .errors import UserError
from .processes import processes_of


def given(ctx: click.Context, name: str) -> bool:
    """Whether the user gave this option."""
    return ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)


def check_agrees(ctx: click.Context, noun: str, out: Path, saved: Any, values: dict[str, Any]) -> None:
    """ValueError where an option given now is not what the run (or tuning: `noun`) in `out` has."""
    for name, value in values.items():
        before = getattr(saved, name)
        if given(ctx, name) and value != before:
            flag = "--arch" if name == "architectures" else "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} is {_plain(value)}, but the {noun} in {out} has {_plain(before)}; resume without it, or "
                f"start a new {noun}"
            )


def in_stacks(ctx: click.Context, values: dict[str, Any]) -> dict[str, Any]:
    """The options of a new run: under torchrun networks are trained one by one, unless the user says otherwise."""
    alone = processes_of(ctx).started and not given(ctx, "side_by_side")
    return values | {"side_by_side": 1} if alone else values


@contextmanager
def stopping(
    ctx: click.Context, job: Job[Any], dataset: str, data_dir: Path, step: str = "outer step"
) -> Iterator[None]:
    """Run the work inside. Where it is told to stop, say which command goes on with it, and exit with the signal's
    code.

    Args:
        ctx: of the command.
        job: that is run.
        dataset: its name.
        data_dir: where that may be.
        step: what a step of the job is called.
    """
    try:
        yield
    except DirectoryInUseError as error:
        raise UserError(f"--out: {error}") from error
    except InterruptedRunError as stopped:
        click.echo(f"stopped after {step} {stopped.outer_step} of {job.total}; go on with:", err=True)
        where = f" --data-dir {shlex.quote(str(data_dir))}" if dataset in FROM_FILES else ""
        again = f"revdistill {ctx.command.name} --resume --out {shlex.quote(str(job.directory))}{where}"
        click.echo(f"  {again}{' --tensorboard' * bool(ctx.params.get('tensorboard'))}", err=True)
        ctx.exit(128 + stopped.signum)


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(value) if isinstance(value, tuple) else str(value)
