"""How much memory is free."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that a process may still take on the device, or in the host's memory for any other than CUDA; 0 where the
    system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return 0
    try:  # a container's own limit
        left = int((_GROUP / "memory.max").read_text()) - int((_GROUP / "memory.current").read_text())
    except (OSError, ValueError):  # none, or "max"
        return available
    return max(0, min(available, left))


def keep_freed_memory() -> None:
    """Let freed memory of some MiB stay with the process, where glibc's malloc gives it.

    Of many losses at once, a step makes and frees tensors of that size, and malloc gives each back to the system, which
    then clears every page anew: half of the time of such a step. It learns from the largest block under 32 MiB that was
    freed to keep twice as much; untouched, this one takes no memory.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
