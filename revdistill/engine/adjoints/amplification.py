"""How much longer dL/dtheta gets on the way back: how much training amplifies what its start is changed by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Amplification:
    """|dL/dtheta_k| at the first step of the way, in terms of what entered it; read once the way back is over.

    Of several losses at once, the largest.
    """

    def __init__(self) -> None:
        self._entered: Tensor | None = None
        self._ended: Tensor | None = None

    def begin(self, bars: Sequence[Tensor], whole: Callable[[Tensor], Tensor], *, many: bool = False) -> None:
        """bars: dL/d(the results), all of them; whole: makes of their norms those of what they are parts of; many:
        whether they have a first dimension of K losses.
        """
        self._entered = torch.stack([whole(_norm(bar, many)) for bar in bars]).sum(0)

    def end(self, theta_bar: Tensor, whole: Callable[[Tensor], Tensor]) -> None:
        """theta_bar: dL/d(theta) before the first step, [numel] or [K, numel]; whole: likewise."""
        self._ended = whole(_norm(theta_bar, theta_bar.ndim > 1))

    @property
    def value(self) -> float | None:
        """None before the way back, and where nothing entered it."""
        if self._entered is None or self._ended is None or not bool(self._entered.any()):
            return None
        return float((self._ended / self._entered).nan_to_num(0.0, posinf=0.0).max())


def _norm(bar: Tensor, many: bool) -> Tensor:
    """Float64 [], or [K]."""
    norm: Tensor = torch.linalg.vector_norm(
        bar.flatten(1) if many else bar, dim=1 if many else None, dtype=torch.float64
    )
    return norm
