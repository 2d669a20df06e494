"""revdistill evaluate"""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from revdistill.distill import evaluation as evaluations
from revdistill.distill.artifact import Artifact
from revdistill.distill.strategies import STRATEGIES
from revdistill.outer import models
from revdistill.outer.configuration import MANY
from revdistill.outer.data import load
from revdistill.outer.threads import shown, using_threads

from . import options
from .described import other_scale, remarks
from .errors import dataset_of, read_run, user_input
from .processes import check_same, processes_of
from .table import evaluation_table
from .threads import default_for, set_outside, work_of


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
@options.threads_of_run
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
    threads: int | None,
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
    size = side_by_side or _count(artifact, "side_by_side", MANY) or (1 if processes.started else None)
    with user_input():
        if threads is None:
            work = work_of(names, data, min(restarts, size or restarts), artifact.y.shape[1])
            own = _count(artifact, "threads", os.cpu_count() or 1)  # as at the end of the run: the same figures
            threads = default_for(ctx, device, work) if set_outside(ctx) or own is None else own
        ctx.with_resource(using_threads(threads if device == "cpu" else None))
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
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    networks = f"{restarts} fresh network{'s' * (restarts > 1)} of each architecture"
    click.echo(f"{networks}, on {shown(device)}\n{evaluation_table(found)}")


def _count(artifact: Artifact, name: str, most: int) -> int | None:
    """As RUN was evaluated at its end: of its configuration; a file from somebody else may say anything."""
    found = artifact.config.get(name)
    return found if type(found) is int and 1 <= found <= most else None


def _own(names: list[str]) -> list[str]:
    """The artifact's architectures. A file does not get to say which code is imported: that must be asked for
    by name.
    """
    own = [name for name in names if models.is_own(name)]
    if own:
        raise ValueError(f"the data were distilled for {own[0]}; give --arch {own[0]} to import it from your own code")
    return [models.canonical(name) for name in names]
