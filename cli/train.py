"""revdistill train"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import click

import revdistill
from revdistill.distill.augment import AUGMENTATIONS
from revdistill.distill.checkpoint import FILE_NAME as CHECKPOINT
from revdistill.distill.checkpoint import read_config
from revdistill.distill.classes import fitted
from revdistill.distill.config import ADJOINTS, INITS, OUTER_DECAYS, Config
from revdistill.distill.distillation import Distillation
from revdistill.distill.distiller import Distiller
from revdistill.distill.parametrization import MOST_PACKED
from revdistill.distill.presets import BUDGETS, PRESETS, USUAL, settings
from revdistill.distill.starts import STARTS
from revdistill.outer.checkpoint import written_by
from revdistill.outer.configuration import MANY
from revdistill.outer.data import NAMES, load, short_name
from revdistill.outer.directory import METRICS, read_metrics
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.outer.own_files import ACCEPTED
from revdistill.outer.smoothing import BETA
from revdistill.outer.threads import shown

from . import options
from .described import remarks
from .errors import UserError, check_out, user_input
from .options import COUNT, RATE
from .processes import check_same, processes_of, seen_by, stacks
from .resuming import check_agrees, given, in_stacks, stopping
from .table import evaluation_table
from .threads import with_threads

_DEFAULT = Config()
_option = options.Fields(_DEFAULT)


@click.command(short_help="Distil a dataset.")
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    help="Take these settings together. An option that is given as well overrides its part of them.",
)
@click.option(
    "--budget",
    type=click.Choice([str(n) for n in BUDGETS]),
    help="With --preset best: its images take the numbers of this many per class.  [default: 10]",
)
@_option(
    "--dataset", f"{', '.join(NAMES)}, or {ACCEPTED}; revdistill data says what is read of it.", type=options.DATASET
)
@options.data_dir
@options.arch
@_option("--steps", "How many synthetic batches are learned.", type=COUNT)
@_option("--epochs", "How often a network trains on all of them: steps x epochs inner steps.", type=COUNT)
@_option("--per-class", "Synthetic samples per class in a batch.", type=COUNT)
@_option(
    "--optimizer",
    "The inner training's optimizer. Adam wants a smaller --lr, such as 0.005.",
    type=click.Choice(list(OPTIMIZERS)),
)
@_option("--momentum", f"The inner training's {options.MOMENTUM}.", type=click.FloatRange(0, 1))
@_option("--learn-momentum", "Learn a momentum for each inner step; --momentum is where they start.", is_flag=True)
@_option(
    "--weight-decay",
    "The inner training's weight decay. It is part of the result, and not learned.",
    type=click.FloatRange(min=0),
)
@click.option("--learn-labels/--no-learn-labels", default=_DEFAULT.learn_labels, help="Learn soft labels as well.")
@_option("--lr", "Where the inner step sizes start; one is learned for each inner step.", type=RATE)
@_option(
    "--init", "Distil for new random networks at every outer step, or for one fixed network.", type=click.Choice(INITS)
)
@_option("--inits", "Networks of each architecture in an outer step, trained side by side.", type=COUNT)
@_option(
    "--start",
    "Start the synthetic data from noise, from real samples, or from centroids of each class's real samples.",
    type=click.Choice(list(STARTS)),
)
@_option(
    "--pack",
    "Let a stored image hold PACK x PACK smaller ones, which are enlarged for training.",
    type=click.IntRange(1, MOST_PACKED),
)
@_option(
    "--bases",
    "Store this many bases, images of half the height and width, and for each synthetic image one number per basis: it "
    "is the bases' combination, enlarged.",
    type=COUNT,
)
@_option(
    "--smooth",
    f"Distil with softplus of this beta instead of ReLU; --smooth alone takes {BETA:g}. Networks are evaluated with "
    "ReLU. 0: ReLU.",
    type=click.FloatRange(0, 1e4),
    metavar="[BETA]",
    is_flag=False,
    flag_value=BETA,
)
@_option("--zca", "Whiten the images (ZCA). The result says how.", is_flag=True)
@_option("--outer-steps", "How many Adam steps to make on the synthetic data and step sizes.", type=COUNT)
@_option("--outer-lr", "Learning rate of these Adam steps.", type=RATE)
@_option(
    "--outer-lr-rates", "The same for the step sizes and momenta.  [default: --outer-lr]", type=click.FloatRange(min=0)
)
@_option(
    "--outer-decay",
    "How these rates fall: by a cosine to 0, by halving ten times, or not at all.",
    type=click.Choice(OUTER_DECAYS),
)
@_option("--outer-beta1", "beta1 of these Adam steps.", type=click.FloatRange(0, 1, max_open=True))
@_option(
    "--average",
    "The result is the mean over this share of the outer steps, the last ones; 0: the last step alone.",
    type=click.FloatRange(0, 1),
)
@_option(
    "--window",
    "Train for a random number of inner steps, and differentiate through this many of the last ones.  "
    "[default: train for all of them, and differentiate through all]",
    type=COUNT,
)
@_option("--window-every", "Draw that random number anew every so many outer steps.", type=COUNT)
@_option(
    "--pool",
    "Keep this many networks of different ages; at each outer step one of them makes its next --window steps. 0: train "
    "new networks at each outer step.",
    type=click.IntRange(0, MANY),
)
@_option(
    "--grow",
    "Let the number of inner steps grow to its full length over this share of the outer steps.",
    type=click.FloatRange(0, 1),
)
@_option(
    "--augment",
    "Transform real and synthetic images alike, at each outer step by one of those given, at random. "
    "Repeat the option for several.",
    type=click.Choice(list(AUGMENTATIONS)),
    multiple=True,
)
@_option("--batch-size", "Real samples in each outer step.", type=COUNT)
@_option(
    "--noise",
    "Standard deviation of the Gaussian noise that is added to real samples.  [default: 0.5 on images, else 0]",
    type=click.FloatRange(min=0),
)
@_option("--clip", "Clip each hypergradient to this norm; 0: do not clip.", type=click.FloatRange(min=0))
@_option(
    "--clip-mean",
    "Clip each hypergradient to this many times the running mean of their norms, above 1; 0: do not.",
    type=click.FloatRange(min=0),
)
@click.option(
    "--adjoint",
    type=click.Choice(list(ADJOINTS)),
    help="How the engine differentiates through the inner training.  [default: the engine chooses]",
)
@options.side_by_side
@options.device
@options.threads
@_option("--seed", "Seed of every random draw.", type=click.IntRange(0, 2**31 - 1))
@options.kept("run", "runs/DATASET, or the next free runs/DATASET-N")
@options.tensorboard
@click.pass_context
def train(
    ctx: click.Context,
    /,
    preset: str | None,
    budget: str | None,
    data_dir: Path,
    out: Path | None,
    resume: bool,
    save_every: float,
    tensorboard: bool,
    **values: Any,
) -> None:
    """Distil a dataset: learn a small synthetic one, with step sizes, so that a fresh network trained on it does well
    on the real one.

    The result is OUT/distilled.h5. Beside it are metrics.jsonl, pictures in plots/, and checkpoint.h5 for --resume.
    """
    values["architectures"] = values["architectures"] or _architectures(preset, values["dataset"])
    if budget and preset != "best":
        raise UserError(f"--budget is {budget}, which is for --preset best; leave it out")
    if preset:
        if resume:
            raise UserError("--preset and --resume: a run that is resumed has its settings already")
        asked = {name: value for name, value in values.items() if given(ctx, name)}
        values |= settings(preset, values["dataset"], values["architectures"], int(budget or 10), asked)
    if values["init"] == "fixed" and values["inits"] != 1 and given(ctx, "inits") and not resume:
        raise UserError(f"--inits is {values['inits']}, but --init fixed has one network; leave one of them out")
    processes = processes_of(ctx)
    out = out or Path(processes.told(str(_default_directory(values["dataset"], resume))))
    with user_input():
        config = _resumed(ctx, out, values) if resume else Config(**in_stacks(ctx, values))
    if processes.first:
        check_out(out)
    with user_input("--dataset"):
        data = load(config.dataset, data_dir)
    with user_input():
        networks = 1 if config.init == "fixed" else min(config.inits, config.side_by_side or config.inits)
        samples = config.per_class * data.classes
        config = with_threads(ctx, config, data, networks=networks, samples=samples, resume=resume)
    check_same(processes, config.to_dict(), data)
    with user_input():
        distiller = Distiller(config, data, processes)
    with user_input("--out"):
        run = Distillation(out, distiller, resume=resume, save_every=save_every, tensorboard=tensorboard)
    click.echo("\n".join([_headline(distiller), *remarks(data)]))
    if resume:
        click.echo(f"resuming after outer step {distiller.outer_step} of {config.outer_steps}")
    started = time.monotonic()
    with stopping(ctx, run, config.dataset, data_dir):
        result = run.run()
    if not processes.first:
        return
    took = time.monotonic() - started
    from revdistill.distill.plots import draw_all

    try:
        points = fitted(result, data) if data.input_shape == (2,) else None
        pictures = draw_all(out, result, points, read_metrics(out / METRICS))
    finally:  # printed last, as whoever reads along may have gone (| head), and in any case
        click.echo(f"distilled in {took:.0f} s; test accuracy of fresh networks trained on it:")
        click.echo(evaluation_table(result.evaluation))
    click.echo(f"wrote {out / 'distilled.h5'} and {', '.join(p.name for p in pictures)} in {out / 'plots'}")


def _default_directory(dataset: str, resume: bool) -> Path:
    """runs/DATASET, or the first of runs/DATASET-2, -3, ... that holds no run; to resume, the last that does."""
    name = short_name(dataset)
    taken: Path | None = None
    for i in itertools.count(1):
        directory = Path("runs") / (name if i == 1 else f"{name}-{i}")
        if not Distillation.started_in(directory):
            return taken if resume and taken else directory
        taken = directory
    raise AssertionError("unreachable")


def _resumed(ctx: click.Context, out: Path, values: dict[str, Any]) -> Config:
    """The configuration of the run in `out`; options given now must agree with it."""
    path = out / CHECKPOINT
    if not path.exists():
        raise ValueError(f"--resume: {out} holds no {CHECKPOINT}{seen_by(processes_of(ctx))}")
    saved = read_config(path)
    check_agrees(ctx, "run", out, saved, values)
    version = written_by(path)
    if version != revdistill.__version__:
        click.echo(
            f"note: the checkpoint was written by revdistill {version}, this is {revdistill.__version__}", err=True
        )
    return saved


def _architectures(preset: str | None, dataset: str) -> tuple[str, ...]:
    """Without --arch: what the preset takes for the dataset."""
    return (USUAL[dataset],) if preset and dataset in USUAL else _DEFAULT.architectures


def _headline(distiller: Distiller) -> str:
    c, data = distiller.config, distiller.data
    s = distiller.synthetic
    synthetic, numbers = s.labels().shape[:2].numel(), sum(t.numel() for t in s.stored().values())
    form = f", stored as {numbers:,} numbers" if c.bases or c.pack > 1 else ""
    return (
        f"{Path(data.name).name}: {len(data.x)} training samples into {synthetic} ({c.steps} batches of "
        f"{synthetic // c.steps}{form}), "
        f"{c.inner_steps} inner steps, {', '.join(c.architectures)}, {c.outer_steps} outer steps on {shown(c.device)}"
        + stacks(distiller.processes, distiller.stacks[0].size, c.side_by_side)
    )
