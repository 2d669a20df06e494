"""Which device is measured on: a GPU, the CPU, or the tests' stand-in for a GPU (tests/standin.py), for dry runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

NAMES = ("cuda", "cpu", "standin")


def missing(name: str) -> str | None:
    """Why there is no such device here, or None."""
    if name == "cuda":
        return None if torch.cuda.is_available() else "there is no CUDA device here"
    if name == "standin":
        from tests import standin

        return None if standin.available() else "the stand-in device needs torch 2.9 or newer"
    return None


@contextmanager
def here(name: str) -> Iterator[torch.device]:
    """The device, while this lasts; in each thread of its own, since the stand-in makes tensors in the thread that
    entered.
    """
    if name != "standin":
        yield torch.device(name)
        return
    from tests import standin

    with standin.running():
        yield standin.device()


def leave(name: str, code: int = 0) -> NoReturn:
    """End the process. torch 2.11 aborts where a thread of autograd's for the stand-in is still there at the end."""
    if name != "standin":
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """What one call takes: by the device's own clock on CUDA, from its first kernel asked for to its last one done."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    cuda: Any = torch.cuda
    begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))
