"""The device that an outer loop runs on, by its name."""

from __future__ import annotations

from typing import Literal

import torch


def check_device(name: str) -> torch.device:
    """The device of this name.

    Args:
        name: cpu, cuda or cuda:N.

    Returns:
        The device.

    Raises:
        ValueError: this machine does not have it, or it is of another kind.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; accepted are cpu, cuda and cuda:N") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"device is {name!r}; accepted are cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def compiled_on(device: torch.device) -> Literal["graphs"] | bool:
    """How an outer loop's unrolls are compiled, as `rd.unroll` takes it.

    Args:
        device: on which they are made.

    Returns:
        "graphs" anywhere but on a CPU: steps are replayed where they have eager's bits, so that results are the same.
    """
    return "graphs" if device.type != "cpu" else False
