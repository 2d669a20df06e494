"""Two questions about a float tensor, each answered in one pass: how large is it, and is it the same to the bit?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from revdistill.engine.integers import loops

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_NUMPY_BITS: dict[torch.dtype, Any] = {torch.float32: np.int32, torch.float64: np.int64}
_NUMPY_FLOAT: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}
_MAGNITUDE = {torch.float32: np.int32(2**31 - 1), torch.float64: np.int64(2**63 - 1)}


def largest(x: Tensor) -> float:
    """The largest magnitude in x; NaN or inf where there is one, 0 where x is empty."""
    if x.device.type == "cpu" and x.dtype in _BITS and x.is_contiguous():
        bits = x.numpy().reshape(-1).view(_NUMPY_BITS[x.dtype])
        return float(_NUMPY_BITS[x.dtype](loops.largest_bits(bits, _MAGNITUDE[x.dtype])).view(_NUMPY_FLOAT[x.dtype]))
    return float(largest_on_device(x)) if x.numel() else 0.0


def largest_on_device(x: Tensor) -> Tensor:
    """`largest` as a 0-dim tensor, without waiting for the device. x is not empty."""
    low, high = torch.aminmax(x)
    return torch.maximum(low.abs(), high)


def fingerprint(x: Tensor) -> int | Tensor:
    """64 bits that tell x [numel] (float32 or float64) from any other tensor, up to a chance of about 2^-64.

    Each element's bits are mixed with its position, nonlinearly: differences of a last bit here and there do not
    cancel. An int on the CPU, else a 0-dim int64 tensor.
    """
    if x.device.type == "cpu":
        return int(loops.fingerprint(x.numpy().view(_NUMPY_BITS[x.dtype])))
    return fingerprint_by_passes(x)


def fingerprint_by_passes(x: Tensor) -> Tensor:
    """`fingerprint` as tensor operations, for any device: 0-dim int64."""
    mixed = x.view(_BITS[x.dtype]).to(torch.int64, copy=True)  # float64's bits are int64 already, and x is the caller's
    mixed = mixed.add_(torch.arange(len(x), device=x.device).mul_(loops.STEP)).mul_(loops.FIRST)
    return mixed.bitwise_xor_(mixed >> 32).mul_(loops.SECOND).sum()


class Fingerprints:
    """One fingerprint per step, kept on the way forward: 8 bytes a step."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self._kept: Any = (
            np.zeros(steps, np.int64) if device.type == "cpu" else torch.zeros(steps, dtype=torch.int64, device=device)
        )

    def record(self, k: int, x: Tensor) -> None:
        """Keep x's fingerprint for step k."""
        self._kept[k] = fingerprint(x)

    def matches(self, k: int, x: Tensor) -> bool | Tensor:
        """Whether x is what was recorded for step k; on other devices than the CPU a 0-dim bool tensor."""
        found = self._kept[k] == fingerprint(x)
        return found if isinstance(found, Tensor) else bool(found)
