"""What a device does with integers: one protocol, with an implementation per file."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from revdistill.engine.integers.fixedpoint import Format
from revdistill.engine.integers.radix import Radix

Scalar = float | Tensor  # one for all elements, on the device perhaps: float64 []; or float64 [numel]
Numerator = int | Tensor  # or float64 [] on the device, of which an integer of so few bits is exact
WORD_BITS = 16  # of what leaves a head at once
_WORD = (1 << WORD_BITS) - 1
# Of the fingerprint: odd constants of splitmix64 (Steele, Lea & Flood 2014), as signed 64-bit integers; sums and
# products wrap around.
STEP, FIRST, SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Backend(ABC):
    """The integer work of a step, in place. All backends have the bits of `reference`.

    Numbers are int64 [numel], or [2, numel] of two words: (high, low) with 0 <= low < 2^60. `interval`: steps between
    two looks at the device's numbers; where it is 1, looking costs nothing, `largest` and `fingerprint` return numbers,
    and scalars are numbers of the host too.
    """

    interval: int

    @abstractmethod
    def multiply(self, v: Tensor, head: Tensor, n: Numerator, radix: Radix) -> None:
        """v <- v n / radix, the lost bits to head (see `radix`)."""

    @abstractmethod
    def divide(self, v: Tensor, head: Tensor, n: Numerator, radix: Radix) -> None:
        """The inverse of `multiply`."""

    @abstractmethod
    def add(self, target: Tensor, source: Tensor, factor: Scalar, sign: int) -> None:
        """target <- target + sign round(factor source): one product in float64, one rounding; -sign undoes sign.

        source: float32, float64 or int64 [numel], left as it is.
        """

    @abstractmethod
    def to_float(self, q: Tensor, out: Tensor, form: Format) -> Tensor:
        """The values of q in `out`, float32 or float64 [numel]: in float64 as `reference` has it, then in its dtype."""

    @abstractmethod
    def largest(self, x: Tensor) -> float | Tensor:
        """The largest magnitude in the floats x; NaN or inf where there is one, 0 where x is empty."""

    @abstractmethod
    def fingerprint(self, x: Tensor) -> int | Tensor:
        """64 bits that tell x [numel] (float32 or float64) from any other tensor, up to a chance of about 2^-64."""

    @abstractmethod
    def root(self, x: Tensor) -> Tensor:
        """sqrt(x) of float64 x, correctly rounded: the same bits on every device."""

    def ratio(self, m: Tensor, s: Tensor, c1: Scalar, per_root_c2: Scalar, eps: Scalar) -> Tensor:
        """m / ((sqrt(s) per_root_c2 + eps) c1), float64 [numel]: the direction of Adam."""
        # Multiplied by, never divided by: where it is a number CUDA would divide as it likes, with other bits than the
        # CPU.
        return m / ((self.root(s) * per_root_c2 + eps) * c1)

    def maximum(self, target: Tensor, source: Tensor) -> None:
        """target <- max(target, source), both of two words."""
        self.settle()
        higher = (source[0] > target[0]) | ((source[0] == target[0]) & (source[1] > target[1]))
        torch.where(higher, source, target, out=target)

    def spill(self, head: Tensor) -> Tensor:
        """Take the low WORD_BITS of every head, as int16."""
        self.settle()
        words = head.to(torch.int16)  # the conversion wraps
        head.bitwise_right_shift_(WORD_BITS)
        return words

    def refill(self, head: Tensor, words: Tensor) -> None:
        """The inverse of `spill`."""
        self.settle()
        head.bitwise_left_shift_(WORD_BITS).bitwise_or_(words.to(torch.int64).bitwise_and_(_WORD))

    def settle(self) -> None:
        """Everything asked for so far is in the tensors: a backend may put work off until then."""
        return
