"""Is a float tensor the same to the bit? One number per step tells.

Each element's bits are mixed with its position, nonlinearly: differences of a last bit here and there do not cancel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from revdistill.engine.integers.backend import backend_for

# Odd constants of splitmix64 (Steele, Lea & Flood 2014), as signed 64-bit integers; sums and products wrap around.
STEP, FIRST, SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


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
