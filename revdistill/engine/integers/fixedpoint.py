"""Fixed-point numbers: integers with a stated number of fractional bits.

Every rule of exact reversal lives on one fact: integers add and subtract without rounding. An update is therefore one
floating-point multiplication followed by one rounding to an integer (invariant 2 of the engine), and its inverse
subtracts the very same integer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

# |stored integer| stays below 2^62, so that the sum of two of them cannot pass 2^63 and wrap around.
INTEGER_BITS = 62
LOW_BITS = 60  # of a number in two words
LOW_MASK = (1 << LOW_BITS) - 1


class Format(Protocol):
    """How integers stand for numbers. scale: integers per unit, a power of two: multiplying by it is exact; resolution:
    1 / scale; limit: values must stay strictly below it in magnitude; words: int64s per number.
    """

    words: ClassVar[int]

    @property
    def scale(self) -> float: ...
    @property
    def resolution(self) -> float: ...
    @property
    def limit(self) -> float: ...

    def zeros(self, numel: int, device: torch.device) -> Tensor:
        """`numel` numbers: int64 [numel], or [2, numel] of two words."""


@dataclass(frozen=True)
class FixedPoint:
    """The number format of theta and v: an int64 q stands for q / 2^fractional_bits.

    The default of 44 fractional bits resolves 5.7e-14 and leaves room for weights and velocities up to 262,144.

    Args:
        fractional_bits: 1 to 60. Resolution 2^-fractional_bits, range |value| < 2^(62 - fractional_bits).

    Raises:
        TypeError, ValueError: fractional_bits is no int, or not from 1 to 60.
    """

    fractional_bits: int = 44
    words: ClassVar[int] = 1
    # Looked up several times a step.
    scale: float = field(init=False, repr=False, compare=False)
    resolution: float = field(init=False, repr=False, compare=False)
    limit: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        bits = self.fractional_bits
        if isinstance(bits, bool) or not isinstance(bits, int):
            raise TypeError(f"fractional_bits must be an int, got {type(bits).__name__}")
        if not 1 <= bits <= 60:
            raise ValueError(f"fractional_bits must be between 1 and 60, got {bits}")
        object.__setattr__(self, "scale", 2.0**bits)
        object.__setattr__(self, "resolution", 2.0**-bits)
        object.__setattr__(self, "limit", 2.0 ** (INTEGER_BITS - bits))

    def zeros(self, numel: int, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=torch.int64, device=device)

    def from_float(self, x: Tensor) -> Tensor:
        """The nearest fixed-point numbers, int64, same shape. The caller has checked the range."""
        return x.to(torch.float64, copy=True).mul_(self.scale).round_().to(torch.int64)


class Wide:
    """Numbers in two words, for Adam's moments: int64 [2, numel], standing for (high 2^60 + low) / 2^94, 0 <= low <
    2^60.

    Adam divides by sqrt(s), so that the *relative* precision of both moments counts, for gradients from 1e-9 to 1e4: s
    from
    1e-21 to 1e8. One word cannot have both precision and range: with 58 fractional bits s has room for |g| < 5 only,
    and one unit of it is 2e-9 under the root, a fifth of Adam's usual eps; with 44, one unit of m is 6e-14, 6e-5 of a
    gradient of
    1e-9. A scale per tensor, or a floating exponent, would have to change along the way, and to change back exactly.
    Two words have 94 fractional bits, as far as 30-bit limbs go in 64-bit arithmetic: one unit is 1e-14 under the root,
    1e-6 of Adam's usual eps; and values may reach 2^28, |g| = 16,384. They cost 8 bytes more per parameter and moment,
    and not a bit of history.
    """

    fractional_bits: ClassVar[int] = 94
    words: ClassVar[int] = 2
    scale = 2.0**fractional_bits
    resolution = 2.0**-fractional_bits
    limit = 2.0 ** (INTEGER_BITS + LOW_BITS - fractional_bits)

    def zeros(self, numel: int, device: torch.device) -> Tensor:
        return torch.zeros(2, numel, dtype=torch.int64, device=device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Wide)

    def __hash__(self) -> int:
        return hash(Wide)
