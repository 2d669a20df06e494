"""Fixed-point numbers: int64 with a stated number of fractional bits.

Every rule of exact reversal lives on one fact: integers add and subtract without rounding. An update is therefore one
floating-point multiplication followed by one rounding to an integer (invariant 2 of the engine), and its inverse
subtracts the very same integer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.engine.integers import loops

# |stored integer| stays below 2^62, so that the sum of two of them cannot pass 2^63 and wrap around.
INTEGER_BITS = 62


@dataclass(frozen=True)
class FixedPoint:
    """The number format of theta and v: an int64 q stands for q / 2^fractional_bits.

    fractional_bits: 1 to 60. Resolution 2^-fractional_bits, range |value| < 2^(62 - fractional_bits). The default of 44
    resolves 5.7e-14 and leaves room for weights and velocities up to 262,144.
    """

    fractional_bits: int = 44

    def __post_init__(self) -> None:
        bits = self.fractional_bits
        if isinstance(bits, bool) or not isinstance(bits, int):
            raise TypeError(f"fractional_bits must be an int, got {type(bits).__name__}")
        if not 1 <= bits <= 60:
            raise ValueError(f"fractional_bits must be between 1 and 60, got {bits}")

    @property
    def scale(self) -> float:
        """Integers per unit, a power of two: multiplying by it is exact."""
        return 2.0**self.fractional_bits

    @property
    def resolution(self) -> float:
        return 2.0**-self.fractional_bits

    @property
    def limit(self) -> float:
        """Values must stay strictly below this in magnitude."""
        return 2.0 ** (INTEGER_BITS - self.fractional_bits)

    def from_float(self, x: Tensor) -> Tensor:
        """The nearest fixed-point numbers, int64, same shape. The caller has checked the range."""
        return x.to(torch.float64, copy=True).mul_(self.scale).round_().to(torch.int64)

    def to_float(self, q: Tensor, *, out: Tensor) -> Tensor:
        """Write the values of the integers q into `out` (float32 or float64), rounded to float64 and then to out's
        dtype.
        """
        if q.device.type == "cpu":
            loops.to_float(q.numpy(), out.numpy(), self.resolution)
            return out
        return out.copy_(q.to(torch.float64).mul_(self.resolution))


def add_rounded_(target: Tensor, source: Tensor, factor: float | Tensor, *, sign: int) -> None:
    """target += sign * round(factor * source), int64 [numel] in place; sign is 1 or -1.

    source: float, or int64 (a fixed-point number), that requires no grad; factor: a float, or float64 [numel]. The
    product is taken in float64 and rounded once, so the call with the other sign undoes this one bit for bit.
    """
    if target.device.type != "cpu":
        add_rounded_by_passes_(target, source, factor, sign=sign)
    elif isinstance(factor, Tensor):
        loops.add_rounded_each(target.numpy(), source.numpy(), (factor * sign).numpy())
    else:
        loops.add_rounded(target.numpy(), source.numpy(), factor * sign)


def add_rounded_by_passes_(target: Tensor, source: Tensor, factor: float | Tensor, *, sign: int) -> None:
    """`add_rounded_` as tensor operations, for any device."""
    amount = source.to(torch.float64, copy=True).mul_(factor).round_().to(torch.int64)
    target.add_(amount, alpha=sign)
