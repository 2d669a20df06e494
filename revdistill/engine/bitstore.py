"""The bit store: exact multiplication of integers by n / 2^16, and its exact inverse.

Multiplying v by n / 2^16 < 1 destroys log2(2^16 / n) bits per element. Here they are kept on an entropy stack, one int64
`head` per element (the information buffer of Maclaurin, Duvenaud & Adams 2015, algorithm 3). First a base-n digit is popped
and v becomes w = v n + digit, which can be undone since digit = w mod n; then w is shortened to v' = floor(w / 2^16) and its
low 16 bits are pushed. The paper pushes first, which leaves 16 low bits of v' to chance; in this order v' is within one unit
of v n / 2^16, at the same cost in bits.

When a head could get too long, the low 16 bits of every element are spilled to a `History` as one tensor of words. Whether to
spill is decided by one number, the proved upper bound on all heads, never by data: both directions agree on it without
looking, and nothing waits for the device.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from revdistill.engine import loops
from revdistill.engine.history import History

RADIX_BITS = 16
RADIX = 1 << RADIX_BITS
_LOW = RADIX - 1
_WORD_BITS = 16
_WORD = (1 << _WORD_BITS) - 1
# float64 holds integers below 2^53, and floor(fl(a / n)) = floor(a / n) for n < 2^16 and 0 <= a <= 2^52: a quotient that is no
# integer is at least 1 / n below the next one, further than half of its last bit. Float division is what processors do fast.
_HEAD_BITS = 52


def quantise(momentum: float) -> int:
    """The numerator n of the nearest n / 2^16 (0 <= momentum <= 1)."""
    return round(momentum * RADIX)


def multiply_(v: Tensor, head: Tensor, n: int) -> None:
    """v <- floor((v n + digit) / 2^16) in place, the digit from head and the remainder into it (int64 [numel]).

    Needs |v| < 2^62, 0 <= head < 2^52 with head / n < 2^36, and 1 <= n < 2^16.
    """
    if v.device.type == "cpu":
        loops.multiply(v.numpy(), head.numpy(), n)
    else:
        multiply_by_passes_(v, head, n)


def divide_(v: Tensor, head: Tensor, n: int) -> None:
    """The inverse of `multiply_`: w = 2^16 v + (low 16 bits of head) is divided by n, the rest is pushed back."""
    if v.device.type == "cpu":
        loops.divide(v.numpy(), head.numpy(), n)
    else:
        divide_by_passes_(v, head, n)


def multiply_by_passes_(v: Tensor, head: Tensor, n: int | Tensor) -> None:
    """`multiply_` as tensor operations, for any device. v n would not fit 64 bits, so v is taken in two parts."""
    quotient = _divide(head, n).to(torch.int64)
    low = _add_multiple(_add_multiple(head, quotient, n, -1, out=head), v & _LOW, n, 1)
    # The arithmetic shift is the floor division that matches `v & _LOW` for negative v too.
    _add_multiple(low >> RADIX_BITS, v.bitwise_right_shift_(RADIX_BITS), n, 1, out=v)
    torch.bitwise_left_shift(quotient, RADIX_BITS, out=head)
    head.bitwise_or_(low.bitwise_and_(_LOW))


def divide_by_passes_(v: Tensor, head: Tensor, n: int | Tensor) -> None:
    """`divide_` as tensor operations, for any device.

    w / n is taken in two parts. The first quotient is rounded to float64, off by at most 2^10; the second, of what that left
    and the low bits (below 2^43 in magnitude), is exact and makes up for it.
    """
    near = _divide(v, n).to(torch.int64)
    low = _add_multiple(v, near, n, -1, out=v).bitwise_left_shift_(RADIX_BITS).bitwise_or_(head & _LOW)
    quotient = _divide(low, n).floor_().to(torch.int64)
    digit = _add_multiple(low, quotient, n, -1, out=low)
    _add_multiple(digit, head.bitwise_right_shift_(RADIX_BITS), n, 1, out=head)
    torch.bitwise_left_shift(near, RADIX_BITS, out=v)
    v.add_(quotient)


def _divide(a: Tensor, n: int | Tensor) -> Tensor:
    return a.to(torch.float64).div_(n)


def _add_multiple(a: Tensor, b: Tensor, n: int | Tensor, sign: int, out: Tensor | None = None) -> Tensor:
    """a + sign n b, in one pass where n is a number."""
    if isinstance(n, int):
        return torch.add(a, b, alpha=sign * n, out=out)
    return torch.add(a, b * n, alpha=sign, out=out)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class BitStore:
    """Exact decay of one int64 tensor, and back.

    shape, device: those of the tensors to come. history: where spilled words go. Cost: 8 bytes per element for the head
    and log2(2^16 / n) bits per element and call, in words of 16; for n = 0 the 64 bits of v whole.

    Invariant: 0 <= head < bound, elementwise, and `bound` depends on the past n alone.
    """

    def __init__(self, shape: torch.Size | tuple[int, ...], device: torch.device, history: History) -> None:
        self.head = torch.zeros(shape, dtype=torch.int64, device=device)
        self.history = history
        self._bound = 1
        self._past_bounds = array("Q")  # the bound before each call, so that the way back reads off what the way out did

    def __len__(self) -> int:
        """Calls of `decay_` not undone yet."""
        return len(self._past_bounds)

    def decay_(self, v: Tensor, n: int) -> None:
        """v <- v * n / 2^16 in place, exactly invertible. 0 <= n <= 2^16."""
        if self.before_decay(v, n):
            multiply_(v, self.head, n)

    def undecay_(self, v: Tensor, n: int) -> None:
        """The inverse of the last `decay_` (same n)."""
        if self.pushes(n):
            divide_(v, self.head, n)
        self.after_undecay(v, n)

    @staticmethod
    def pushes(n: int) -> bool:
        """Whether a decay by n goes through the heads: by 0 it stores v whole, by 1 it loses nothing."""
        return 0 < n < RADIX

    def before_decay(self, v: Tensor, n: int) -> bool:
        """Make room for the next push and account for it; True when `multiply_` is still to be done."""
        if n == RADIX:
            return False  # multiplication by 1 loses nothing
        self._past_bounds.append(self._bound)
        if n == 0:
            self.history.push(v.clone())  # every bit of v is lost: keep it whole
            v.zero_()
            return False
        if self._must_spill(self._bound, n):
            self.history.push(self.head.to(torch.int16))  # the low 16 bits: the conversion wraps
            self.head.bitwise_right_shift_(_WORD_BITS)
            self._bound = _ceil_div(self._bound, 1 << _WORD_BITS)
        # floor(head / n) < ceil(bound / n), then 16 bits are pushed
        self._bound = _ceil_div(self._bound, n) << RADIX_BITS
        return True

    def after_undecay(self, v: Tensor, n: int) -> None:
        """Undo `before_decay`, once `divide_` is done."""
        if n == RADIX:
            return
        self._bound = self._past_bounds.pop()
        if n == 0:
            v.copy_(self.history.pop())
        elif self._must_spill(self._bound, n):
            word = self.history.pop().to(torch.int64).bitwise_and_(_WORD)
            self.head.bitwise_left_shift_(_WORD_BITS).bitwise_or_(word)

    @staticmethod
    def _must_spill(bound: int, n: int) -> bool:
        return _ceil_div(bound, n) << RADIX_BITS > 1 << _HEAD_BITS

    def is_empty(self) -> Tensor:
        """0-dim bool on the device: every bit pushed has been taken back."""
        if len(self) or self.history.nbytes:
            return torch.zeros((), dtype=torch.bool, device=self.head.device)
        return ~self.head.any()

    def snapshot(self) -> tuple[Tensor, int, int]:
        """What a re-run from here needs: head, bound and number of calls (for stores whose history keeps nothing)."""
        return self.head.clone(), self._bound, len(self)

    def restore(self, snapshot: tuple[Tensor, int, int]) -> None:
        head, self._bound, length = snapshot
        self.head.copy_(head)
        del self._past_bounds[length:]
