"""The integer work on a GPU by Triton: one kernel per operation, where `passes` takes up to thirty.

A kernel that cannot be compiled or launched is given up with a warning, and the tensor operations of `Passes`, which
have the same bits, take its place.
"""

from __future__ import annotations

import struct
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.compiling import give_up
from revdistill.engine.integers.backend import Numerator, Scalar
from revdistill.engine.integers.fixedpoint import Format
from revdistill.engine.integers.passes import Passes
from revdistill.engine.integers.radix import Radix

BLOCK = 512  # elements of one program, four to a thread
SUMMED = 4096  # where each program's result goes to one place
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_MAGNITUDE = {torch.float32: 2**31 - 1, torch.float64: 2**63 - 1}
_VALUE, _ONE, _EACH = range(3)  # as in `kernels`


class Fused(Passes):
    """Kernels launched on the stream that is current; nothing waits for the device.

    n may be a float64 tensor on the device, 0-dim or [numel], and so may every other number. What is changed must be
    contiguous, of two words each of these.

    Args:
        kernels: the module of that name; an argument, since it cannot be imported everywhere.
        block, summed: elements of one program, powers of two.
    """

    def __init__(self, kernels: ModuleType, block: int = BLOCK, summed: int = SUMMED) -> None:
        super().__init__()
        self.kernels, self.block, self._summed = kernels, block, summed
        self.given_up: set[str] = set()  # kernels

    def multiply(self, v: Tensor, head: Tensor, n: Numerator, radix: Radix) -> None:
        if not self._decay(v, head, n, radix, back=False):
            super().multiply(v, head, n, radix)

    def divide(self, v: Tensor, head: Tensor, n: Numerator, radix: Radix) -> None:
        if not self._decay(v, head, n, radix, back=True):
            super().divide(v, head, n, radix)

    def _decay(self, v: Tensor, head: Tensor, n: Numerator, radix: Radix, *, back: bool) -> bool:
        by, kind = _number(n)
        options = {"BACK": back, "BITS": radix.bits, "WORDS": radix.words, "KIND": kind}
        return self._launch("decay", head, *_words(v), head, by, **options)

    def add(self, target: Tensor, source: Tensor, factor: Scalar, sign: int) -> None:
        by, kind = _number(factor)
        options = {"SIGN": sign, "WORDS": target.ndim, "KIND": kind}
        if not self._launch("add", source, *_words(target), source.contiguous(), by, **options):
            super().add(target, source, factor, sign)

    def to_float(self, q: Tensor, out: Tensor, form: Format) -> Tensor:
        resolution, _ = _number(form.resolution)
        if not self._launch("to_float", out, *_words(q), out, resolution, WORDS=form.words):
            super().to_float(q, out, form)
        return out

    def largest(self, x: Tensor) -> float | Tensor:
        x = x.reshape(-1).contiguous()
        bits = x.view(_INTEGERS[x.dtype])
        found = torch.zeros((), dtype=bits.dtype, device=x.device)
        if not self._launch("largest", bits, bits, found, MAGNITUDE=_MAGNITUDE[x.dtype]):
            return super().largest(x)
        return found.view(x.dtype)

    def fingerprint(self, x: Tensor) -> int | Tensor:
        found = torch.zeros((), dtype=torch.int64, device=x.device)
        bits = x.contiguous().view(_INTEGERS[x.dtype])
        return found if self._launch("fingerprint", bits, bits, found) else super().fingerprint(x)

    def ratio(self, m: Tensor, s: Tensor, c1: Scalar, per_root_c2: Scalar, eps: Scalar) -> Tensor:
        out = torch.empty(m.shape, dtype=m.dtype, device=m.device)
        (by1, kind1), (by2, kind2), (by, kind) = map(_number, (c1, per_root_c2, eps))
        if self._launch("ratio", out, m.contiguous(), s.contiguous(), out, by1, by2, by, C1=kind1, C2=kind2, EPS=kind):
            return out
        return super().ratio(m, s, c1, per_root_c2, eps)

    def maximum(self, target: Tensor, source: Tensor) -> None:
        if not self._launch("maximum", target[0], *_words(target), *_words(source.contiguous())):
            super().maximum(target, source)

    def _launch(self, name: str, like: Tensor, *args: Any, **options: Any) -> bool:
        """Whether the kernel was launched, over as many elements as `like` has; nothing is changed where not."""
        if name in self.given_up:
            return False
        numel = like.numel()
        for t in args:
            if isinstance(t, Tensor) and not t.is_contiguous():
                raise ValueError(f"{name}: tensors must be contiguous, got strides {t.stride()} of shape {[*t.shape]}")
        if not numel:
            return True
        block = self._summed if name in ("largest", "fingerprint") else self.block
        try:
            with torch.cuda.device(like.get_device()):
                # no launch where the grid is empty; one dimension of a grid has room for 2^31
                grid = (-(-numel // block),)
                kernel = getattr(self.kernels, name)[grid]
                kernel(*args, numel, BLOCK=block, enable_fp_fusion=False, **options)
        except Exception as error:  # whatever the compiler raises, the tensor operations are right
            self.given_up.add(name)
            give_up(f"Triton's kernel {name!r}", error)
            return False
        return True


def _words(v: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low); one word twice, as its kernels do not look at the second."""
    return (v, v) if v.ndim == 1 else (v[0], v[1])


def _number(x: Scalar) -> tuple[int | Tensor, int]:
    """As an argument of a kernel, and its kind: a float's bits, as Triton would round it to float32."""
    if isinstance(x, Tensor):
        return x.contiguous(), _EACH if x.ndim else _ONE
    return struct.unpack("q", struct.pack("d", x))[0], _VALUE
