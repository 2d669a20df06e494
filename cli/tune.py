"""revdistill tune"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from revdistill.outer.data import NAMES, load
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.tune.checkpoint import FILE_NAME as CHECKPOINT
from revdistill.tune.checkpoint import read_config
from revdistill.tune.config import LEARNABLE, TuneConfig
from revdistill.tune.schedule import Schedule
from revdistill.tune.tuner import Tuner
from revdistill.tune.tuning import Tuning

from . import options
from .errors import user_input
from .options import COUNT, RATE
from .resuming import check_agrees, stopping
from .table import table

_DEFAULT = TuneConfig()
_option = options.Fields(_DEFAULT)


@click.command(short_help="Learn a training schedule for a model.")
@_option("--dataset", f"{', '.join(NAMES)}, or a .npz file with x and y.")
@options.data_dir
@click.option(
    "--arch",
    type=options.ARCHITECTURE,
    default=_DEFAULT.arch,
    show_default=True,
    help="Network; names and factories as for train.",
)
@_option("--steps", "Training steps, each on a minibatch of the real data.", type=COUNT)
@click.option(
    "--learn",
    default=",".join(_DEFAULT.learn),
    show_default=True,
    metavar="LIST",
    help=f"What is learned, out of {','.join(LEARNABLE)}: rates and momenta per step, a weight decay, an initial "
    "scale.",
)
@_option("--per-layer", "Learn each of them for each layer.", is_flag=True)
@_option("--optimizer", "Of the training.", type=click.Choice(OPTIMIZERS))
@_option("--lr", "Rate of the starting schedule.", type=RATE)
@_option("--momentum", "Momentum (Adam's beta1) of the starting schedule.", type=click.FloatRange(0, 1, max_open=True))
@_option("--weight-decay", "Weight decay of the starting schedule.", type=click.FloatRange(min=0))
@_option("--batch-size", "Samples per training step.", type=COUNT)
@_option("--inits", "Fresh networks per outer step, trained side by side.", type=COUNT)
@_option("--outer-steps", "Adam steps on the schedule.", type=COUNT)
@_option("--outer-lr", "Adam's rate, on logarithms of rates and logits of momenta.", type=RATE)
@_option("--outer-batch", "Held-out samples per outer step.", type=COUNT)
@_option("--clip", "Largest norm of a hypergradient; 0 for no clipping.", type=click.FloatRange(min=0))
@_option("--clip-back", "Largest norm of dL/dtheta at every step of the way back.  [default: none]", type=RATE)
@_option("--window", "Go back over the last so many steps only.  [default: all]", type=COUNT)
@options.device
@_option("--seed", "Of every random draw.", type=click.IntRange(0, 2**31 - 1))
@options.kept("tuning", "runs/tune-DATASET")
@click.pass_context
def tune(
    ctx: click.Context, /, data_dir: Path, out: Path | None, resume: bool, save_every: float, learn: str, **values: Any
) -> None:
    """Learn a training schedule: differentiate the held-out loss through whole trainings of fresh networks.

    The result is OUT/schedule.h5 and OUT/schedule.json, with a picture, OUT/schedule.png; at the end, fresh networks
    are trained along the starting and the learned schedule and compared on test data that neither had seen.
    """
    values["learn"] = tuple(name.strip() for name in learn.split(",") if name.strip())
    out = out or Path("runs") / f"tune-{Path(values['dataset']).stem}"
    with user_input():
        config = _resumed(ctx, out, values) if resume else TuneConfig(**values)
    with user_input("--dataset"):
        data = load(config.dataset, data_dir)
    with user_input():
        tuner = Tuner(config, data)
    with user_input("--out"):
        tuning = Tuning(out, tuner, resume=resume, save_every=save_every)
    click.echo(
        f"{Path(data.name).name}: {config.arch}, {config.steps} steps of {config.optimizer}; learning "
        f"{', '.join(config.learn)}"
        f"{' per layer' if config.per_layer else ''} in {config.outer_steps} outer steps on {config.device}"
    )
    started = time.monotonic()
    with stopping(ctx, config, out, data_dir):
        result = tuning.run()
    click.echo(f"tuned in {time.monotonic() - started:.0f} s; fresh networks on the test data:")
    click.echo(_table(result))
    from revdistill.tune.plots import draw

    picture = draw(out, result, tuner.starting_schedule())
    click.echo(f"wrote {out / 'schedule.h5'}, {out / 'schedule.json'} and {picture}")


def _resumed(ctx: click.Context, out: Path, values: dict[str, Any]) -> TuneConfig:
    """The configuration of the tuning in `out`; options given now must agree with it."""
    saved = read_config(out / CHECKPOINT)
    check_agrees(ctx, "tuning", out, saved, values)
    return saved


def _table(schedule: Schedule) -> str:
    rows = [
        (name, f"{found['loss']:.4f}", f"{found['accuracy']:.2%} +- {found['accuracy_std']:.2%}")
        for name, found in schedule.comparison.items()
    ]
    return table(("schedule", "test loss", "test accuracy"), rows)
