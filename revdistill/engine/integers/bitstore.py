"""The bit store: exact multiplication of integers by n / 2^16 (or 2^30), and its exact inverse.

Multiplying v by n / 2^16 < 1 destroys log2(2^16 / n) bits per element. Here they are kept on an entropy stack, one
int64 `head` per element (the information buffer of Maclaurin, Duvenaud & Adams 2015, algorithm 3). First a base-n digit
is popped and v becomes w = v n + digit, which can be undone since digit = w mod n; then w is shortened to v' = floor(w
/ 2^16) and its low 16 bits are pushed. The paper pushes first, which leaves 16 low bits of v' to chance; in this order
v' is within one unit of v n / 2^16, at the same cost in bits. `radix` has the arithmetic.

When a head could get too long, the low 16 bits of every element are spilled to a `History` as one tensor of words.
Whether to spill is decided by one number, the proved upper bound on all heads, never by data: both directions agree on
it without looking, and nothing waits for the device.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from revdistill.engine.integers.backend import WORD_BITS, Backend
from revdistill.engine.integers.history import History
from revdistill.engine.integers.radix import COARSE, HEAD_BITS, Radix
from revdistill.engine.integers.select import backend_for


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class BitStore:
    """Exact decay of one tensor of numbers v, and back.

    Cost: 8 bytes per element for the head and log2(radix / n) bits per element and call, in words of 16; for n = 0 all
    bits of v. Invariant: 0 <= head < bound, elementwise, and `bound` depends on the past n alone.

    Args:
        numel: elements of v, which is [numel] or, in two words, [2, numel].
        device: of v and of the head.
        history: where spilled words go.
        radix: what n is a share of.
        backend: what does the integer work; by default the device's own.
        head: int64 [numel], all 0; by default a new tensor.
    """

    def __init__(
        self,
        numel: int,
        device: torch.device,
        history: History,
        radix: Radix = COARSE,
        backend: Backend | None = None,
        head: Tensor | None = None,
    ) -> None:
        self.head = torch.zeros(numel, dtype=torch.int64, device=device) if head is None else head
        self.history, self.radix, self._base = history, radix, radix.base
        self._backend = backend or backend_for(device)
        self._bound = 1
        # the bound before each call, so that the way back reads off what the way out did
        self._past_bounds = array("Q")

    def __len__(self) -> int:
        """Calls of `decay_` not undone yet."""
        return len(self._past_bounds)

    def decay_(self, v: Tensor, n: int) -> None:
        """v <- v * n / radix in place, exactly invertible. 0 <= n <= radix."""
        self.make_room(v, n)
        if n == 0:
            v.zero_()
        elif n != self._base:
            self._backend.multiply(v, self.head, n, self.radix)

    def make_room(self, v: Tensor, n: int) -> None:
        """What a decay by n does before v and the head are changed: words leave to the history, and the bound moves on.

        It depends on n alone, never on data: a step that is replayed is made after it.
        """
        radix, bound = self.radix, self._bound
        if n == self._base:
            return  # multiplication by 1 loses nothing
        self._past_bounds.append(bound)
        if n == 0:
            self._backend.settle()
            self.history.push(v.clone())  # every bit of v is lost: keep it whole
            return
        while (_ceil_div(bound, n) << radix.bits) > 1 << HEAD_BITS:
            self.history.push(self._backend.spill(self.head))
            bound = _ceil_div(bound, 1 << WORD_BITS)
        # floor(head / n) < ceil(bound / n), then the radix's bits are pushed
        self._bound = _ceil_div(bound, n) << radix.bits

    def undecay_(self, v: Tensor, n: int) -> None:
        """The inverse of the last `decay_` (same n)."""
        if n not in (0, self._base):
            self._backend.divide(v, self.head, n, self.radix)
        self.take_back(v, n)

    def take_back(self, v: Tensor, n: int) -> None:
        """The inverse of `make_room`, once v and the head are what they were after it; for n = 0 v comes back here."""
        radix = self.radix
        if n == self._base:
            return
        self._bound = bound = self._past_bounds.pop()
        if n == 0:
            self._backend.settle()
            v.copy_(self.history.pop())
            return
        while (_ceil_div(bound, n) << radix.bits) > 1 << HEAD_BITS:
            self._backend.refill(self.head, self.history.pop())
            bound = _ceil_div(bound, 1 << WORD_BITS)

    def is_empty(self) -> Tensor:
        """0-dim bool on the device: every bit pushed has been taken back."""
        if len(self) or self.history.nbytes:
            return torch.zeros((), dtype=torch.bool, device=self.head.device)
        return ~self.head.any()

    def words_to_take_back(self, n: int) -> int:
        """How many words `take_back` would ask the history for."""
        if n == self._base:
            return 0
        bound, count = self._past_bounds[-1], 0
        while n and (_ceil_div(bound, n) << self.radix.bits) > 1 << HEAD_BITS:
            bound, count = _ceil_div(bound, 1 << WORD_BITS), count + 1
        return count if n else 1

    def snapshot(self) -> tuple[Tensor, int, list[int]]:
        """What a re-run from here needs: head, bound, and past bounds; the history is not in it."""
        return self.head.clone(), self._bound, [len(self), *self._past_bounds[-1:]]

    def restore(self, snapshot: tuple[Tensor, int, list[int]]) -> None:
        """Put the store where `snapshot` was called, from after it or from one call before it."""
        head, self._bound, (length, *last) = snapshot
        self.head.copy_(head)
        del self._past_bounds[length:]
        if len(self._past_bounds) < length:
            self._past_bounds.extend(last)
