"""revdistill evaluate"""

from __future__ import annotations

import json
from pathlib import Path

import click

from revdistill.distill import evaluation as evaluations
from revdistill.distill.strategies import STRATEGIES
from revdistill.outer import models
from revdistill.outer.data import load

from . import options
from .described import other_scale, remarks
from .errors import dataset_of, read_run, user_input
from .table import evaluation_table


@click.command(short_help="Train fresh networks on distilled data and measure them.")
@click.argument("run", type=options.Place())
@options.arch
@click.option(
    "--restarts", type=options.NETWORKS, default=10, show_default=True, help="How many fresh networks to train."
)
@click.option(
    "--schedule",
    type=click.Choice(list(STRATEGIES)),
    default="raw",
    show_default=True,
    help="raw: the learned step sizes as they are. The strategies train for 50 epochs: 1 with rates of its own, "
    "2 repeats the learned epochs at falling rates, 3 repeats the last of them at falling rates.",
)
@options.dataset
@options.data_dir
@options.device
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def evaluate(
    run: Path,
    architectures: tuple[str, ...],
    restarts: int,
    schedule: str,
    dataset: str | None,
    data_dir: Path,
    device: str,
    as_json: bool,
) -> None:
    """Train fresh networks on the distilled data of RUN with the plain optimizer that they were distilled for, and
    measure their test accuracy.

    Without --arch, they have the architectures that the data were distilled for.
    """
    _, artifact = read_run(run)
    found = {}
    with user_input():
        data = load(dataset_of(artifact, dataset), data_dir)
        for name in architectures or _own(artifact.architectures):
            result = evaluations.evaluate(artifact, data, name, restarts=restarts, schedule=schedule, device=device)
            found[name] = result.to_dict()
    for line in [*remarks(data), *other_scale(artifact.normalization, data)]:
        click.echo(line, err=True)  # standard output may be JSON
    click.echo(json.dumps(found, indent=2) if as_json else evaluation_table(found))


def _own(names: list[str]) -> list[str]:
    """The artifact's architectures. A file does not get to say which code is imported: that must be asked for
    by name.
    """
    own = [name for name in names if ":" in name]
    if own:
        raise ValueError(f"the data were distilled for {own[0]}; give --arch {own[0]} to import it from your own code")
    return [models.canonical(name) for name in names]
