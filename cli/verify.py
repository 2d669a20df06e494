"""revdistill verify"""

from __future__ import annotations

import click
import torch

from revdistill.engine.selfcheck import checks
from revdistill.outer.threads import shown

from . import options


@click.command(short_help="Check the engine against autograd on this machine.")
@options.device
@click.pass_context
def verify(ctx: click.Context, /, device: str) -> None:
    """Check the engine on this machine: that it is exact over 1,000 steps, that its hypergradients are autograd's, and
    that its history takes no more bits than the bound says.

    Exits with 1 if any check fails.
    """
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else shown(device)
    click.echo(f"torch {torch.__version__} on {name}")
    failed = 0
    for check in checks(torch.device(device)):
        failed += not check.passed
        word = "ok" if check.passed else "FAILED"
        click.echo(f"  {check.kind:<10} {check.name:<32} {check.found:<55} {check.seconds:5.1f} s  {word}")
    click.echo("all checks passed" if not failed else f"{failed} checks FAILED")
    ctx.exit(1 if failed else 0)
