"""Entry point: every error of the user's is one line and exit code 2."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack

import click
import torch

from revdistill.engine import RankError, RevdistillError
from revdistill.outer.directory import DirectoryInUseError
from revdistill.outer.job import NotSavedError
from revdistill.outer.ranks import Processes, StoppedError, started

from .attribute import attribute
from .data import data
from .errors import UserError
from .evaluate import evaluate
from .processes import quiet
from .show import show
from .train import train
from .tune import tune
from .verify import verify
from .version import print_version


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
    help="Show the versions of revdistill, torch and Python and the devices that torch sees, and exit.",
)
def cli() -> None:
    """Distil datasets by differentiating through whole training runs, exactly, in the memory of one step.

    \b
    revdistill train --steps 30 --epochs 3     distil the digits dataset into runs/digits
    revdistill show runs/digits                what came out, with pictures
    revdistill evaluate runs/digits            train fresh networks on it
    revdistill tune --learn lr,momentum        learn a training schedule for a model
    revdistill attribute --check               which training examples helped, and which harmed
    revdistill data photos.npz                 what would be read of your own data
    """


_NO_MEMORY = (
    "not enough memory; fewer of --steps, --epochs, --per-class, --inits, --restarts or --queries need "
    "less, and so does a smaller --batch-size or a smaller network"
)

_SHARED = ("train", "tune", "attribute", "evaluate")  # commands that all processes of torchrun work on
_KINDS = (UserError, DirectoryInUseError, NotSavedError)  # of errors that one process has for all

for command in (train, evaluate, show, tune, attribute, data, verify):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 2 the user's input, 1 anything else, 130 on Ctrl-C."""
    os.environ["MPLBACKEND"] = "Agg"  # pictures are files: another backend, or a wrong one, has no say
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of classes may be in any script, a terminal in one
            stream.reconfigure(errors="replace")
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; where torchrun has started several processes, on all the same."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # --arch package.module:function is looked for here too
    with ExitStack() as stack:
        try:
            processes = stack.enter_context(started(_KINDS))
        except (ValueError, RankError) as error:
            click.echo(f"revdistill: {error}", err=True)
            return 2 if isinstance(error, ValueError) else 1
        stack.callback(processes.wait)
        return _run(arguments, processes)


def _run(arguments: Sequence[str] | None, processes: Processes) -> int:
    def say(line: str) -> None:
        if processes.speaks:
            click.echo(f"revdistill: {line}", err=True)

    try:
        with processes.together(), quiet(processes):
            return _command(arguments, processes)
    except click.exceptions.NoArgsIsHelpError as error:
        if processes.speaks:
            click.echo(error.format_message(), err=True)
        return 2
    except (UserError, DirectoryInUseError) as error:
        say(" ".join(str(error).split()))
        return 2
    except (StoppedError, KeyboardInterrupt):
        say("interrupted")
        return 130
    except MemoryError:
        say(_NO_MEMORY)
        return 1
    except (RevdistillError, NotSavedError, OSError) as error:
        if isinstance(error, RankError) and error.rank == processes.rank and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)  # a fault of the program's: the others name it
        say(" ".join(str(error).split()))
        return 1


def _command(arguments: Sequence[str] | None, processes: Processes) -> int:
    """Its exit code. What click raises, and torch where memory is short, is raised as what other processes know."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not processes.first and next((a for a in given if not a.startswith("-")), "") not in _SHARED:
        return 0
    try:
        code = cli.main(args=given, prog_name="revdistill", standalone_mode=False, obj=processes)
        return code if isinstance(code, int) else 0
    except SystemExit as error:  # whoever reads along has gone (| head)
        if processes.size == 1:
            raise
        return error.code if isinstance(error.code, int) else 1
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.ClickException as error:
        raise UserError(error.format_message()) from error
    except click.Abort as error:
        raise StoppedError from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise MemoryError(str(error)) from error
