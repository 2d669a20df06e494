"""Entry point: every error of the user's is one line and exit code 2."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import click
import torch

import revdistill
from revdistill.engine import RevdistillError
from revdistill.outer.job import NotSavedError

from .attribute import attribute
from .data import data
from .errors import UserError
from .evaluate import evaluate
from .show import show
from .train import train
from .tune import tune
from .verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(revdistill.__version__, prog_name="revdistill")
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
    "revdistill: not enough memory; fewer of --steps, --epochs, --per-class, --inits, --restarts or --queries need "
    "less, and so does a smaller --batch-size or a smaller network"
)

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
    """Run the command and return its exit code."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # --arch package.module:function is looked for here too
    try:
        code = cli.main(
            args=None if arguments is None else list(arguments), prog_name="revdistill", standalone_mode=False
        )
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except (click.ClickException, UserError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"revdistill: {' '.join(message.split())}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("revdistill: interrupted", err=True)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        click.echo(_NO_MEMORY, err=True)
        return 1
    except (RevdistillError, NotSavedError, OSError) as error:
        click.echo(f"revdistill: {' '.join(str(error).split())}", err=True)
        return 1
