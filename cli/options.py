"""Options, and their types, that several commands share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from revdistill.outer import models
from revdistill.outer.configuration import MANY, MOST_THREADS
from revdistill.outer.data import DATA_DIR, NAMES
from revdistill.outer.device import check_device
from revdistill.outer.image_files import FROM_FILES
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.outer.own_files import ACCEPTED
from revdistill.outer.tensorboard import FOLDER, unusable

from .completion import Named

FC = TypeVar("FC", bound=Callable[..., Any])
COUNT = click.IntRange(min=1)
NETWORKS = click.IntRange(1, MANY)
RATE = click.FloatRange(min=0, min_open=True)


class Fields:
    """Options for the fields of a configuration of the same names, with their defaults."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __call__(self, flag: str, help: str, **kwargs: Any) -> Callable[[FC], FC]:
        name = flag.strip("-").replace("-", "_")
        default = getattr(self._config, name)
        return click.option(flag, name, default=default, show_default=default is not None, help=help, **kwargs)


class Place(click.Path):
    """A path. A shell leaves the ~ of --out=~/run as it is; and of a variable that is not set, nothing."""

    def __init__(self, *, file_okay: bool = True) -> None:
        super().__init__(path_type=Path, file_okay=file_okay)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value):
            self.fail("is empty; accepted is a path, such as . for this directory", param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


class _Seconds(click.FloatRange):
    """A time from 0 on, which is a number."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value!r} is no number.", param, ctx)
        return found


class _Checked(Named):
    """A text that a function of the library checks."""

    def __init__(self, name: str, check: Any, names: Sequence[str]) -> None:
        super().__init__(name, names)
        self._check = check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._check(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _device_name(name: str) -> str:
    if name == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name


ARCHITECTURE = _Checked("name", models.canonical, list(models.ARCHITECTURES))
DEVICE = _Checked("device", _device_name, ("auto", "cpu", "cuda"))
DATASET = Named("text", NAMES, files=True)

_called: dict[str, list[str]] = {}  # what other optimizers call it, and which these are
for _family in OPTIMIZERS.values():
    if _family.momentum_name != "momentum":
        _called.setdefault(_family.momentum_name, []).append(_family.title)
MOMENTUM = f"momentum ({'; '.join(f'{name} of ' + ' and '.join(titles) for name, titles in _called.items())})"

arch = click.option(
    "--arch",
    "architectures",
    type=ARCHITECTURE,
    multiple=True,
    metavar="NAME",
    help=f"Network: {models.shown()}. Other options follow a colon: ConvNet-3:width=64,norm=group. Or your own factory "
    "package.module:function, which is called with (input_shape, classes). Repeat the option for several.",
)
data_dir = click.option(
    "--data-dir",
    type=Place(),
    default=DATA_DIR,
    show_default=True,
    envvar="REVDISTILL_DATA_DIR",
    show_envvar=True,
    help=f"Folder with the files of {', '.join(FROM_FILES)}, or with a folder of this name for each.",
)
dataset = click.option(
    "--dataset",
    type=DATASET,
    help=f"Use this real dataset (a name, or {ACCEPTED}) instead of the one that RUN names. It must be given where "
    "RUN was distilled from a file: the result of somebody else does not choose which of your files is read.",
)
side_by_side = click.option(
    "--side-by-side",
    type=click.IntRange(1, MANY),
    help="How many networks are trained in one stack, the unit that several processes share out. The result depends on "
    "it in its last bits, and not on the number of processes.  [default: all; 1 under torchrun]",
)


def _threads(first: str = "") -> Callable[[FC], FC]:
    """first: a default that goes before the usual ones."""
    return click.option(
        "--threads",
        type=click.IntRange(1, MOST_THREADS),
        help="Threads that torch computes with on the CPU. The result depends on it in its last bits.  [default: "
        f"{first}1 where more save little, else torch's own number; OMP_NUM_THREADS where that is set]",
    )


threads = _threads()
threads_of_run = _threads("as at the end of RUN; ")
device = click.option(
    "--device",
    type=DEVICE,
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:N, or auto. Under torchrun, cuda is each process's own.",
)


def _installed(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    if value and not ctx.resilient_parsing:  # a shell that completes the line does not wait for tensorboard
        reason = unusable()
        if reason is not None:
            raise click.ClickException(f"--tensorboard {reason}")
    return value


tensorboard = click.option(
    "--tensorboard",
    is_flag=True,
    callback=_installed,
    help=f"Also write each outer step to event files for TensorBoard, in OUT/{FOLDER}. (Needs the package "
    "tensorboard.)",
)


def kept(noun: str, default: str, *, save_every: bool = True) -> Callable[[FC], FC]:
    """--out, --resume and, unless each step is saved, --save-every, of a run (or tuning: `noun`) that is kept in a
    directory.
    """
    options: list[Callable[[FC], FC]] = [
        click.option(
            "--out",
            type=Place(file_okay=False),
            help=f"Directory of the {noun}.  [default: {default}]",
        ),
        click.option(
            "--resume", is_flag=True, help=f"Go on with the {noun} in --out. The result is the same, bit for bit."
        ),
        click.option(
            "--save-every",
            type=_Seconds(min=0),
            default=60.0,
            show_default=True,
            help="Seconds between checkpoints.",
        ),
    ]

    def decorate(command: FC) -> FC:
        for option in reversed(options if save_every else options[:-1]):  # as decorators are: from the last one up
            command = option(command)
        return command

    return decorate
