"""revdistill tune"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from revdistill.outer.data import NAMES, load, short_name
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.outer.own_files import ACCEPTED
from revdistill.outer.threads import shown
from revdistill.tune.checkpoint import FILE_NAME as CHECKPOINT
from revdistill.tune.checkpoint import read_config
from revdistill.tune.config import LEARNABLE, TuneConfig
from revdistill.tune.tuner import Tuner
from revdistill.tune.tuning import Tuning

from . import options
from .completion import Named
from .described import remarks
from .errors import check_out, user_input
from .options import COUNT, RATE
from .processes import check_same, processes_of, seen_by, stacks
from .resuming import check_agrees, in_stacks, stopping
from .table import comparison_table
from .threads import with_threads

_DEFAULT = TuneConfig()
_option = options.Fields(_DEFAULT)


@click.command(short_help="Learn a training schedule for a model.")
@_option(
    "--dataset", f"{', '.join(NAMES)}, or {ACCEPTED}; revdistill data says what is read of it.", type=options.DATASET
)
@options.data_dir
@click.option(
    "--arch",
    type=options.ARCHITECTURE,
    default=_DEFAULT.arch,
    show_default=True,
    help="Network: a name or a factory, as for train.",
)
@_option("--steps", "Training steps, each on a minibatch of the real data.", type=COUNT)
@click.option(
    "--learn",
    type=Named("text", LEARNABLE, separator=","),
    default=",".join(_DEFAULT.learn),
    show_default=True,
    metavar="LIST",
    help=f"What to learn, a list out of {','.join(LEARNABLE)}: a rate and a momentum for each step, one weight decay, "
    "one factor on the initial weights.",
)
@_option("--per-layer", "Learn each of these separately for each layer.", is_flag=True)
@_option("--optimizer", "The optimizer of the training.", type=click.Choice(list(OPTIMIZERS)))
@_option("--lr", "Learning rate of the starting schedule.", type=RATE)
@_option(
    "--momentum",
    f"The optimizer's {options.MOMENTUM} in the starting schedule.",
    type=click.FloatRange(0, 1, max_open=True),
)
@_option("--weight-decay", "Weight decay of the starting schedule.", type=click.FloatRange(min=0))
@_option("--batch-size", "Samples in each training step.", type=COUNT)
@_option("--inits", "Fresh networks in each outer step, trained side by side.", type=COUNT)
@_option("--outer-steps", "How many Adam steps to make on the schedule.", type=COUNT)
@_option("--outer-lr", "Learning rate of these Adam steps, on logarithms of rates and logits of momenta.", type=RATE)
@_option("--outer-batch", "Held-out samples in each outer step.", type=COUNT)
@_option("--clip", "Clip each hypergradient to this norm; 0: do not clip.", type=click.FloatRange(min=0))
@_option("--clip-back", "Clip dL/dtheta to this norm at every step of the way back.  [default: do not clip]", type=RATE)
@_option("--window", "Differentiate through this many of the last steps only.  [default: all]", type=COUNT)
@options.side_by_side
@options.device
@options.threads
@_option("--seed", "Seed of every random draw.", type=click.IntRange(0, 2**31 - 1))
@options.kept("tuning", "runs/tune-DATASET")
@options.tensorboard
@click.pass_context
def tune(
    ctx: click.Context,
    /,
    data_dir: Path,
    out: Path | None,
    resume: bool,
    save_every: float,
    tensorboard: bool,
    learn: str,
    **values: Any,
) -> None:
    """Learn a training schedule: differentiate the held-out loss through whole trainings of fresh networks.

    The result is OUT/schedule.h5 and OUT/schedule.json, with a picture, OUT/schedule.png. At the end, fresh networks
    are trained along the starting and along the learned schedule, and compared on test data that neither has seen.
    """
    values["learn"] = tuple(name.strip() for name in learn.split(",") if name.strip())
    out = out or Path("runs") / f"tune-{short_name(values['dataset'])}"
    processes = processes_of(ctx)
    with user_input():
        config = _resumed(ctx, out, values) if resume else TuneConfig(**in_stacks(ctx, values))
    if processes.first:
        check_out(out)
    with user_input("--dataset"):
        data = load(config.dataset, data_dir)
    with user_input():
        networks = min(config.inits, config.side_by_side or config.inits)
        config = with_threads(ctx, config, data, networks=networks, samples=config.batch_size, resume=resume)
    check_same(processes, config.to_dict(), data)
    with user_input():
        tuner = Tuner(config, data, processes)
    with user_input("--out"):
        tuning = Tuning(out, tuner, resume=resume, save_every=save_every, tensorboard=tensorboard)
    click.echo(
        f"{Path(data.name).name}: {config.arch}, {config.steps} steps of {config.optimizer}; learning "
        f"{', '.join(config.learn)}"
        f"{' per layer' if config.per_layer else ''} in {config.outer_steps} outer steps on {shown(config.device)}"
        + stacks(processes, config.inits, config.side_by_side)
    )
    for line in remarks(data):
        click.echo(line)
    started = time.monotonic()
    with stopping(ctx, tuning, config.dataset, data_dir):
        result = tuning.run()
    if not processes.first:
        return
    took = time.monotonic() - started
    from revdistill.tune.plots import draw

    try:
        picture = draw(out, result, tuner.starting_schedule())
    finally:  # printed last, as whoever reads along may have gone (| head), and in any case
        click.echo(f"tuned in {took:.0f} s; fresh networks on the test data:")
        click.echo(comparison_table(result.comparison))
    click.echo(f"wrote {out / 'schedule.h5'}, {out / 'schedule.json'} and {picture}")


def _resumed(ctx: click.Context, out: Path, values: dict[str, Any]) -> TuneConfig:
    """The configuration of the tuning in `out`; options given now must agree with it."""
    path = out / CHECKPOINT
    if not path.exists():
        raise ValueError(f"{out} holds no {CHECKPOINT} to resume from{seen_by(processes_of(ctx))}")
    saved = read_config(path)
    check_agrees(ctx, "tuning", out, saved, values)
    return saved
