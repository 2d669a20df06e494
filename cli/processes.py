"""The processes that torchrun has started a command in: the first one talks to the user."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import click
import torch

from revdistill.outer.data import Dataset
from revdistill.outer.ranks import ALONE, Processes

from .errors import UserError

_CLOSE = 1e-6  # relative: means may differ in their last bits on another machine


def processes_of(ctx: click.Context) -> Processes:
    """Those that share this command."""
    found: Processes = ctx.obj or ALONE
    return found


@contextmanager
def quiet(processes: Processes) -> Iterator[None]:
    """All but the first process print nothing, show no progress, and give no warnings."""
    if processes.first:
        yield
        return
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def check_same(processes: Processes, config: dict[str, Any], data: Dataset) -> None:
    """UserError unless all processes have the same configuration and data, threads and release of torch."""
    own = {name: value for name, value in config.items() if name != "threads"}  # compared as those in use
    own |= {f"the data's {name}": value for name, value in data.summary().items()}
    own |= {"threads (OMP_NUM_THREADS)": torch.get_num_threads(), "torch": torch.__version__}
    first, *others = [json.loads(text) for text in processes.texts(json.dumps(own))]
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if not _same(value, other[name]):
                raise UserError(
                    f"rank 0 has {value!r} as {name}, but rank {rank} has {other[name]!r}; all processes need the same "
                    "options and data, and the same kind of device"
                )


def stacks(processes: Processes, networks: int, side_by_side: int | None) -> str:
    """How the networks of an outer step are trained, for a headline; empty where there is nothing to say."""
    if not processes.started and side_by_side is None:
        return ""
    size = min(networks, side_by_side or networks)
    count = f"{networks} network{'s' * (networks > 1)}"
    on = f", on {processes.size} process{'es' * (processes.size > 1)}" if processes.started else ""
    return f"; {count} of each architecture in stacks of {size}{on}"


def seen_by(processes: Processes) -> str:
    """Who must see a directory that is resumed, where there are several processes."""
    return "" if processes.size == 1 else "; every process reads it: it must be on a disk that all machines have"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=_CLOSE, abs_tol=1e-30)
    return bool(a == b)
