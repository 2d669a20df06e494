"""The device that an outer loop runs on, by its name."""

from __future__ import annotations

import os
from typing import Literal

import torch

from revdistill.outer.ranks import by_torchrun


def check_device(name: str) -> torch.device:
    """The device of this name.

    Args:
        name: cpu, cuda or cuda:N.

    Returns:
        The device, as `own_device` has it.

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
    own = own_device(name)
    if own.type == "cuda" and (own.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}, which is {own} for this process (LOCAL_RANK), but this machine has "
            f"{torch.cuda.device_count()} CUDA devices; start as many processes as there are, or give cpu or cuda:N"
        )
    return own


def own_device(name: str) -> torch.device:
    """The device of this name; where torchrun has started this process, cuda is that of its LOCAL_RANK."""
    local = os.environ.get("LOCAL_RANK", "") if by_torchrun() else ""
    return torch.device("cuda", int(local)) if name == "cuda" and local.isdecimal() else torch.device(name)


def compiled_on(device: torch.device) -> Literal["graphs"] | bool:
    """How an outer loop's unrolls are compiled, as `rd.unroll` takes it.

    Args:
        device: on which they are made.

    Returns:
        "graphs" anywhere but on a CPU: steps are replayed where they have eager's bits, so that results are the same.
    """
    return "graphs" if device.type != "cpu" else False
