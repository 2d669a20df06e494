"""The integer work of a step, fused by torch.compile, for devices other than the CPU, where it is compiled already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from revdistill.engine.adjoints.trajectory import Adds, Kernels, Pushes
from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.radix import HEAD_BITS, Scaling, divisor_of
from revdistill.engine.integers.wide import LOW_BITS, add_by_passes_
from revdistill.engine.loss.compiling import compiling, warn

# As in `Kernels`, with scalars as 0-dim tensors on the device: a new value is then no reason to compile again.
_Pushes = Sequence[tuple[Scaling, Tensor, Tensor, Tensor]]  # arithmetic, slot, head, divisor
_Adds = Sequence[tuple[Tensor, Tensor, Tensor]]
_Passes = Callable[[_Pushes, _Adds], None]

_SLOT_BITS = 60  # of random operands: within what every arithmetic promises for
_DISTINCT = 2**14  # of them; larger tensors repeat these
_NUMERATORS = (1, 49, -1)  # n that random operands are compared for, besides the step's own; -1: the largest there is


def _forward(pushes: _Pushes, adds: _Adds) -> None:
    for scaling, slot, head, divisor in pushes:
        scaling.multiply_by_passes_(slot, head, divisor.to(torch.int64), divisor)
    for target, source, factor in adds:
        add_by_passes_(target, source, factor, sign=1)


def _inverse(pushes: _Pushes, adds: _Adds) -> None:
    for target, source, factor in reversed(adds):
        add_by_passes_(target, source, factor, sign=-1)
    for scaling, slot, head, divisor in reversed(pushes):
        scaling.divide_by_passes_(slot, head, divisor.to(torch.int64), divisor)


class CompiledKernels(Kernels):
    """Integers have no rounding: anything but the same bits as eager passes drops a compiled function."""

    def __init__(self) -> None:
        self._forward = _Checked(_forward)
        self._inverse = _Checked(_inverse)

    def forward(self, pushes: Pushes, adds: Adds) -> None:
        self._forward(pushes, adds)

    def inverse(self, pushes: Pushes, adds: Adds) -> None:
        self._inverse(pushes, adds)


class _Checked:
    """One in-place integer function, compiled; each combination of operands is compared on its first use."""

    def __init__(self, eager: _Passes) -> None:
        self._eager = eager
        self._compiled: _Passes | None = torch.compile(eager, dynamic=False)
        self._seen: set[tuple[int, ...]] = set()

    def __call__(self, pushes: Pushes, adds: Adds) -> None:
        own = [(store.scaling, slot, store.head, _divisor(store, n)) for store, slot, n in pushes]
        operands = own, [(target, source, _scalar(factor, target.device)) for target, source, factor in adds]
        key = (*(scaling.radix_bits for scaling, *_ in own), -1, *(target.ndim for target, *_ in adds))
        if self._compiled is not None and key not in self._seen:
            self._seen.add(key)
            self._compare(*operands)
        (self._compiled or self._eager)(*operands)

    def _compare(self, pushes: _Pushes, adds: _Adds) -> None:
        """Drop the compiled function unless it has eager's bits for these operands, and for random ones in their place.

        At the first step slots and heads are 0, which says nothing about a decay.
        """
        changed = [
            *(target for target, *_ in adds),
            *(slot for _, slot, *_ in pushes),
            *(head for _, _, head, _ in pushes),
        ]
        kept = [t.clone() for t in changed]

        def as_they_are() -> None:
            for t, values in zip(changed, kept, strict=True):
                t.copy_(values)

        try:
            if not self._same(as_they_are, changed, pushes, adds):
                return
            for n in _NUMERATORS if pushes else ():
                others = [(s, slot, head, torch.full_like(divisor, n % s.radix)) for s, slot, head, divisor in pushes]
                if not self._same(lambda others=others: _randomise(others, adds), changed, others, adds):  # type: ignore[misc]
                    return
            if pushes:
                self._same(lambda: _randomise(pushes, adds), changed, pushes, adds)
        finally:
            as_they_are()

    def _same(self, start: Callable[[], None], changed: list[Tensor], pushes: _Pushes, adds: _Adds) -> bool:
        """Whether both functions do the same from `start`; if not, the compiled one is dropped."""
        assert self._compiled is not None
        start()
        self._eager(pushes, adds)
        expected = [t.clone() for t in changed]
        start()
        try:
            with compiling():
                self._compiled(pushes, adds)
        except Exception as error:  # whatever the compiler raises, eager is right
            warn("the fixed-point step could not be compiled", error)
            self._compiled = None
            return False
        if not all(map(torch.equal, changed, expected)):
            warn("the compiled fixed-point step has other bits than eager")
            self._compiled = None
            return False
        return True


def _divisor(store: BitStore, n: int) -> Tensor:
    divisor = store.divisor(n)
    return divisor_of(n, store.head.device) if divisor is None else divisor


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)


def _randomise(pushes: _Pushes, adds: _Adds) -> None:
    """Integers anywhere in the range that the arithmetics promise for; the same at each call."""
    draw = torch.Generator().manual_seed(0)

    def fill(t: Tensor, low: int, high: int) -> None:
        drawn = torch.randint(low, high, (min(t.numel(), _DISTINCT),), generator=draw).to(t.device)
        t.copy_(drawn.repeat(-(-t.numel() // len(drawn)))[: t.numel()].view(t.shape))

    for t in (*(target for target, *_ in adds), *(slot for _, slot, *_ in pushes)):
        fill(t[0] if t.ndim == 2 else t, -(1 << _SLOT_BITS), 1 << _SLOT_BITS)
        if t.ndim == 2:
            fill(t[1], 0, 1 << LOW_BITS)
    for scaling, _, head, divisor in pushes:
        fill(head, 0, int(divisor) << HEAD_BITS - scaling.radix_bits)
