"""The integer work on the CPU: one loop per function, as machine code (`native`).

The same formulas run as tensor operations on other devices (`passes`), with the same bits; as some forty passes over
memory they cost ten times as much on a CPU. Nothing here may be reordered or contracted: no fastmath.

The functions take `numel` elements of each tensor, and change them in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revdistill.engine.integers import native
from revdistill.engine.integers.backend import FIRST, SECOND, STEP, Backend, Numerator, Scalar
from revdistill.engine.integers.fixedpoint import Format
from revdistill.engine.integers.radix import COARSE, Radix

INT, FLOAT, BITS = "int64", "float64", "bits"  # BITS: an integer as wide as the tensor's floats
_POINTED = {torch.int64: "int64", torch.float32: "float32", torch.float64: "float64"}
_AS_BITS = {torch.float32: "int32", torch.float64: "int64"}


class Loop:
    """A function of tensors' elements: f(first, second, ..., numel, scalars).

    Args:
        function: in the part of Python that numba compiles; tensors reach it as pointers, all to `numel` elements.
        scalars: INT, FLOAT or BITS, the types of the arguments after numel.
        result: likewise, or None.
        bits: whether float tensors reach it as integers of the same bits.
    """

    def __init__(
        self, function: Callable[..., Any], scalars: tuple[str, ...], result: str | None = None, bits: bool = False
    ) -> None:
        self._function, self._scalars, self._result, self._bits = function, scalars, result, bits
        self._compiled: dict[tuple[torch.dtype, ...], Any] = {}

    def __call__(self, tensors: tuple[Tensor, ...], *scalars: Any) -> Any:
        """Run over tensors on the CPU, contiguous and of as many elements; changes them as the function does."""
        numel = tensors[0].numel()
        dtypes, pointers = [], []
        for t in tensors:
            if not (t.is_cpu and t.is_contiguous() and t.numel() == numel):  # a C function would not notice
                raise AssertionError(f"loop {self._function.__name__} over {[(t.shape, t.stride()) for t in tensors]}")
            dtypes.append(t.dtype)
            pointers.append(t.data_ptr())
        key = tuple(dtypes)
        run = self._compiled.get(key) or self._make(key)
        return run(*pointers, numel, *scalars)

    def _make(self, key: tuple[torch.dtype, ...]) -> Any:
        types = _AS_BITS if self._bits else _POINTED
        signature = native.Signature(
            tuple(types[dtype] for dtype in key),
            tuple(types[key[0]] if name == BITS else name for name in (INT, *self._scalars)),
            types[key[0]] if self._result == BITS else self._result,
        )
        with native.LOCK:  # another thread may have made it meanwhile
            if key not in self._compiled:
                self._compiled[key] = native.loaded(self._function, signature)
            return self._compiled[key]


def _loop(*scalars: str, result: str | None = None, bits: bool = False) -> Callable[[Callable[..., Any]], Loop]:
    """See `Loop`."""
    return lambda function: Loop(function, scalars, result, bits)


@_loop(INT)
def multiply(v: Any, head: Any, numel: int, n: int) -> None:
    """`Backend.multiply` by `COARSE`."""
    divisor = np.float64(n)
    for i in range(numel):
        quotient = np.int64(np.float64(head[i]) / divisor)
        low = (v[i] & 0xFFFF) * n + (head[i] - quotient * n)
        v[i] = (v[i] >> 16) * n + (low >> 16)
        head[i] = (quotient << 16) | (low & 0xFFFF)


@_loop(INT)
def divide(v: Any, head: Any, numel: int, n: int) -> None:
    """The inverse of `multiply`."""
    divisor = np.float64(n)
    for i in range(numel):
        near = np.int64(np.float64(v[i]) / divisor)
        low = ((v[i] - near * n) << 16) | (head[i] & 0xFFFF)
        quotient = np.int64(np.floor(np.float64(low) / divisor))
        head[i] = (head[i] >> 16) * n + (low - quotient * n)
        v[i] = (near << 16) + quotient


@_loop(INT)
def multiply_fine(v: Any, head: Any, numel: int, n: int) -> None:
    """`Backend.multiply` by `FINE`."""
    divisor = np.float64(n)
    for i in range(numel):
        quotient = np.int64(np.float64(head[i]) / divisor)
        low = (v[i] & 0x3FFFFFFF) * n + (head[i] - quotient * n)
        v[i] = (v[i] >> 30) * n + (low >> 30)
        head[i] = (quotient << 30) | (low & 0x3FFFFFFF)


@_loop(INT)
def divide_fine(v: Any, head: Any, numel: int, n: int) -> None:
    """The inverse of `multiply_fine`."""
    divisor = np.float64(n)
    for i in range(numel):
        near = np.int64(np.float64(v[i]) / divisor)  # off by one at most, so that what is left stays below 2^62
        low = ((v[i] - near * n) << 30) | (head[i] & 0x3FFFFFFF)
        quotient = low // n
        head[i] = (head[i] >> 30) * n + (low - quotient * n)
        v[i] = (near << 30) + quotient


@_loop(INT)
def multiply_wide(high: Any, low: Any, head: Any, numel: int, n: int) -> None:
    """`Backend.multiply` by `WIDE`: limbs of 30, 30 and 31 bits, and the rest."""
    divisor = np.float64(n)
    for i in range(numel):
        quotient = np.int64(np.float64(head[i]) / divisor)
        first = (low[i] & 0x3FFFFFFF) * n + (head[i] - quotient * n)
        second = (low[i] >> 30) * n + (first >> 30)
        third = (high[i] & 0x7FFFFFFF) * n + (second >> 30)
        fourth = (high[i] >> 31) * n + (third >> 31)
        end = ((third & 0x7FFFFFFF) << 30) | (second & 0x3FFFFFFF)
        high[i] = (fourth << 1) + (end >> 60)
        low[i] = end & 0xFFFFFFFFFFFFFFF
        head[i] = (quotient << 30) | (first & 0x3FFFFFFF)


@_loop(INT)
def divide_wide(high: Any, low: Any, head: Any, numel: int, n: int) -> None:
    """The inverse of `multiply_wide`: long division, by 30 bits at a time after the first word.

    Each quotient comes from floating point, off by one at most, and is put right by the remainder: integer division is
    slow. The first one may be off by more where n is small; what it leaves is then below 2^31, and divides exactly.
    """
    inverse = 1.0 / np.float64(n)
    divisor = np.float64(n)
    for i in range(numel):
        near = np.int64(np.float64(high[i]) / divisor)
        rest = high[i] - near * n
        by = np.int64(np.floor(np.float64(rest) / divisor))
        first = near + by
        rest = ((rest - by * n) << 30) | (low[i] >> 30)
        second = np.int64(np.float64(rest) * inverse)
        rest -= second * n
        by = np.int64(rest >= n) - np.int64(rest < 0)
        second += by
        rest = ((rest - by * n) << 30) | (low[i] & 0x3FFFFFFF)
        third = np.int64(np.float64(rest) * inverse)
        rest -= third * n
        by = np.int64(rest >= n) - np.int64(rest < 0)
        third += by
        rest = ((rest - by * n) << 30) | (head[i] & 0x3FFFFFFF)
        fourth = np.int64(np.float64(rest) * inverse)
        rest -= fourth * n
        by = np.int64(rest >= n) - np.int64(rest < 0)
        fourth += by
        high[i] = (first << 30) + second
        low[i] = (third << 30) | fourth
        head[i] = (head[i] >> 30) * n + (rest - by * n)


@_loop(FLOAT)
def add_rounded(target: Any, source: Any, numel: int, factor: float) -> None:
    """`Backend.add` to one word; sign is in the factor: rint is odd."""
    for i in range(numel):
        target[i] += np.int64(np.rint(np.float64(source[i]) * factor))


@_loop()
def add_rounded_each(target: Any, source: Any, factors: Any, numel: int) -> None:
    """`add_rounded` with a float64 factor for each element."""
    for i in range(numel):
        target[i] += np.int64(np.rint(np.float64(source[i]) * factors[i]))


@_loop(FLOAT, INT)
def add_rounded_wide(high: Any, low: Any, source: Any, numel: int, factor: float, sign: int) -> None:
    """`Backend.add` to two words."""
    for i in range(numel):
        amount = np.float64(source[i]) * factor
        upper = np.trunc(amount * 2.0**-60)
        end = low[i] + sign * np.int64(np.rint(amount - upper * 2.0**60))
        high[i] += sign * np.int64(upper) + (end >> 60)
        low[i] = end & 0xFFFFFFFFFFFFFFF


@_loop(INT)
def add_rounded_wide_each(high: Any, low: Any, source: Any, factors: Any, numel: int, sign: int) -> None:
    """`add_rounded_wide` with a float64 factor for each element."""
    for i in range(numel):
        amount = np.float64(source[i]) * factors[i]
        upper = np.trunc(amount * 2.0**-60)
        end = low[i] + sign * np.int64(np.rint(amount - upper * 2.0**60))
        high[i] += sign * np.int64(upper) + (end >> 60)
        low[i] = end & 0xFFFFFFFFFFFFFFF


@_loop()
def wide_to_float(high: Any, low: Any, out: Any, numel: int) -> None:
    """`Backend.to_float` of two words."""
    for i in range(numel):
        carry = low[i] >> 59  # the nearest multiple of 2^60: a small negative number is not a difference of large ones
        out[i] = np.float64(high[i] + carry) * 2.0**-34 + np.float64(low[i] - (carry << 60)) * 2.0**-94


@_loop(FLOAT)
def to_float(q: Any, out: Any, numel: int, resolution: float) -> None:
    """`Backend.to_float` of one word."""
    for i in range(numel):
        out[i] = np.float64(q[i]) * resolution


@_loop(FLOAT, FLOAT, FLOAT)
def ratio(m: Any, s: Any, out: Any, numel: int, c1: float, per_root_c2: float, eps: float) -> None:
    """`Backend.ratio`: float64 throughout."""
    for i in range(numel):
        out[i] = m[i] / ((np.sqrt(s[i]) * per_root_c2 + eps) * c1)


@_loop(BITS, result=BITS, bits=True)
def largest_bits(bits: Any, numel: int, magnitude: Any) -> Any:
    """The largest of `bits & magnitude`: floats as int32 or int64, magnitude everything but the sign, of that
    dtype.

    Positive floats are ordered as their bits are, inf above them and NaN above inf.
    """
    largest = magnitude & ~magnitude
    for i in range(numel):
        found = bits[i] & magnitude
        if found > largest:
            largest = found
    return largest


@_loop(result=INT, bits=True)
def fingerprint(bits: Any, numel: int) -> int:
    """`Backend.fingerprint` of the bits, as int32 or int64."""
    total = 0
    for i in range(numel):
        mixed = (bits[i] + i * STEP) * FIRST
        total += (mixed ^ (mixed >> 32)) * SECOND
    return total


_INTEGERS: dict[torch.dtype, Any] = {torch.float32: np.int32, torch.float64: np.int64}
_FLOATS: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}
_MAGNITUDE = {torch.float32: 2**31 - 1, torch.float64: 2**63 - 1}


class Loops(Backend):
    """The loops above, on tensors of the CPU."""

    interval = 1

    def multiply(self, v: Tensor, head: Tensor, n: Numerator, radix: Radix) -> None:
        if radix.words == 2:
            multiply_wide((v[0], v[1], head), int(n))
        else:
            (multiply if radix == COARSE else multiply_fine)((v, head), int(n))

    def divide(self, v: Tensor, head: Tensor, n: Numerator, radix: Radix) -> None:
        if radix.words == 2:
            divide_wide((v[0], v[1], head), int(n))
        else:
            (divide if radix == COARSE else divide_fine)((v, head), int(n))

    def add(self, target: Tensor, source: Tensor, factor: Scalar, sign: int) -> None:
        source = source.contiguous()
        if target.ndim == 1:
            if isinstance(factor, Tensor):
                add_rounded_each((target, source, (factor * sign).contiguous()))
            else:
                add_rounded((target, source), factor * sign)
        elif isinstance(factor, Tensor):
            add_rounded_wide_each((target[0], target[1], source, factor.contiguous()), sign)
        else:
            add_rounded_wide((target[0], target[1], source), factor, sign)

    def to_float(self, q: Tensor, out: Tensor, form: Format) -> Tensor:
        if form.words == 1:
            to_float((q, out), form.resolution)
        else:
            wide_to_float((q[0], q[1], out))
        return out

    def largest(self, x: Tensor) -> float | Tensor:
        found = largest_bits((x.contiguous(),), _MAGNITUDE[x.dtype])
        return float(_INTEGERS[x.dtype](found).view(_FLOATS[x.dtype]))

    def fingerprint(self, x: Tensor) -> int | Tensor:
        return int(fingerprint((x.contiguous(),)))

    def root(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.sqrt(x.numpy()))  # torch's own (MKL's) is off by a last bit in 1 % of numbers

    def ratio(self, m: Tensor, s: Tensor, c1: Scalar, per_root_c2: Scalar, eps: Scalar) -> Tensor:
        if isinstance(c1, Tensor) or isinstance(per_root_c2, Tensor) or isinstance(eps, Tensor):
            return super().ratio(m, s, c1, per_root_c2, eps)
        m, s = m.contiguous(), s.contiguous()
        out = torch.empty_like(m)
        ratio((m, s, out), c1, per_root_c2, eps)
        return out


LOOPS = Loops()
