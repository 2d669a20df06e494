"""The specification of the number formats and of all integer work, in plain Python integers.

Every backend has these bits, element by element; the tests hold each of them against this. Nothing trains with it.
A Python int never overflows, `>>` and `&` are floor(x / 2^k) and x mod 2^k for negative x too, a Python float is a
float64, and `round` of one is the exact nearest integer, ties to even.

Numbers    one word q stands for q / 2^fractional_bits, |q| < 2^62; two words (high, low) stand for
           (high 2^60 + low) / 2^94, 0 <= low < 2^60, |high| < 2^62
Factors    n / 2^bits with 1 <= n < 2^bits, bits 16 or 30
Heads      0 <= head < n 2^(52 - bits) before `multiply`, so that 0 <= head < 2^52 after it
"""

from __future__ import annotations

import math

LOW_BITS = 60
HEAD_BITS = 52
WORD_BITS = 16


def words_of(number: int) -> tuple[int, int]:
    """An integer in two words: (high, low), low is never negative."""
    return number >> LOW_BITS, number & ((1 << LOW_BITS) - 1)


def integer_of(words: tuple[int, int]) -> int:
    """The inverse of `words_of`."""
    return (words[0] << LOW_BITS) + words[1]


def multiply(v: int, head: int, n: int, bits: int) -> tuple[int, int]:
    """(v, head) -> (floor((v n + digit) / 2^bits), head), where digit = head mod n; the low bits are pushed."""
    rest, digit = divmod(head, n)
    w = v * n + digit
    return w >> bits, (rest << bits) + w % (1 << bits)


def divide(v: int, head: int, n: int, bits: int) -> tuple[int, int]:
    """The inverse of `multiply`."""
    rest, low = divmod(head, 1 << bits)
    v, digit = divmod((v << bits) + low, n)
    return v, rest * n + digit


def add(target: int, source: float, factor: float, sign: int) -> int:
    """target + sign round(factor source): a product in float64, of the source in float64, and one rounding of it.

    From 2^53 on the product is an integer already, and is added whole, to one word and to two alike.
    """
    return target + sign * round(float(source) * factor)


def to_float(q: int, fractional_bits: int) -> float:
    """The value of one word: q rounded to float64. Where float32 is asked for, it is rounded to that afterwards."""
    return math.ldexp(float(q), -fractional_bits)


def wide_to_float(words: tuple[int, int]) -> float:
    """The value of two words: each rounded to float64, then their sum; the last bit may not be the nearest float64's.

    low is taken from the nearest multiple of 2^60, so that a small negative number is no difference of large ones.
    """
    high, low = words
    carry = low >> (LOW_BITS - 1)
    return math.ldexp(float(high + carry), LOW_BITS - 94) + math.ldexp(float(low - (carry << LOW_BITS)), -94)


def maximum(target: tuple[int, int], source: tuple[int, int]) -> tuple[int, int]:
    """The larger of two numbers in two words."""
    return max(target, source)  # of tuples: by high, then by low


def largest(xs: list[float]) -> float:
    """The largest magnitude; NaN or inf where there is one, 0 of nothing."""
    return math.nan if any(map(math.isnan, xs)) else max(map(abs, xs), default=0.0)


def fingerprint(bits: list[int]) -> int:
    """Of the floats' own bits as signed integers: each mixed with its position, and their sum, all modulo 2^64."""
    total = 0
    for i, x in enumerate(bits):
        mixed = _signed((x + i * 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9)
        total += (mixed ^ (mixed >> 32)) * 0x94D049BB133111EB
    return _signed(total)


def ratio(m: float, s: float, c1: float, per_root_c2: float, eps: float) -> float:
    """Adam's direction: every operation is one float64, the root correctly rounded."""
    return m / ((math.sqrt(s) * per_root_c2 + eps) * c1)


def spill(head: int) -> tuple[int, int]:
    """(the head without its low 16 bits, these as a signed word)"""
    return head >> WORD_BITS, _signed(head, WORD_BITS)


def refill(head: int, word: int) -> int:
    """The inverse of `spill`."""
    return (head << WORD_BITS) + word % (1 << WORD_BITS)


def _signed(x: int, bits: int = 64) -> int:
    """x modulo 2^bits, as two's complement has it."""
    return (x + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


class BitStore:
    """Exact decay of one number, and back. bound: above the head, whatever the numbers were; it alone says when a word
    is spilled to history, last in, first out.
    """

    def __init__(self, bits: int) -> None:
        self.bits, self.head, self.bound = bits, 0, 1
        self.bounds: list[int] = []  # before each call
        self.history: list[int] = []

    def decay(self, v: int, n: int) -> int:
        """v n / 2^bits, 0 <= n <= 2^bits. All of v is lost where n is 0, and nothing where n is 2^bits."""
        if n == 1 << self.bits:
            return v
        self.bounds.append(self.bound)
        if n == 0:
            self.history.append(v)
            return 0
        while self._after(n) > 1 << HEAD_BITS:
            self.head, word = spill(self.head)
            self.history.append(word)
            self.bound = -(-self.bound // (1 << WORD_BITS))
        self.bound = self._after(n)
        v, self.head = multiply(v, self.head, n, self.bits)
        return v

    def undecay(self, v: int, n: int) -> int:
        """The inverse of the last `decay`."""
        if n == 1 << self.bits:
            return v
        self.bound = before = self.bounds.pop()
        if n == 0:
            return self.history.pop()
        v, self.head = divide(v, self.head, n, self.bits)
        while self._after(n) > 1 << HEAD_BITS:  # as many words as `decay` spilled
            self.head = refill(self.head, self.history.pop())
            self.bound = -(-self.bound // (1 << WORD_BITS))
        self.bound = before
        return v

    def _after(self, n: int) -> int:
        """The bound after a multiplication: floor(head / n) < ceil(bound / n), then `bits` bits are pushed."""
        return -(-self.bound // n) << self.bits
