"""How much longer dL/dtheta gets on the way back: how much training amplifies what its start is changed by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Amplification:
    """|dL/dtheta_k| at the first step of the way, in terms of what entered it; read once the way back is over."""

    def __init__(self) -> None:
        self._entered: Tensor | None = None
        self._ended: Tensor | None = None

    def begin(self, bars: Sequence[Tensor]) -> None:
        """bars: dL/d(the results), all of them."""
        self._entered = torch.stack([torch.linalg.vector_norm(bar, dtype=torch.float64) for bar in bars]).sum()

    def end(self, theta_bar: Tensor) -> None:
        """theta_bar: dL/d(theta) before the first step."""
        self._ended = torch.linalg.vector_norm(theta_bar, dtype=torch.float64)

    @property
    def value(self) -> float | None:
        """None before the way back, and where nothing entered it."""
        if self._entered is None or self._ended is None or not float(self._entered):
            return None
        return float(self._ended) / float(self._entered)
