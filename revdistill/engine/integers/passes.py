"""The integer work as tensor operations, for any device.

Heads are divided by n as a float64 tensor on their own device: by a number, or by a tensor on the host, CUDA divides as
a multiplication by the rounded reciprocal, whose floor is now and then another one (after 40 steps at n = 58982 for a
quarter of all heads).
"""

from __future__ import annotations

import torch
from torch import Tensor

from revdistill.engine.integers.backend import FIRST, SECOND, STEP, Backend, Numerator, Scalar
from revdistill.engine.integers.fixedpoint import LOW_BITS, LOW_MASK, Format, Wide
from revdistill.engine.integers.radix import COARSE, FINE, Radix

INTERVAL = 32
_KEPT = 64  # divisors
_FINE = FINE.base - 1
# of two words the low one is taken in two limbs of 30 bits, the high one in 31 bits and the rest
_THIRD = (1 << 31) - 1
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}

Number = int | Tensor  # n as a number, or as a 0-dim int64 tensor


class Passes(Backend):
    """Tensor operations; nothing waits for the device."""

    interval = INTERVAL

    def __init__(self) -> None:
        self._divisors: dict[tuple[int, torch.device], Tensor] = {}

    def divisor(self, n: Numerator, device: torch.device) -> Tensor:
        """n as what heads are divided by: 0-dim float64, filled there, and kept for the next step."""
        if isinstance(n, Tensor):
            return n
        key = n, device
        if key not in self._divisors:
            if len(self._divisors) == _KEPT:
                del self._divisors[next(iter(self._divisors))]
            self._divisors[key] = torch.full((), n, dtype=torch.float64, device=device)
        return self._divisors[key]

    def multiply(self, v: Tensor, head: Tensor, n: Numerator, radix: Radix) -> None:
        multiply_(v, head, _integer(n), self.divisor(n, head.device), radix)

    def divide(self, v: Tensor, head: Tensor, n: Numerator, radix: Radix) -> None:
        divide_(v, head, _integer(n), self.divisor(n, head.device), radix)

    def add(self, target: Tensor, source: Tensor, factor: Scalar, sign: int) -> None:
        add_(target, source, factor, sign)

    def to_float(self, q: Tensor, out: Tensor, form: Format) -> Tensor:
        self.settle()
        if form.words == 1:
            return out.copy_(q.to(torch.float64).mul_(form.resolution))
        # the nearest multiple of 2^60: a small negative number is no difference of large ones
        carry = q[1] >> (LOW_BITS - 1)
        high = (q[0] + carry).to(torch.float64).mul_(Wide.resolution * 2.0**LOW_BITS)
        return out.copy_(high.add_((q[1] - (carry << LOW_BITS)).to(torch.float64).mul_(Wide.resolution)))

    def largest(self, x: Tensor) -> float | Tensor:
        if not x.numel():
            return 0.0
        low, high = torch.aminmax(x)
        return torch.maximum(low.abs(), high)

    def fingerprint(self, x: Tensor) -> int | Tensor:
        # float64's bits are int64 already, and x is the caller's
        mixed = x.view(_BITS[x.dtype]).to(torch.int64, copy=True)
        mixed = mixed.add_(torch.arange(len(x), device=x.device).mul_(STEP)).mul_(FIRST)
        return mixed.bitwise_xor_(mixed >> 32).mul_(SECOND).sum()

    def root(self, x: Tensor) -> Tensor:
        return x.sqrt()


def _integer(n: Numerator) -> Number:
    return n.to(torch.int64) if isinstance(n, Tensor) else n


def multiply_(v: Tensor, head: Tensor, n: Number, divisor: Tensor, radix: Radix) -> None:
    """`Backend.multiply`, with n as a float64 on the device."""
    quotient = head.to(torch.float64).div_(divisor).to(torch.int64)
    digit = _add_multiple(head, quotient, n, -1, out=head)
    if radix.words == 2:
        low = _multiply_words(v, digit, n)
    else:  # v n would not fit 64 bits, so v is taken in two parts
        low = _add_multiple(digit, v & (radix.base - 1), n, 1)
        # The arithmetic shift is the floor division that matches `v & mask` for negative v too.
        _add_multiple(low >> radix.bits, v.bitwise_right_shift_(radix.bits), n, 1, out=v)
    torch.bitwise_left_shift(quotient, radix.bits, out=head)
    head.bitwise_or_(low.bitwise_and_(radix.base - 1))


def divide_(v: Tensor, head: Tensor, n: Number, divisor: Tensor, radix: Radix) -> None:
    """`Backend.divide`, with n as a float64 on the device."""
    if radix.words == 2:
        digit = _divide_words(v, head, n)
        _add_multiple(digit, head.bitwise_right_shift_(radix.bits), n, 1, out=head)
        return
    # w / n in two parts, w = v 2^bits + (low bits of head). The first quotient is rounded to float64 and a little off;
    # the second, of what that left and the low bits, is exact and makes up for it.
    near = v.to(torch.float64).div_(divisor).to(torch.int64)
    low = _add_multiple(v, near, n, -1, out=v).bitwise_left_shift_(radix.bits).bitwise_or_(head & (radix.base - 1))
    # COARSE: the first quotient is off by at most 2^10, so that |low| < 2^43, and floats divide exactly enough.
    in_floats = radix == COARSE
    quotient = low.to(torch.float64).div_(divisor).floor_().to(torch.int64) if in_floats else _floor(low, n)
    digit = _add_multiple(low, quotient, n, -1, out=low)  # in v's memory: head takes it before v is written
    _add_multiple(digit, head.bitwise_right_shift_(radix.bits), n, 1, out=head)
    torch.bitwise_left_shift(near, radix.bits, out=v)
    v.add_(quotient)


def _multiply_words(v: Tensor, digit: Tensor, n: Number) -> Tensor:
    """v <- floor((v n + digit) / 2^30); returns the low bits, and others above them."""
    high, low = v[0], v[1]
    first = _add_multiple(digit, low & _FINE, n, 1)
    second = _add_multiple(first >> FINE.bits, low >> FINE.bits, n, 1)
    third = _add_multiple(second >> FINE.bits, high & _THIRD, n, 1)
    fourth = _add_multiple(third >> 31, high >> 31, n, 1)
    end = ((third & _THIRD) << FINE.bits) | (second & _FINE)
    torch.add(fourth << 1, end >> LOW_BITS, out=high)
    torch.bitwise_and(end, LOW_MASK, out=low)
    return first


def _divide_words(v: Tensor, head: Tensor, n: Number) -> Tensor:
    """v <- floor((v 2^30 + low bits of head) / n); returns the remainder. Long division, by 30 bits after the first
    word.
    """
    high, low = v[0], v[1]
    quotients = [_floor(high, n)]
    rest = _add_multiple(high, quotients[0], n, -1)
    for limb in (low >> FINE.bits, low & _FINE, head & _FINE):
        rest = (rest << FINE.bits) | limb
        quotients.append(_floor(rest, n))
        rest = _add_multiple(rest, quotients[-1], n, -1)
    torch.add(quotients[0] << FINE.bits, quotients[1], out=high)
    torch.bitwise_or(quotients[2] << FINE.bits, quotients[3], out=low)
    return rest


def _add_multiple(a: Tensor, b: Tensor, n: Number, sign: int, out: Tensor | None = None) -> Tensor:
    """a + sign n b, in one pass where n is a number."""
    if isinstance(n, int):
        return torch.add(a, b, alpha=sign * n, out=out)
    return torch.add(a, b * n, alpha=sign, out=out)


def _floor(a: Tensor, n: Number) -> Tensor:
    return torch.div(a, n, rounding_mode="floor")  # of integers: exact on every device


def add_(target: Tensor, source: Tensor, factor: Scalar, sign: int) -> None:
    """`Backend.add`."""
    amount = source.to(torch.float64, copy=True).mul_(factor)
    if target.ndim == 1:
        target.add_(amount.round_().to(torch.int64), alpha=sign)
        return
    upper = torch.trunc(amount * 2.0**-LOW_BITS)
    # Exact: upper has the amount's upper bits and its sign, so the difference is its lower ones.
    lower = amount.sub_(upper * 2.0**LOW_BITS).round_().to(torch.int64)
    end = torch.add(target[1], lower, alpha=sign)
    target[0].add_(upper.to(torch.int64), alpha=sign).add_(end >> LOW_BITS)
    target[1].copy_(end.bitwise_and_(LOW_MASK))
