"""The one place that chooses a backend by the device."""

from __future__ import annotations

import torch
from torch import Tensor

from revdistill.engine.integers.backend import Backend
from revdistill.engine.integers.compiled import Compiled
from revdistill.engine.integers.loops import LOOPS
from revdistill.engine.integers.passes import Passes


def root(x: Tensor) -> Tensor:
    """sqrt(x) of floats that require no grad, correctly rounded: the same bits on every device."""
    return backend_for(x.device).root(x)


def backend_for(device: torch.device, *, compile: bool = False) -> Backend:
    """The backend of a device: loops on the CPU, where they are compiled always; elsewhere tensor operations.

    compile: fuse these by torch.compile.
    """
    if device.type == "cpu":
        return LOOPS
    return Compiled() if compile else Passes()
