"""How many threads torch computes with on the CPU: as many as the work is worth.

Measured on two cores (a step of training and its way back, milliseconds, one thread and two): the defaults of `train`
1.6 and 1.6, ten MLPs side by side 5.7 and 5.0, an MLP on 100 images 7.4 and 5.4, ConvNet-3 of width 32 on 10 images of
32 x 32 43 and 29, of width 128 276 and 181. With other processes on both cores, two threads took 4 to 20 times as long
as one, whatever the size: at the end of each operator the threads wait for each other. So one thread it is where
several save little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from revdistill.outer.configuration import MOST_THREADS

SMALL = 5e7  # floating-point operations of a forward pass, below which one thread is the default


def default_threads(device: str, work: Callable[[], Iterable[float]]) -> int | None:
    """The number of threads for a job that nobody has asked a number for.

    Args:
        device: of the job.
        work: of each stack of networks that is trained, the floating-point operations of a forward pass of one training
            step; called where they count.

    Returns:
        1 below `SMALL` work, else torch's own number; None on other devices than the CPU, which do the work.
    """
    if device != "cpu":
        return None
    own = own_threads()
    return 1 if own > 1 and max(work()) < SMALL else own


def own_threads() -> int:
    """torch's own number, or as many as a configuration may have."""
    return min(torch.get_num_threads(), MOST_THREADS)


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """While this lasts torch computes with this many threads; None leaves its number as it is."""
    before = torch.get_num_threads()
    if count is not None and count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def shown(device: str) -> str:
    """The device, with the threads that are in use now on a CPU: "cpu, 1 thread"."""
    count = torch.get_num_threads()
    return f"{device}, {count} thread{'s' * (count > 1)}" if device == "cpu" else device


class Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations of matrix products, convolutions and attention in `flops` while it lasts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=found)
        return found
