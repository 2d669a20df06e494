"""The integer work in Triton: functions of numbers in registers, and a kernel for each operation of a backend.

The bits are those of `reference`. Launched with enable_fp_fusion=False: a product that is rounded afterwards must not
become a fused multiply-add. Without Triton this module cannot be imported; `fused` does so where it can.

Literals next to float64 are powers of two: Triton may take them as float32, which these are exact in. A number that
the host has comes as the bits of a float64 (`number`), as Triton rounds a Python float to float32.
"""

import triton
import triton.language as tl

from revdistill.engine.integers import backend, radix

VALUE, ONE, EACH = (tl.constexpr(i) for i in range(3))  # how `number` is given its argument
_STEP, _FIRST, _SECOND = (tl.constexpr(c) for c in (backend.STEP, backend.FIRST, backend.SECOND))
_FINE_BITS = tl.constexpr(radix.FINE.bits)
_FINE = tl.constexpr(radix.FINE.base - 1)
_THIRD = tl.constexpr((1 << 31) - 1)
_LOW = tl.constexpr((1 << 60) - 1)


# ---------------------------------------------------------------------------------------------- numbers in registers


@triton.jit
def rint(x):
    """x, float64 of magnitude below 2^63, rounded to the nearest integer, ties to even; int64."""
    # from 2^52 on there are integers only; below, the sum with 2^52 has no fractional bit
    big = tl.where(x < 0, -4503599627370496.0, 4503599627370496.0)
    return tl.where(tl.abs(x) < 4503599627370496.0, (x + big) - big, x).to(tl.int64)


@triton.jit
def quotient(a, n, inverse):
    """(floor(a / n), a mod n) of int64 with |a / n| < 2^50; inverse: 1 / n in float64."""
    # The float quotient is off by less than 1, and its floor by one at most.
    found = tl.floor(a.to(tl.float64) * inverse).to(tl.int64)
    rest = a - found * n
    off = (rest >= n).to(tl.int64) - (rest < 0).to(tl.int64)
    return found + off, rest - off * n


@triton.jit
def multiplied(v, head, n, BITS: tl.constexpr):
    """v n / 2^BITS of one word: (v, head). n: float64, as of all decays here."""
    integer = n.to(tl.int64)
    kept, digit = quotient(head, integer, 1.0 / n)
    mask: tl.constexpr = (1 << BITS) - 1
    low = (v & mask) * integer + digit
    return (v >> BITS) * integer + (low >> BITS), (kept << BITS) | (low & mask)


@triton.jit
def divided(v, head, n, BITS: tl.constexpr):
    """The inverse of `multiplied`: (v, head)."""
    integer = n.to(tl.int64)
    inverse = 1.0 / n
    mask: tl.constexpr = (1 << BITS) - 1
    # off by 2^11 at most, so that what is left stays below 2^62
    near = (v.to(tl.float64) * inverse).to(tl.int64)
    found, digit = quotient(((v - near * integer) << BITS) | (head & mask), integer, inverse)
    return (near << BITS) + found, (head >> BITS) * integer + digit


@triton.jit
def multiplied_wide(high, low, head, n):
    """v n / 2^30 of two words, in limbs of 30, 30 and 31 bits and the rest: (high, low, head)."""
    integer = n.to(tl.int64)
    kept, digit = quotient(head, integer, 1.0 / n)
    first = (low & _FINE) * integer + digit
    second = (low >> _FINE_BITS) * integer + (first >> _FINE_BITS)
    third = (high & _THIRD) * integer + (second >> _FINE_BITS)
    fourth = (high >> 31) * integer + (third >> 31)
    end = ((third & _THIRD) << _FINE_BITS) | (second & _FINE)
    return (fourth << 1) + (end >> 60), end & _LOW, (kept << _FINE_BITS) | (first & _FINE)


@triton.jit
def divided_wide(high, low, head, n):
    """The inverse of `multiplied_wide`, a long division: (high, low, head)."""
    integer = n.to(tl.int64)
    inverse = 1.0 / n
    near = (high.to(tl.float64) * inverse).to(tl.int64)
    first, rest = quotient(high - near * integer, integer, inverse)
    second, rest = quotient((rest << _FINE_BITS) | (low >> _FINE_BITS), integer, inverse)
    third, rest = quotient((rest << _FINE_BITS) | (low & _FINE), integer, inverse)
    fourth, rest = quotient((rest << _FINE_BITS) | (head & _FINE), integer, inverse)
    high = ((near + first) << _FINE_BITS) + second
    return high, (third << _FINE_BITS) | fourth, (head >> _FINE_BITS) * integer + rest


@triton.jit
def added_wide(high, low, amount, SIGN: tl.constexpr):
    """Two words + SIGN round(amount), float64 of magnitude below 2^121: (high, low)."""
    upper = (amount * 8.673617379884035e-19).to(tl.int64)  # 2^-60; truncated
    # Exact: upper has the amount's upper bits and its sign, so the difference is its lower ones.
    end = low + SIGN * rint(amount - upper.to(tl.float64) * 1152921504606846976.0)
    return high + SIGN * upper + (end >> 60), end & _LOW


@triton.jit
def value(q, resolution):
    """One word as float64."""
    return q.to(tl.float64) * resolution


@triton.jit
def value_wide(high, low):
    """Two words as float64."""
    carry = low >> 59  # the nearest multiple of 2^60: a small negative number is no difference of large ones
    upper = (high + carry).to(tl.float64) * 5.820766091346741e-11  # 2^-34
    return upper + (low - (carry << 60)).to(tl.float64) * 5.048709793414476e-29  # 2^-94


@triton.jit
def larger_wide(high, low, other_high, other_low):
    """The larger of two numbers in two words: (high, low)."""
    higher = (other_high > high) | ((other_high == high) & (other_low > low))
    return tl.where(higher, other_high, high), tl.where(higher, other_low, low)


@triton.jit
def mixed(bits, i):
    """What one element adds to a fingerprint. bits: its own, as int64; i: its position."""
    found = (bits + i * _STEP) * _FIRST
    return (found ^ (found >> 32)) * _SECOND


@triton.jit
def number(x, i, inside, KIND: tl.constexpr):
    """A float64: of the bits x (VALUE), at the pointer x (ONE), or of each element from there on (EACH)."""
    if KIND == VALUE:
        found = x.to(tl.int64).to(tl.float64, bitcast=True)
    elif KIND == ONE:
        found = tl.load(x)
    else:
        found = tl.load(x + i, inside, other=1.0)
    return found


@triton.jit
def sum_of(a, b):
    """For tl.reduce."""
    return a + b


@triton.jit
def larger_of(a, b):
    """For tl.reduce."""
    return tl.where(a > b, a, b)


@triton.jit
def elements(numel, BLOCK: tl.constexpr):
    """(positions of this program's elements, int64; which of them there are)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i, i < numel


# --------------------------------------------------------------------------------- kernels, one per operation of Fused


@triton.jit(do_not_specialize=["n"])
def decay(
    high,
    low,
    head,
    n,
    numel,
    BACK: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`Backend.multiply`, or with BACK `divide`. Of one word, high is the word, and low is not looked at; so below."""
    i, inside = elements(numel, BLOCK)
    by = number(n, i, inside, KIND)
    u = tl.load(high + i, inside, other=0)
    h = tl.load(head + i, inside, other=0)
    if WORDS == 2:
        w = tl.load(low + i, inside, other=0)
        if BACK:
            u, w, h = divided_wide(u, w, h, by)
        else:
            u, w, h = multiplied_wide(u, w, h, by)
        tl.store(low + i, w, inside)
    elif BACK:
        u, h = divided(u, h, by, BITS)
    else:
        u, h = multiplied(u, h, by, BITS)
    tl.store(high + i, u, inside)
    tl.store(head + i, h, inside)


@triton.jit(do_not_specialize=["factor"])
def add(
    high, low, source, factor, numel, SIGN: tl.constexpr, WORDS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """source: float32, float64 or int64."""
    i, inside = elements(numel, BLOCK)
    amount = tl.load(source + i, inside, other=0).to(tl.float64) * number(factor, i, inside, KIND)
    u = tl.load(high + i, inside, other=0)
    if WORDS == 2:
        u, w = added_wide(u, tl.load(low + i, inside, other=0), amount, SIGN)
        tl.store(low + i, w, inside)
    else:
        u += SIGN * rint(amount)
    tl.store(high + i, u, inside)


@triton.jit(do_not_specialize=["resolution"])
def to_float(high, low, out, resolution, numel, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """out: float32 or float64; resolution: bits of one word's."""
    i, inside = elements(numel, BLOCK)
    u = tl.load(high + i, inside, other=0)
    if WORDS == 2:
        found = value_wide(u, tl.load(low + i, inside, other=0))
    else:
        found = value(u, number(resolution, i, inside, VALUE))
    tl.store(out + i, found.to(out.dtype.element_ty), inside)


@triton.jit
def largest(bits, out, numel, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):
    """out: 0, then the bits of the largest magnitude, of the width of bits; MAGNITUDE: all of these but the sign.

    Positive floats are ordered as their bits are, inf above them and NaN above inf.
    """
    i, inside = elements(numel, BLOCK)
    found = tl.load(bits + i, inside, other=0) & MAGNITUDE
    tl.atomic_max(out, tl.reduce(found, 0, larger_of))


@triton.jit
def fingerprint(bits, out, numel, BLOCK: tl.constexpr):
    """out: 0, then the fingerprint. Sums of integers wrap around, and have no order."""
    i, inside = elements(numel, BLOCK)
    found = mixed(tl.load(bits + i, inside, other=0).to(tl.int64), i)
    tl.atomic_add(out, tl.reduce(tl.where(inside, found, 0), 0, sum_of))


@triton.jit(do_not_specialize=["c1", "per_root_c2", "eps"])
def ratio(
    m, s, out, c1, per_root_c2, eps, numel, C1: tl.constexpr, C2: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr
):
    """m, s, out: float64; C1, C2, EPS: how the three numbers are given."""
    i, inside = elements(numel, BLOCK)
    root = tl.sqrt(tl.load(s + i, inside, other=1.0))
    divisor = (root * number(per_root_c2, i, inside, C2) + number(eps, i, inside, EPS)) * number(c1, i, inside, C1)
    tl.store(out + i, tl.load(m + i, inside, other=0.0) / divisor, inside)


@triton.jit
def maximum(high, low, other_high, other_low, numel, BLOCK: tl.constexpr):
    """The first <- the larger of both."""
    i, inside = elements(numel, BLOCK)
    u, w = larger_wide(
        tl.load(high + i, inside, other=0),
        tl.load(low + i, inside, other=0),
        tl.load(other_high + i, inside, other=0),
        tl.load(other_low + i, inside, other=0),
    )
    tl.store(high + i, u, inside)
    tl.store(low + i, w, inside)
