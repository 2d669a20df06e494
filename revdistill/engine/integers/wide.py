"""Numbers in two words, for Adam's moments: int64 [2, numel], standing for (high 2^60 + low) / 2^94, 0 <= low < 2^60.

Adam divides by sqrt(s), so that the *relative* precision of both moments counts, for gradients from 1e-9 to 1e4: s from
1e-21 to
1e8. One word cannot have both precision and range: with 58 fractional bits s has room for |g| < 5 only, and one unit of
it is
2e-9 under the root, a fifth of Adam's usual eps; with 44, one unit of m is 6e-14, 6e-5 of a gradient of 1e-9. A scale
per tensor, or a floating exponent, would have to change along the way, and to change back exactly. Two words have 94
fractional bits, as far as 30-bit limbs go in 64-bit arithmetic: one unit is 1e-14 under the root, 1e-6 of Adam's usual
eps; and values may reach 2^28, |g| = 16,384. They cost 8 bytes more per parameter and moment, and not a bit of history.
"""

from __future__ import annotations

import torch
from torch import Tensor

from revdistill.engine.integers import loops
from revdistill.engine.integers.fixedpoint import add_rounded_, add_rounded_by_passes_

FRACTIONAL_BITS = 94
LOW_BITS = 60
LOW_MASK = (1 << LOW_BITS) - 1


class Wide:
    """The number format; the counterpart of `fixedpoint.FixedPoint`, which has one word."""

    scale = 2.0**FRACTIONAL_BITS
    resolution = 2.0**-FRACTIONAL_BITS
    limit = 2.0 ** (62 + LOW_BITS - FRACTIONAL_BITS)

    @staticmethod
    def zeros(numel: int, device: torch.device) -> Tensor:
        return torch.zeros(2, numel, dtype=torch.int64, device=device)

    @staticmethod
    def to_float(q: Tensor, *, out: Tensor) -> Tensor:
        """Write the values of q [2, numel] into `out` (float32 or float64, [numel])."""
        if q.device.type == "cpu":
            loops.wide_to_float(q[0].numpy(), q[1].numpy(), out.numpy())
            return out
        return out.copy_(to_float_by_passes(q))


def to_float_by_passes(q: Tensor) -> Tensor:
    """`Wide.to_float` as tensor operations, for any device; float64."""
    carry = q[1] >> (
        LOW_BITS - 1
    )  # the nearest multiple of 2^60: a small negative number is not a difference of large ones
    high = (q[0] + carry).to(torch.float64).mul_(2.0 ** (LOW_BITS - FRACTIONAL_BITS))
    return high.add_((q[1] - (carry << LOW_BITS)).to(torch.float64).mul_(2.0**-FRACTIONAL_BITS))


def add_(target: Tensor, source: Tensor, factor: float | Tensor, *, sign: int) -> None:
    """`add_rounded_` where the target has one word [numel], `add_rounded_wide_` where it has two [2, numel]."""
    (add_rounded_ if target.ndim == 1 else add_rounded_wide_)(target, source, factor, sign=sign)


def add_by_passes_(target: Tensor, source: Tensor, factor: float | Tensor, *, sign: int) -> None:
    """`add_` as tensor operations, for any device."""
    (add_rounded_by_passes_ if target.ndim == 1 else add_rounded_wide_by_passes_)(target, source, factor, sign=sign)


def add_rounded_wide_(target: Tensor, source: Tensor, factor: float | Tensor, *, sign: int) -> None:
    """target [2, numel] += sign * round(factor * source) in place; the call with the other sign undoes it."""
    if target.device.type != "cpu":
        add_rounded_wide_by_passes_(target, source, factor, sign=sign)
    elif isinstance(factor, Tensor):
        loops.add_rounded_wide_each(target[0].numpy(), target[1].numpy(), source.numpy(), factor.numpy(), sign)
    else:
        loops.add_rounded_wide(target[0].numpy(), target[1].numpy(), source.numpy(), factor, sign)


def add_rounded_wide_by_passes_(target: Tensor, source: Tensor, factor: float | Tensor, *, sign: int) -> None:
    """`add_rounded_wide_` as tensor operations, for any device."""
    amount = source.to(torch.float64, copy=True).mul_(factor)
    upper = torch.trunc(amount * 2.0**-LOW_BITS)
    # Exact: upper has the amount's upper bits and its sign, so the difference is its lower ones.
    lower = amount.sub_(upper * 2.0**LOW_BITS).round_().to(torch.int64)
    end = torch.add(target[1], lower, alpha=sign)
    target[0].add_(upper.to(torch.int64), alpha=sign).add_(end >> LOW_BITS)
    target[1].copy_(end.bitwise_and_(LOW_MASK))
