"""Is a float tensor the same to the bit? One number per step tells.

Each element's bits are mixed with its position, nonlinearly: differences of a last bit here and there do not cancel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from revdistill.engine.integers.select import backend_for


class Fingerprints:
    """One fingerprint per step, kept on the way forward: 8 bytes a step."""

    def __init__(self, steps: int, device: torch.device) -> None:
        backend = backend_for(device)
        self._fingerprint = backend.fingerprint
        self.immediate = backend.interval == 1  # whether `matches` gives a bool
        self._kept: Any = (
            np.zeros(steps, np.int64) if self.immediate else torch.zeros(steps, dtype=torch.int64, device=device)
        )

    def record(self, k: int, x: Tensor) -> None:
        """Keep x's fingerprint for step k."""
        self._kept[k] = self._fingerprint(x)

    def matches(self, k: int, x: Tensor) -> bool | Tensor:
        """Whether x is what was recorded for step k; a 0-dim bool tensor where to look at it costs a wait."""
        found = self._kept[k] == self._fingerprint(x)
        return found if isinstance(found, Tensor) else bool(found)

    def record_many(self, first: int, found: Tensor) -> None:
        """Keep those of the steps from `first` on, int64 [n], on the device."""
        self._kept[first : first + len(found)] = found

    def recorded(self, first: int, last: int) -> list[int]:
        """Those of the steps from `first` to before `last`, in one wait for the device."""
        return self._kept[first:last].tolist()  # type: ignore[no-any-return]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of floats or integers are the same: a NaN is itself, and -0 is not 0."""
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}.get(a.element_size(), a.dtype)
    return a.dtype == b.dtype and torch.equal(a.detach().view(words), b.detach().view(words))


def fingerprint_of(t: Tensor) -> int:
    """Of a tensor of any dtype and shape: of its bits, or of its values where its dtype is a narrower one."""
    flat = t.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.dtype == torch.int64:
        flat = flat.view(torch.float64)
    elif flat.dtype not in (torch.float32, torch.float64):
        flat = flat.double()
    return int(backend_for(flat.device).fingerprint(flat))
