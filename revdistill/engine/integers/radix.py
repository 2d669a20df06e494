"""The radices of a decay: v becomes v n / radix, exactly invertible.

Multiplying an integer v by n / radix < 1 destroys log2(radix / n) bits. A base-n digit is taken from an entropy stack,
the `head`; then the low bits of v n + digit go to it:

    digit = head mod n,  w = v n + digit,  v <- floor(w / radix),  head <- floor(head / n) radix + w mod radix

`reference` has this in plain integers; the backends have it in 64-bit words, with the same bits. They need |v| < 2^62
(of two
words: |high| < 2^62), 1 <= n < radix, and 0 <= head < 2^HEAD_BITS with floor(head / n) radix < 2^HEAD_BITS.
"""

from __future__ import annotations

from dataclasses import dataclass

# float64 holds integers below 2^53, and floor(fl(a / n)) = floor(a / n) for n < 2^52 and 0 <= a <= 2^52: a quotient
# that is no integer is at least 1 / n below the next one, further than half of its last bit. Float division is what
# processors do fast.
HEAD_BITS = 52


@dataclass(frozen=True)
class Radix:
    """The denominator of a decay's factors: 2^bits, of numbers in one word or in two (see `fixedpoint`)."""

    bits: int
    words: int = 1

    @property
    def base(self) -> int:
        """2^bits"""
        return 1 << self.bits

    def quantise(self, factor: float) -> int:
        """The numerator n of the nearest n / 2^bits (0 <= factor <= 1)."""
        return round(factor * self.base)


COARSE = Radix(16)  # a momentum; the inverse needs no integer division
FINE = Radix(30)  # factors near 1 that must be met well, such as 1 - lr weight_decay
WIDE = Radix(30, words=2)  # Adam's moments
