"""revdistill data"""

from __future__ import annotations

from pathlib import Path

import click

from revdistill.outer.data import NAMES, load
from revdistill.outer.own_files import ACCEPTED

from . import options
from .described import description
from .errors import user_input


@click.command(
    short_help="Say what would be read of a dataset.",
    help=f"""Say what would be read of a dataset, and as what: arrays and their roles, shapes, classes with their names
    and counts, splits, values, and what is left unread.

    DATASET is what the other commands take as --dataset: {", ".join(NAMES)}, or {ACCEPTED}.""",
)
@click.argument("dataset", type=options.DATASET)
@options.data_dir
def data(dataset: str, data_dir: Path) -> None:
    """Print the description of a dataset."""
    with user_input("DATASET"):
        found = load(dataset, data_dir)
    click.echo(found.name)
    click.echo(description(found))
