"""revdistill --version: what a report of a fault begins with."""

from __future__ import annotations

import platform
from typing import Any

import click
import torch

import revdistill


def version_lines() -> list[str]:
    """The releases, and the devices that torch sees."""
    releases = f"torch {torch.__version__}, Python {platform.python_version()}"
    return [f"revdistill, version {revdistill.__version__} ({releases})", f"devices: {', '.join(_devices())}"]


def print_version(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """The option's callback: print the lines, and do nothing else."""
    if value and not ctx.resilient_parsing:
        click.echo("\n".join(version_lines()))
        ctx.exit()


def _devices() -> list[str]:
    threads = torch.get_num_threads()
    found = [f"cpu ({threads} thread{'s' * (threads > 1)})"]
    for i in range(torch.cuda.device_count()):
        try:
            found.append(f"cuda:{i} ({torch.cuda.get_device_name(i)})")
        except RuntimeError as error:  # a driver that is too old, a GPU that is broken
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            found.append(f"cuda:{i} (cannot be used: {reason})")
    return found
