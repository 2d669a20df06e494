"""The one place that chooses a backend by the device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from revdistill.engine.compiling import give_up
from revdistill.engine.integers.backend import Backend
from revdistill.engine.integers.compiled import Compiled
from revdistill.engine.integers.fused import Fused
from revdistill.engine.integers.loops import LOOPS
from revdistill.engine.integers.passes import Passes
from revdistill.engine.integers.radix import COARSE, HEAD_BITS

_lock = threading.Lock()
_fused: dict[torch.device, Fused | None] = {}  # what was found on each device: one decision per process
_asked: list[Backend] = []  # by `using`


def root(x: Tensor) -> Tensor:
    """sqrt(x) of floats that require no grad, correctly rounded: the same bits on every device."""
    return backend_for(x.device).root(x)


def backend_for(device: torch.device, *, compile: bool = False) -> Backend:
    """The backend of a device: loops on the CPU, where they are compiled always; on CUDA Triton's kernels where these
    work, else, and on other devices, tensor operations.

    compile: fuse these by torch.compile.
    """
    if _asked:
        return _asked[-1]
    if device.type == "cpu":
        return LOOPS
    return fused_for(device) or (Compiled() if compile else Passes())


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """While this lasts, every device's backend is this one, in all threads: for tests and benchmarks."""
    _asked.append(backend)
    try:
        yield
    finally:
        _asked.pop()


def fused_for(device: torch.device) -> Fused | None:
    """Triton's kernels, where they can be had and a first launch has the right bits; a warning where one fails."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    with _lock:
        if device not in _fused:
            _fused[device] = None
            _fused[device] = _tried(device)
        return _fused[device]


def _tried(device: torch.device) -> Fused | None:
    try:
        from revdistill.engine.integers import kernels  # needs Triton
    except ImportError:
        return None
    fused = Fused(kernels)
    return fused if _works(fused, device) else None


def _works(fused: Fused, device: torch.device) -> bool:
    """Whether two kernels can be compiled and launched (no compiler, no folder to write to: not), and are right."""
    n = 49
    numbers = torch.tensor([0, 1, -1, 2**61 + 12345, -(2**61) - 54321])
    heads = torch.arange(5) * (n << HEAD_BITS - COARSE.bits) // 5
    expected, expected_head = numbers.clone(), heads.clone()
    v, head = numbers.to(device), heads.to(device)
    for backend, of, its in ((LOOPS, expected, expected_head), (fused, v, head)):
        backend.multiply(of, its, n, COARSE)
        backend.add(of, its, 0.1, 1)
    if fused.given_up:
        return False
    if torch.equal(v.cpu(), expected) and torch.equal(head.cpu(), expected_head):
        return True
    give_up(f"Triton's kernels on {device}, whose bits are other ones")
    return False
