"""revdistill attribute"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from revdistill.attribute.attributing import FLIPPED_NAME, Attributing
from revdistill.attribute.config import EPS, MOST_EXAMPLES, RATE, RATES, AttributeConfig
from revdistill.attribute.experiment import Experiment
from revdistill.attribute.found import FILE_NAME as CHECKPOINT
from revdistill.attribute.found import read_config
from revdistill.attribute.harmful import FILE_NAME as HARMFUL
from revdistill.attribute.harmful import rows
from revdistill.attribute.result import FILE_NAME, Result
from revdistill.outer.data import NAMES, load, short_name
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.outer.own_files import ACCEPTED
from revdistill.outer.threads import shown

from . import options
from .described import remarks
from .errors import check_out, user_input
from .options import COUNT
from .options import RATE as POSITIVE
from .processes import check_same, processes_of, seen_by
from .resuming import check_agrees, stopping
from .summary import SHOWN
from .table import flipped_table, harmful_table
from .texts import check_lines
from .threads import with_threads

_DEFAULT = AttributeConfig()
_option = options.Fields(_DEFAULT)
_SHARE = click.FloatRange(0, 1, max_open=True)
_POSITIVE_SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)
_RATES = ", ".join(f"{rate:g} with {name}" for name, rate in RATES.items())


@click.command(short_help="Which training examples helped, and which harmed.")
@_option(
    "--dataset", f"{', '.join(NAMES)}, or {ACCEPTED}; revdistill data says what is read of it.", type=options.DATASET
)
@options.data_dir
@click.option(
    "--arch",
    type=options.ARCHITECTURE,
    default=_DEFAULT.arch,
    show_default=True,
    help="Network: a name or a factory, as for train. One that is smooth (GELU) has scores that are nearer to the "
    "truth.",
)
@click.option(
    "--examples",
    type=click.IntRange(min=2),
    help=f"Training samples that are taken, drawn by the seed.  [default: all, but {MOST_EXAMPLES:,} at most]",
)
@_option("--epochs", "How often the training takes each of them.", type=COUNT)
@_option("--batch-size", "Samples in each training step.", type=COUNT)
@_option("--optimizer", "The optimizer of the training.", type=click.Choice(list(OPTIMIZERS)))
@click.option("--lr", type=POSITIVE, help=f"Its learning rate.  [default: {_RATES}, {RATE:g} with others]")
@_option("--momentum", f"Its {options.MOMENTUM}.", type=click.FloatRange(0, 1, max_open=True))
@_option("--weight-decay", "Its weight decay.", type=click.FloatRange(min=0))
@click.option(
    "--eps",
    type=POSITIVE,
    help=f"Its eps, where it has one; larger is smoother.  [default: {EPS:g}]",
)
@_option("--queries", "Test samples whose losses are attributed, drawn by the seed, of each class as many.", type=COUNT)
@_option(
    "--check", "Train again without random subsets, and compare what happens with what was predicted.", is_flag=True
)
@_option("--drop", "With --check: the share of the examples in each subset.", type=_POSITIVE_SHARE)
@_option("--retrainings", "With --check: how many subsets.", type=click.IntRange(min=3))
@_option(
    "--flip",
    "Make the labels of this share of the examples wrong on purpose, and report how well they are found.",
    type=_SHARE,
)
@options.device
@options.threads
@_option("--seed", "Seed of every random draw.", type=click.IntRange(0, 2**31 - 1))
@options.kept("attribution", "runs/attribute-DATASET", save_every=False)
@click.pass_context
def attribute(ctx: click.Context, /, data_dir: Path, out: Path | None, resume: bool, **values: Any) -> None:
    """Say what each training example did to each of some test losses: differentiate them by the examples' weights,
    through a whole training.

    The score of an example is positive where leaving it out would lower the loss: it harms.

    The result is OUT/attribution.h5, with OUT/harmful.csv (all examples, the most harmful first, each with its index in
    the training data as they were found, from 0) and pictures in OUT/plots; with --flip, OUT/flipped.json.
    """
    out = out or Path("runs") / f"attribute-{short_name(values['dataset'])}"
    processes = processes_of(ctx)
    with user_input():
        config = _resumed(ctx, out, values) if resume else AttributeConfig(**values)
    if processes.first:
        check_out(out)
    with user_input("--dataset"):
        data = load(config.dataset, data_dir)
    with user_input():
        config = with_threads(ctx, config, data, networks=1, samples=config.batch_size, resume=resume)
    check_same(processes, config.to_dict(), data)
    with user_input():
        experiment = Experiment(config, data, processes)
    with user_input("--out"):
        job = Attributing(out, experiment, resume=resume)
    click.echo("\n".join([_headline(experiment), *remarks(data)]))
    if resume:
        click.echo(f"resuming after step {job.outer_step} of {job.total}")
    started = time.monotonic()
    with stopping(ctx, job, config.dataset, data_dir, "step"):
        result = job.run()
    if not processes.first:
        return
    took = time.monotonic() - started
    from revdistill.attribute.plots import FOLDER, draw_all

    try:
        pictures = draw_all(out, experiment, result)
    finally:  # printed last, as whoever reads along may have gone (| head), and in any case
        click.echo(
            f"attributed in {took:.0f} s; test accuracy {result.scored.accuracy:.1%}; the most harmful examples:"
        )
        click.echo(_report(experiment, result))
    files = [str(out / FILE_NAME), HARMFUL, *([FLIPPED_NAME] if result.flipped else [])]
    click.echo(f"wrote {', '.join(files)} and {', '.join(p.name for p in pictures)} in {out / FOLDER}")


def _resumed(ctx: click.Context, out: Path, values: dict[str, Any]) -> AttributeConfig:
    """The configuration of the attribution in `out`; options given now must agree with it."""
    path = out / CHECKPOINT
    if not path.exists():
        raise ValueError(f"{out} holds no {CHECKPOINT} to resume from{seen_by(processes_of(ctx))}")
    saved = read_config(path)
    check_agrees(ctx, "attribution", out, saved, values)
    return saved


def _headline(e: Experiment) -> str:
    c = e.config
    wrong = f" ({int(e.flipped.sum())} with a wrong label)" if c.flip else ""
    return (
        f"{Path(e.data.name).name}: {c.arch} trained on {len(e.examples)} samples{wrong}, {e.steps} steps of "
        f"{c.optimizer}; what each did to the losses of {c.queries} test samples, on {shown(c.device)}"
        + (f"; on {e.processes.size} process{'es' * (e.processes.size > 1)}" if e.processes.started else "")
    )


def _report(e: Experiment, result: Result) -> str:
    lines = [harmful_table(rows(e, result.scored.harm, SHOWN), flips=bool(e.config.flip))]
    if result.check is not None:
        lines += check_lines(result.check)
    if result.flipped is not None:
        lines.append(flipped_table(result.flipped.to_dict()))
    return "\n".join(lines)
