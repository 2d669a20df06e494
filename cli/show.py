"""revdistill show"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from revdistill.distill.artifact import Artifact
from revdistill.distill.classes import fitted
from revdistill.outer.data import Dataset, load
from revdistill.outer.directory import METRICS, read_metrics
from revdistill.outer.optimizers import OPTIMIZERS

from . import options
from .described import named
from .errors import UserError, dataset_of, read_run, user_input
from .table import evaluation_table, table


@click.command(short_help="Print a summary and draw pictures to RUN/plots.")
@click.argument("run", type=click.Path(path_type=Path))
@options.dataset
def show(run: Path, dataset: str | None) -> None:
    """Print a summary of RUN and draw its pictures to RUN/plots."""
    directory, artifact = read_run(run)
    with user_input():
        data = _data_behind(artifact, dataset)
        metrics = read_metrics(directory / METRICS)
        from revdistill.distill.plots import draw_all

        pictures = draw_all(directory, artifact, data, metrics)
    click.echo(_summary(artifact))
    if artifact.evaluation:
        try:
            click.echo(evaluation_table(artifact.evaluation))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{directory}: attribute 'evaluation' of the artifact is not one of this release ({error})"
            ) from error
    click.echo("pictures: " + ", ".join(str(p) for p in pictures))


def _data_behind(artifact: Artifact, asked: str | None) -> Dataset | None:
    """The real data where a picture shows them: points in the plane."""
    if artifact.x.shape[2:] != (2,):
        return None
    return fitted(artifact, load(dataset_of(artifact, asked)))


def _summary(a: Artifact) -> str:
    def span(values: np.ndarray) -> str:
        return f"{values.min():.4g} to {values.max():.4g}, mean {values.mean():.4g}"

    rows = [
        ("dataset", a.dataset),
        ("distilled for", ", ".join(a.architectures)),
        ("synthetic data", f"{a.batches} batches of {a.x.shape[1]}, each {' x '.join(map(str, a.x.shape[2:]))}"),
        ("labels", "soft" if a.has_soft_labels else "hard"),
        *([("classes", named(a.classes))] if a.classes else []),
        ("inner steps", f"{a.inner_steps} ({a.epochs} epochs)"),
        ("step sizes", span(a.lr)),
        ("optimizer", a.optimizer),
        (OPTIMIZERS[a.optimizer].momentum_name, span(a.momentum)),
        ("weight decay", f"{a.weight_decay:.4g}"),
        ("seed", str(a.seed)),
        ("written by", f"revdistill {a.revdistill_version}, torch {a.torch_version}"),
    ]
    return table(("what", "value"), rows)
