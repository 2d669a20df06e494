"""The bit store: exact multiplication of integers by n / 2^16 (or 2^30), and its exact inverse.

Multiplying v by n / 2^16 < 1 destroys log2(2^16 / n) bits per element. Here they are kept on an entropy stack, one
int64 `head` per element (the information buffer of Maclaurin, Duvenaud & Adams 2015, algorithm 3). First a base-n digit
is popped and v becomes w = v n + digit, which can be undone since digit = w mod n; then w is shortened to v' = floor(w
/ 2^16) and its low 16 bits are pushed. The paper pushes first, which leaves 16 low bits of v' to chance; in this order
v' is within one unit of v n / 2^16, at the same cost in bits. `scaling` has the arithmetic.

When a head could get too long, the low 16 bits of every element are spilled to a `History` as one tensor of words.
Whether to spill is decided by one number, the proved upper bound on all heads, never by data: both directions agree on
it without looking, and nothing waits for the device.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from revdistill.engine.integers.history import History
from revdistill.engine.integers.radix import COARSE, HEAD_BITS, Scaling, divisor_of

_WORD_BITS = 16
_WORD = (1 << _WORD_BITS) - 1


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class BitStore:
    """Exact decay of one int64 tensor v, and back.

    shape, device: of the head: [numel], whether v is [numel] or, in two words, [2, numel]. history: where spilled words
    go.
    scaling: the radix that n is a share of. Cost: 8 bytes per element for the head and log2(radix / n) bits per element
    and call, in words of 16; for n = 0 all bits of v.

    Invariant: 0 <= head < bound, elementwise, and `bound` depends on the past n alone.
    """

    def __init__(
        self, shape: torch.Size | tuple[int, ...], device: torch.device, history: History, scaling: Scaling = COARSE
    ) -> None:
        self.head = torch.zeros(shape, dtype=torch.int64, device=device)
        self.history = history
        self.scaling = scaling
        self._divisor: tuple[int, Tensor] | None = None
        self._bound = 1
        self._past_bounds = array(
            "Q"
        )  # the bound before each call, so that the way back reads off what the way out did

    def __len__(self) -> int:
        """Calls of `decay_` not undone yet."""
        return len(self._past_bounds)

    def decay_(self, v: Tensor, n: int) -> None:
        """v <- v * n / radix in place, exactly invertible. 0 <= n <= radix."""
        if self.before_decay(v, n):
            self.multiply_(v, n)

    def undecay_(self, v: Tensor, n: int) -> None:
        """The inverse of the last `decay_` (same n)."""
        if self.pushes(n):
            self.divide_(v, n)
        self.after_undecay(v, n)

    def multiply_(self, v: Tensor, n: int) -> None:
        """The arithmetic alone of `decay_`, between `before_decay` and the next call."""
        self.scaling.multiply_(v, self.head, n, self.divisor(n))

    def divide_(self, v: Tensor, n: int) -> None:
        """The arithmetic alone of `undecay_`, before `after_undecay`."""
        self.scaling.divide_(v, self.head, n, self.divisor(n))

    def divisor(self, n: int) -> Tensor | None:
        """n on the head's device, where passes want it there; kept while n stays the same. None on the CPU, whose loops
        do not.
        """
        if self.head.device.type == "cpu":
            return None
        if self._divisor is None or self._divisor[0] != n:
            self._divisor = n, divisor_of(n, self.head.device)
        return self._divisor[1]

    def pushes(self, n: int) -> bool:
        """Whether a decay by n goes through the heads: by 0 it stores v whole, by 1 it loses nothing."""
        return 0 < n < self.scaling.radix

    def before_decay(self, v: Tensor, n: int) -> bool:
        """Make room for the next push and account for it; True when `multiply_` is still to be done."""
        if n == self.scaling.radix:
            return False  # multiplication by 1 loses nothing
        self._past_bounds.append(self._bound)
        if n == 0:
            self.history.push(v.clone())  # every bit of v is lost: keep it whole
            v.zero_()
            return False
        for _ in range(self._spills(self._bound, n)):
            self.history.push(self.head.to(torch.int16))  # the low 16 bits: the conversion wraps
            self.head.bitwise_right_shift_(_WORD_BITS)
            self._bound = _ceil_div(self._bound, 1 << _WORD_BITS)
        # floor(head / n) < ceil(bound / n), then the radix's bits are pushed
        self._bound = _ceil_div(self._bound, n) << self.scaling.radix_bits
        return True

    def after_undecay(self, v: Tensor, n: int) -> None:
        """Undo `before_decay`, once `divide_` is done."""
        if n == self.scaling.radix:
            return
        self._bound = self._past_bounds.pop()
        if n == 0:
            v.copy_(self.history.pop())
            return
        for _ in range(self._spills(self._bound, n)):
            word = self.history.pop().to(torch.int64).bitwise_and_(_WORD)
            self.head.bitwise_left_shift_(_WORD_BITS).bitwise_or_(word)

    def _spills(self, bound: int, n: int) -> int:
        """How many words must go before a push by n fits."""
        count = 0
        while _ceil_div(bound, n) << self.scaling.radix_bits > 1 << HEAD_BITS:
            bound = _ceil_div(bound, 1 << _WORD_BITS)
            count += 1
        return count

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
