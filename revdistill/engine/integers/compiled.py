"""The tensor operations of `passes`, collected over a step and fused by torch.compile.

Integers have no rounding: anything but the same bits as eager passes drops the compiled function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.engine.compiling import compiling, warn
from revdistill.engine.integers.backend import Numerator, Scalar
from revdistill.engine.integers.fixedpoint import LOW_BITS
from revdistill.engine.integers.passes import Passes, add_, divide_, multiply_
from revdistill.engine.integers.radix import HEAD_BITS, Radix

_NUMBER_BITS = 60  # of random operands: within what every operation promises for
_DISTINCT = 2**14  # of them; larger tensors repeat these
_NUMERATORS = (1, 49, -1)  # n that random operands are compared for, besides the step's own; -1: the largest there is


@dataclass(frozen=True)
class _Decay:
    """Scalars are 0-dim tensors on the device: a new value is then no reason to compile again."""

    v: Tensor
    head: Tensor
    divisor: Tensor
    radix: Radix
    back: bool

    def run(self) -> None:
        (divide_ if self.back else multiply_)(self.v, self.head, self.divisor.to(torch.int64), self.divisor, self.radix)

    @property
    def kind(self) -> tuple[int, ...]:
        return self.radix.bits, self.radix.words, self.back


@dataclass(frozen=True)
class _Add:
    target: Tensor
    source: Tensor
    factor: Tensor
    sign: int

    def run(self) -> None:
        add_(self.target, self.source, self.factor, self.sign)

    @property
    def kind(self) -> tuple[int, ...]:
        return self.target.ndim, self.sign


_Operations = Sequence[_Decay | _Add]


def _run(operations: _Operations) -> None:
    for operation in operations:
        operation.run()


class Compiled(Passes):
    """Puts decays and adds off until a number is looked at, or the step ends; then makes them at once.

    Each combination of operations is compared with eager ones on its first use.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[_Decay | _Add] = []
        self._seen: set[tuple[tuple[int, ...], ...]] = set()
        self.compiled: Callable[[_Operations], None] | None = torch.compile(_run, dynamic=False)

    def multiply(self, v: Tensor, head: Tensor, n: Numerator, radix: Radix) -> None:
        self._waiting.append(_Decay(v, head, self.divisor(n, head.device), radix, back=False))

    def divide(self, v: Tensor, head: Tensor, n: Numerator, radix: Radix) -> None:
        self._waiting.append(_Decay(v, head, self.divisor(n, head.device), radix, back=True))

    def add(self, target: Tensor, source: Tensor, factor: Scalar, sign: int) -> None:
        if not isinstance(factor, Tensor):
            factor = torch.full((), factor, dtype=torch.float64, device=target.device)
        self._waiting.append(_Add(target, source, factor, sign))

    def settle(self) -> None:
        if not self._waiting:
            return
        operations, self._waiting = self._waiting, []
        key = tuple(operation.kind for operation in operations)
        if self.compiled is not None and key not in self._seen:
            self._seen.add(key)
            self._compare(operations)
        (self.compiled or _run)(operations)

    def _compare(self, operations: _Operations) -> None:
        """Drop the compiled function unless it has eager's bits for these operands, and for random ones in their place.

        At the first step slots and heads are 0, which says nothing about a decay.
        """
        decays = [o for o in operations if isinstance(o, _Decay)]
        adds = [o for o in operations if isinstance(o, _Add)]
        changed = [*(o.target for o in adds), *(o.v for o in decays), *(o.head for o in decays)]
        kept = [t.clone() for t in changed]

        def as_they_are() -> None:
            for t, values in zip(changed, kept, strict=True):
                t.copy_(values)

        try:
            if not self._same(as_they_are, changed, operations):
                return
            for n in _NUMERATORS if decays else ():
                others = [_with_numerator(o, n) for o in operations]
                if not self._same(lambda others=others: _randomise(others), changed, others):  # type: ignore[misc]
                    return
            if decays:
                self._same(lambda: _randomise(operations), changed, operations)
        finally:
            as_they_are()

    def _same(self, start: Callable[[], None], changed: list[Tensor], operations: _Operations) -> bool:
        """Whether both functions do the same from `start`; if not, the compiled one is dropped."""
        assert self.compiled is not None
        start()
        _run(operations)
        expected = [t.clone() for t in changed]
        start()
        try:
            with compiling():
                self.compiled(operations)
        except Exception as error:  # whatever the compiler raises, eager is right
            warn("the fixed-point step could not be compiled", error)
            self.compiled = None
            return False
        if not all(map(torch.equal, changed, expected)):
            warn("the compiled fixed-point step has other bits than eager")
            self.compiled = None
            return False
        return True


def _with_numerator(operation: _Decay | _Add, n: int) -> _Decay | _Add:
    if isinstance(operation, _Add):
        return operation
    divisor = torch.full_like(operation.divisor, n % operation.radix.base)
    return _Decay(operation.v, operation.head, divisor, operation.radix, operation.back)


def _randomise(operations: _Operations) -> None:
    """Integers anywhere in the range that the operations promise for; the same at each call."""
    draw = torch.Generator().manual_seed(0)

    def fill(t: Tensor, low: int, high: int) -> None:
        drawn = torch.randint(low, high, (min(t.numel(), _DISTINCT),), generator=draw).to(t.device)
        t.copy_(drawn.repeat(-(-t.numel() // len(drawn)))[: t.numel()].view(t.shape))

    for t in (o.target if isinstance(o, _Add) else o.v for o in operations):
        fill(t[0] if t.ndim == 2 else t, -(1 << _NUMBER_BITS), 1 << _NUMBER_BITS)
        if t.ndim == 2:
            fill(t[1], 0, 1 << LOW_BITS)
    for o in operations:
        if isinstance(o, _Decay):
            fill(o.head, 0, int(o.divisor.min()) << HEAD_BITS - o.radix.bits)
