"""The moves that a training step is made of. Each knows all of itself: forward, inverse, value in floats, derivative,
bound.

    Decay           s <- s n / radix                    inverse: the digits come back from the bit store
    Add             t <- t + round(factor source)       inverse: t <- t - round(factor source)
    RunningMaximum  s <- max(s, source)                 no inverse: it forgets what it replaces

A step is an ordered list of moves (`update`). The gradient is evaluated once, at theta, before all of them; a move
reads what is there when it is made. It never reads its own target if it is to be undone: on the way back, it reads the
same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.radix import COARSE, Radix
from revdistill.engine.integers.state import State
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.hyperparameters import Table
from revdistill.engine.optimizers.sources import Bars, Source, Step, Values

_SLACK = 1.0 + 1e-9  # bounds are floats themselves


@dataclass(frozen=True)
class Factor:
    """A product of a constant and of hyperparameters. constant: a float, or float64 [numel]; first: it at step 0."""

    constant: float | Tensor = 1.0
    tables: Mapping[str, Table] = field(default_factory=dict)
    first: float | None = None

    def value(self, k: int, *, without: str | None = None) -> float | Tensor:
        """At step k, as a float or float64 [numel]; `without` one of the hyperparameters."""
        if without is None and self._numbers is not None:
            return self._numbers[min(k, len(self._numbers) - 1)]
        value = self.start(k)
        for name, table in self.tables.items():
            if name != without:
                value = value * table.value(k)
        return value

    def start(self, k: int) -> float | Tensor:
        """The constant at step k."""
        return self.constant if k or self.first is None else self.first

    def bound(self, k: int) -> float:
        """The largest magnitude at step k."""
        return self._bounds[min(k, len(self._bounds) - 1)]

    # Of all steps at once: a training's steps are many, and each looks here several times. At least two entries, as
    # step 0 may be another one; the last stands for all after it.

    @cached_property
    def _steps(self) -> range:
        return range(max((2, *(len(t.host) for t in self.tables.values()))))

    @cached_property
    def _numbers(self) -> list[float] | None:
        if isinstance(self.constant, Tensor) or not all(t.is_number for t in self.tables.values()):
            return None
        return [self._product(k, lambda table, k: table.row(k)[0]) for k in self._steps]

    @cached_property
    def _bounds(self) -> list[float]:
        return [abs(self._product(k, lambda table, k: table.bound(k))) for k in self._steps]

    def _product(self, k: int, of: Callable[[Table, int], float]) -> float:
        constant = self.start(k)
        value = float(constant.abs().max()) if isinstance(constant, Tensor) else constant
        for table in self.tables.values():
            value = value * of(table, k)
        return value


class Move(ABC):
    """One change of one number per parameter.

    target: theta or a slot; reads: what it sees besides; setting: what the user gave for it to be there, for messages.
    """

    target: str
    setting: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    @property
    def irreversible(self) -> str | None:
        """Why nothing undoes it, whatever is known; None where it can be undone."""
        return None

    @property
    def needs_the_gradient(self) -> str:
        """Why it cannot be undone before the gradient is known; for moves that see it or theta."""
        its = f"{self.setting}: its" if self.setting else "a"
        return f"{its} change of {self.target} needs the gradient at the very theta that is to be found"

    @abstractmethod
    def forward(self, k: int, state: State, gradient: Tensor) -> None:
        """Make it, at step k."""

    @abstractmethod
    def inverse(self, k: int, state: State, gradient: Tensor | None) -> None:
        """Undo it. gradient: bit-identical to the one of the way forward; None where it is not known yet."""

    @abstractmethod
    def value(self, values: Values, step: Step) -> Tensor:
        """The target after it, in floats, differentiable."""

    @abstractmethod
    def vjp(self, k: int, values: Values, bars: Bars) -> None:
        """From dL/d(after the move) to dL/d(before it). values: those of `vjp_reads` that the forward move saw."""

    @abstractmethod
    def vjp_reads(self, wanted: frozenset[str]) -> frozenset[str]:
        """What `vjp` needs the values of, where these hyperparameters want a gradient."""

    @abstractmethod
    def bound(self, k: int, bounds: Mapping[str, float], resolution: float) -> float:
        """A proved bound on |target| after it, from bounds before it. resolution: of the target's format."""

    def reached(self, k: int, state: State, gradient: Tensor) -> Tensor | None:
        """Where it would take the target from here, float64 [numel]; None where that is no further from 0."""
        return None


@dataclass(frozen=True)
class Decay(Move):
    """target <- target factor, exactly invertible: radix factor is an integer n (Maclaurin et al. 2015, algorithm 3).

    name: the factor's among the hyperparameters; layout: of the flat buffer.
    """

    target: str
    name: str
    table: Table
    layout: Layout = field(repr=False)
    radix: Radix = COARSE

    @cached_property
    def segments(self) -> list[tuple[slice, int]]:
        """(part of the flat buffer, column of the table): each part has a bit store of its own."""
        return self.table.segments(self.layout)

    @cached_property
    def _numerators(self) -> list[list[int]]:
        return [[self.radix.quantise(row[column]) for _, column in self.segments] for row in self.table.host]

    def numerators(self, k: int) -> list[int]:
        """n of each segment at step k."""
        return self._numerators[k if len(self._numerators) > 1 else 0]

    def forward(self, k: int, state: State, gradient: Tensor) -> None:
        for v, store, n in self.parts(k, state):
            store.decay_(v, n)

    def inverse(self, k: int, state: State, gradient: Tensor | None) -> None:
        for v, store, n in reversed(self.parts(k, state)):
            store.undecay_(v, n)

    def parts(self, k: int, state: State) -> list[tuple[Tensor, BitStore, int]]:
        """Of the target at step k: (its numbers, their store, n)."""
        target, stores, numerators = state.numbers[self.target], state.stores[self.target], self.numerators(k)
        if len(stores) == 1:
            return [(target, stores[0], numerators[0])]
        return [
            (target[..., part], store, n) for (part, _), store, n in zip(self.segments, stores, numerators, strict=True)
        ]

    def value(self, values: Values, step: Step) -> Tensor:
        return values[self.target] * step.of(self.table)

    def vjp(self, k: int, values: Values, bars: Bars) -> None:
        """factor_bar_k += <target_bar, target before>; target_bar <- factor target_bar."""
        bar = bars.flat[self.target]
        if self.name in bars.tables:
            self.table.accumulate(k, bar, values[self.target], bars.tables[self.name])
        bar.mul_(self.table.value(k))

    def vjp_reads(self, wanted: frozenset[str]) -> frozenset[str]:
        return frozenset({self.target} if self.name in wanted else ())

    @cached_property
    def _bounds(self) -> list[float]:
        return [max(row) * _SLACK for row in self.table.host]

    def bound(self, k: int, bounds: Mapping[str, float], resolution: float) -> float:
        return bounds[self.target] * self._bounds[k if len(self._bounds) > 1 else 0] + resolution

    def forgets(self, steps: int) -> bool:
        """Whether nothing of the target is left at any step."""
        return not any(n for k in range(steps) for n in self.numerators(k))

    def keeps(self, steps: int) -> bool:
        """Whether something of the target is left at every step, in every segment."""
        return all(n for k in range(steps) for n in self.numerators(k))


@dataclass(frozen=True)
class Add(Move):
    """target <- target + round(factor source)."""

    target: str
    source: Source
    factor: Factor = field(default_factory=Factor)
    setting: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        return self.source.reads

    @property
    def irreversible(self) -> str | None:
        return self.needs_the_gradient if self.target in self.reads else None

    def forward(self, k: int, state: State, gradient: Tensor) -> None:
        self._add(k, state, gradient, 1)

    def inverse(self, k: int, state: State, gradient: Tensor | None) -> None:
        self._add(k, state, gradient, -1)

    def _add(self, k: int, state: State, gradient: Tensor | None, sign: int) -> None:
        source, unit = self.source.operand(k, state, gradient)
        # One multiplication: the scales are powers of two, so the factor with them is exact.
        factor = self.factor.value(k) * (unit * state.formats[self.target].scale)
        state.backend.add(state.numbers[self.target], source, factor, sign)

    def value(self, values: Values, step: Step) -> Tensor:
        source, factor = self.source.value(values, step), self.factor.start(step.k)
        if isinstance(factor, Tensor):
            factor = factor.to(source.dtype)
        for table in self.factor.tables.values():
            factor = factor * step.of(table)
        return values[self.target] + source * factor

    def vjp(self, k: int, values: Values, bars: Bars) -> None:
        """source_bar += factor target_bar; factor_bar += <target_bar, source>."""
        bar = bars.flat[self.target]
        if self.target in self.reads:
            bar = bar.clone()  # as it was: the source's own bar is this one
        source = self.source.vjp(k, values, bars, bar, self.factor.value(k))
        for name, table in self.factor.tables.items():
            if name in bars.tables:
                assert source is not None
                rest = self.factor.value(k, without=name)
                weighted, scale = (bar * rest, 1.0) if isinstance(rest, Tensor) and rest.ndim else (bar, rest)
                table.accumulate(k, weighted.to(bar.dtype), source.to(bar.dtype), bars.tables[name], factor=scale)

    def vjp_reads(self, wanted: frozenset[str]) -> frozenset[str]:
        return self.source.vjp_reads(not wanted.isdisjoint(self.factor.tables))

    def bound(self, k: int, bounds: Mapping[str, float], resolution: float) -> float:
        amount = self.factor.bound(k) * self.source.bound(k, bounds) + resolution
        return (bounds[self.target] + amount) * _SLACK

    def reached(self, k: int, state: State, gradient: Tensor) -> Tensor | None:
        return state.floats(self.target) + self.source.exact(k, state, gradient) * self.factor.value(k)


@dataclass(frozen=True)
class RunningMaximum(Move):
    """target <- max(target, source), both in two words: AMSGrad's."""

    target: str
    source: str
    setting: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def irreversible(self) -> str | None:
        return f"{self.setting}: its maximum forgets what it replaces"

    def forward(self, k: int, state: State, gradient: Tensor) -> None:
        state.backend.maximum(state.numbers[self.target], state.numbers[self.source])

    def inverse(self, k: int, state: State, gradient: Tensor | None) -> None:
        raise NotImplementedError(self.irreversible)

    def value(self, values: Values, step: Step) -> Tensor:
        """Of equal ones the source has the derivative."""
        return torch.where(values[self.source] >= values[self.target], values[self.source], values[self.target])

    def vjp(self, k: int, values: Values, bars: Bars) -> None:
        """Where the source won, target_bar is the source's."""
        won = values[self.source] >= values[self.target]  # as after the move
        bars.flat[self.source].add_(bars.flat[self.target] * won)
        bars.flat[self.target].mul_(~won)

    def vjp_reads(self, wanted: frozenset[str]) -> frozenset[str]:
        return frozenset({self.source, self.target})

    def bound(self, k: int, bounds: Mapping[str, float], resolution: float) -> float:
        return max(bounds[self.target], bounds[self.source])
