"""revdistill show"""

from __future__ import annotations

from pathlib import Path

import click

from revdistill.attribute import result as attributions
from revdistill.distill.artifact import FILE_NAME, Artifact
from revdistill.distill.classes import fitted
from revdistill.outer.data import Dataset, load
from revdistill.outer.directory import METRICS, read_metrics
from revdistill.tune import schedule as schedules

from . import options
from .errors import UserError, attribution_in, dataset_of, read_run, schedule_in, user_input
from .summary import attribution_summary, run_summary, tuning_summary


@click.command(short_help="Print a summary and draw pictures to RUN/plots.")
@click.argument("run", type=options.Place())
@options.dataset
def show(run: Path, dataset: str | None) -> None:
    """Print a summary of RUN, the directory of a revdistill train, tune or attribute, and draw the pictures of a
    training to RUN/plots.
    """
    for kind, result, show_it in (
        ("a tuning", schedule_in(run), _show_tuning),
        ("an attribution", attribution_in(run), _show_attribution),
    ):
        if result and not (run / FILE_NAME).exists():
            if dataset:
                raise UserError(f"--dataset: {run} is {kind}, which is shown without data; show it without --dataset")
            show_it(result)
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


def _show_attribution(path: Path) -> None:
    from revdistill.attribute.plots import FOLDER

    with user_input():
        kept = attributions.read(path)
    click.echo(attribution_summary(kept))
    pictures = sorted((path.parent / FOLDER).glob("*.png"))
    where = path.parent / FOLDER
    click.echo(f"pictures: {', '.join(map(str, pictures))}" if pictures else f"{where} has none: attribute draws them")


def _data_behind(artifact: Artifact, asked: str | None) -> Dataset | None:
    """The real data where a picture shows them: points in the plane."""
    if artifact.x.shape[2:] != (2,):
        return None
    return fitted(artifact, load(dataset_of(artifact, asked)))
