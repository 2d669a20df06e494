"""Multiplying integers by n / radix, exactly invertible: a base-n digit comes from a head, the low bits of the product
go to it.

Three arithmetics, each with its loops for the CPU and as tensor operations for any device, with the same bits:

    COARSE  int64 [numel], radix 2^16: a momentum. The inverse needs no integer division.
    FINE    int64 [numel], radix 2^30: factors near 1 that must be met well, such as 1 - lr weight_decay.
    WIDE    int64 [2, numel] (see `wide`), radix 2^30: Adam's moments.

v becomes floor((v n + digit) / radix), and the head floor(head / n) radix + (the low bits of v n + digit).

Passes divide by `divisor`, n as a float64 on the tensors' own device: by a number, or by a tensor on the host, CUDA
divides as a multiplication by the rounded reciprocal, whose floor is now and then another one (after 40 steps at n =
58982 for a quarter of all heads).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.engine.integers import loops
from revdistill.engine.integers.wide import LOW_BITS, LOW_MASK

# float64 holds integers below 2^53, and floor(fl(a / n)) = floor(a / n) for n < 2^52 and 0 <= a <= 2^52: a quotient
# that is no integer is at least 1 / n below the next one, further than half of its last bit. Float division is what
# processors do fast.
HEAD_BITS = 52
_FINE_BITS = 30
_FINE = (1 << _FINE_BITS) - 1
_THIRD = (1 << 31) - 1  # WIDE takes its low word in two, its high word in 31 bits and the rest

Number = int | Tensor  # n as a number, or as a 0-dim int64 tensor
InPlace = Callable[[Tensor, Tensor, Number, Tensor], None]


@dataclass(frozen=True)
class Scaling:
    """`multiply_(v, head, n)` and its inverse `divide_`, in place. divisor: see `divisor_of`; made anew where it is not
    given.

    Need |v| < 2^62 (WIDE: |high| < 2^62), 0 <= head < 2^52 with floor(head / n) radix <= 2^52, and 1 <= n < radix.
    """

    radix_bits: int
    multiply_loop: Callable[..., None]
    divide_loop: Callable[..., None]
    multiply_by_passes_: InPlace
    divide_by_passes_: InPlace

    @property
    def radix(self) -> int:
        return 1 << self.radix_bits

    def quantise(self, factor: float) -> int:
        """The numerator n of the nearest n / radix (0 <= factor <= 1)."""
        return round(factor * self.radix)

    def multiply_(self, v: Tensor, head: Tensor, n: int, divisor: Tensor | None = None) -> None:
        if v.device.type == "cpu":
            self.multiply_loop(*_words(v), head.numpy(), n)
        else:
            self.multiply_by_passes_(v, head, n, divisor_of(n, v.device) if divisor is None else divisor)

    def divide_(self, v: Tensor, head: Tensor, n: int, divisor: Tensor | None = None) -> None:
        if v.device.type == "cpu":
            self.divide_loop(*_words(v), head.numpy(), n)
        else:
            self.divide_by_passes_(v, head, n, divisor_of(n, v.device) if divisor is None else divisor)


def divisor_of(n: int, device: torch.device) -> Tensor:
    """n as what passes on this device divide by: 0-dim float64, filled there, so that nothing waits."""
    return torch.full((), n, dtype=torch.float64, device=device)


def _words(v: Tensor) -> tuple[object, ...]:
    return (v.numpy(),) if v.ndim == 1 else (v[0].numpy(), v[1].numpy())


def _pop(head: Tensor, n: Number, divisor: Tensor) -> tuple[Tensor, Tensor]:
    """(floor(head / n), digit); the digit takes the head's memory."""
    quotient = head.to(torch.float64).div_(divisor).to(torch.int64)
    return quotient, _add_multiple(head, quotient, n, -1, out=head)


def _add_multiple(a: Tensor, b: Tensor, n: Number, sign: int, out: Tensor | None = None) -> Tensor:
    """a + sign n b, in one pass where n is a number."""
    if isinstance(n, int):
        return torch.add(a, b, alpha=sign * n, out=out)
    return torch.add(a, b * n, alpha=sign, out=out)


def _multiply_one_word(bits: int) -> InPlace:
    mask = (1 << bits) - 1

    def multiply_(v: Tensor, head: Tensor, n: Number, divisor: Tensor) -> None:
        # v n would not fit 64 bits, so v is taken in two parts.
        quotient, digit = _pop(head, n, divisor)
        low = _add_multiple(digit, v & mask, n, 1)
        # The arithmetic shift is the floor division that matches `v & mask` for negative v too.
        _add_multiple(low >> bits, v.bitwise_right_shift_(bits), n, 1, out=v)
        torch.bitwise_left_shift(quotient, bits, out=head)
        head.bitwise_or_(low.bitwise_and_(mask))

    return multiply_


def _divide_one_word(bits: int, floor_divide: Callable[[Tensor, Number, Tensor], Tensor]) -> InPlace:
    mask = (1 << bits) - 1

    def divide_(v: Tensor, head: Tensor, n: Number, divisor: Tensor) -> None:
        # w / n in two parts, w = v 2^bits + (low bits of head). The first quotient is rounded to float64 and a little
        # off; the second, of what that left and the low bits, is exact and makes up for it.
        near = v.to(torch.float64).div_(divisor).to(torch.int64)
        low = _add_multiple(v, near, n, -1, out=v).bitwise_left_shift_(bits).bitwise_or_(head & mask)
        quotient = floor_divide(low, n, divisor)
        digit = _add_multiple(low, quotient, n, -1, out=low)
        _add_multiple(digit, head.bitwise_right_shift_(bits), n, 1, out=head)
        torch.bitwise_left_shift(near, bits, out=v)
        v.add_(quotient)

    return divide_


def _floor_by_float(a: Tensor, n: Number, divisor: Tensor) -> Tensor:
    """COARSE: the first quotient is off by at most 2^10, so that |a| < 2^43."""
    return a.to(torch.float64).div_(divisor).floor_().to(torch.int64)


def _floor(a: Tensor, n: Number, divisor: Tensor) -> Tensor:
    return torch.div(a, n, rounding_mode="floor")  # of integers: exact on every device


def _multiply_wide(v: Tensor, head: Tensor, n: Number, divisor: Tensor) -> None:
    high, low = v[0], v[1]
    quotient, digit = _pop(head, n, divisor)
    first = _add_multiple(digit, low & _FINE, n, 1)
    second = _add_multiple(first >> _FINE_BITS, low >> _FINE_BITS, n, 1)
    third = _add_multiple(second >> _FINE_BITS, high & _THIRD, n, 1)
    fourth = _add_multiple(third >> 31, high >> 31, n, 1)
    end = ((third & _THIRD) << _FINE_BITS) | (second & _FINE)
    torch.add(fourth << 1, end >> LOW_BITS, out=high)
    torch.bitwise_and(end, LOW_MASK, out=low)
    torch.bitwise_or(quotient << _FINE_BITS, first & _FINE, out=head)


def _divide_wide(v: Tensor, head: Tensor, n: Number, divisor: Tensor) -> None:
    high, low = v[0], v[1]
    quotients = [_floor(high, n, divisor)]  # long division, by 30 bits at a time after the first word
    rest = _add_multiple(high, quotients[0], n, -1)
    for limb in (low >> _FINE_BITS, low & _FINE, head & _FINE):
        rest = (rest << _FINE_BITS) | limb
        quotients.append(_floor(rest, n, divisor))
        rest = _add_multiple(rest, quotients[-1], n, -1)
    torch.add(quotients[0] << _FINE_BITS, quotients[1], out=high)
    torch.bitwise_or(quotients[2] << _FINE_BITS, quotients[3], out=low)
    _add_multiple(rest, head >> _FINE_BITS, n, 1, out=head)


COARSE = Scaling(16, loops.multiply, loops.divide, _multiply_one_word(16), _divide_one_word(16, _floor_by_float))
FINE = Scaling(_FINE_BITS, loops.multiply_fine, loops.divide_fine, _multiply_one_word(30), _divide_one_word(30, _floor))
WIDE = Scaling(_FINE_BITS, loops.multiply_wide, loops.divide_wide, _multiply_wide, _divide_wide)
