"""revdistill evaluate"""

from __future__ import annotations

import json
from pathlib import Path

import click

from revdistill.distill import evaluation as evaluations
from revdistill.distill.artifact import Artifact
from revdistill.distill.strategies import STRATEGIES
from revdistill.outer import models
from revdistill.outer.configuration import MANY
from revdistill.outer.data import load

from . import options
from .described import other_scale, remarks
from .errors import dataset_of, read_run, user_input
from .processes import check_same, processes_of
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
@options.side_by_side
@options.device
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    run: Path,
    architectures: tuple[str, ...],
    restarts: int,
    schedule: str,
    dataset: str | None,
    data_dir: Path,
    device: str,
    side_by_side: int | None,
    as_json: bool,
) -> None:
    """Train fresh networks on the distilled data of RUN with the plain optimizer that they were distilled for, and
    measure their test accuracy.

    Without --arch, they have the architectures that the data were distilled for.
    """
    _, artifact = read_run(run)
    processes = processes_of(ctx)
    with user_input():
        data = load(dataset_of(artifact, dataset), data_dir)
        names = architectures or _own(artifact.architectures)
    given = {"architectures": list(names), "restarts": restarts, "schedule": schedule, "device": device}
    size = side_by_side or _side_by_side(artifact) or (1 if processes.started else None)
    check_same(processes, given | {"side_by_side": size}, data)
    with user_input():
        results = evaluations.evaluate_all(
            artifact,
            data,
            names,
            restarts=restarts,
            schedule=schedule,
            device=device,
            side_by_side=size,
            processes=processes,
        )
    found = {name: result.to_dict() for name, result in results.items()}
    for line in [*remarks(data), *other_scale(artifact.normalization, data)]:
        click.echo(line, err=True)  # standard output may be JSON
    click.echo(json.dumps(found, indent=2) if as_json else evaluation_table(found))


def _side_by_side(artifact: Artifact) -> int | None:
    """As the networks were trained that RUN was evaluated by at its end; a file from somebody else may say anything."""
    found = artifact.config.get("side_by_side")
    return found if type(found) is int and 1 <= found <= MANY else None


def _own(names: list[str]) -> list[str]:
    """The artifact's architectures. A file does not get to say which code is imported: that must be asked for
    by name.
    """
    own = [name for name in names if models.is_own(name)]
    if own:
        raise ValueError(f"the data were distilled for {own[0]}; give --arch {own[0]} to import it from your own code")
    return [models.canonical(name) for name in names]
