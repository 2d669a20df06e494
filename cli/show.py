"""revdistill show"""

from __future__ import annotations

from pathlib import Path

import click

from revdistill.distill.artifact import FILE_NAME, Artifact
from revdistill.distill.classes import fitted
from revdistill.outer.data import Dataset, load
from revdistill.outer.directory import METRICS, read_metrics
from revdistill.tune import schedule as schedules

from . import options
from .errors import UserError, dataset_of, read_run, schedule_in, user_input
from .summary import run_summary, tuning_summary


@click.command(short_help="Print a summary and draw pictures to RUN/plots.")
@click.argument("run", type=options.Place())
@options.dataset
def show(run: Path, dataset: str | None) -> None:
    """Print a summary of RUN, the directory of a revdistill train or tune, and draw the pictures of a training to
    RUN/plots.
    """
    schedule = schedule_in(run)
    if schedule and not (run / FILE_NAME).exists():
        if dataset:
            raise UserError(f"--dataset: {run} is a tuning, whose picture shows no data; show it without --dataset")
        _show_tuning(schedule)
        return
    directory, artifact = read_run(run)
    with user_input():
        data = _data_behind(artifact, dataset)
        metrics = read_metrics(directory / METRICS)
        from revdistill.distill.plots import draw_all

        pictures = draw_all(directory, artifact, data, metrics)
    with user_input(str(directory)):
        click.echo(run_summary(artifact))
    click.echo("pictures: " + ", ".join(str(p) for p in pictures))


def _show_tuning(path: Path) -> None:
    from revdistill.tune.plots import FILE_NAME as PICTURE

    with user_input():
        schedule = schedules.read(path)
    with user_input(str(path)):
        click.echo(tuning_summary(schedule))
    picture = path.parent / PICTURE
    click.echo(f"picture: {picture}" if picture.exists() else f"{picture} is not there: revdistill tune draws it")


def _data_behind(artifact: Artifact, asked: str | None) -> Dataset | None:
    """The real data where a picture shows them: points in the plane."""
    if artifact.x.shape[2:] != (2,):
        return None
    return fitted(artifact, load(dataset_of(artifact, asked)))
