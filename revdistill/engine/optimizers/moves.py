"""The moves that a training step is made of: each has its forward, its inverse and its adjoint.

    Decay   s <- s n / radix                inverse: the digits come back from the bit store
    Add     t <- t + round(factor source)   inverse: t <- t - round(factor source)

An Add is a *kick* when it changes a running average from the gradient or from theta, and a *drift* when it changes
theta; so is a Decay of theta. A step is its decays, then its kicks, then its drifts; the gradient is evaluated once, at
theta, before all of them. A source may be *derived*, just before the kicks or the drifts that use it: Adam's squared
gradient, Adam's direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.integers.history import History
from revdistill.engine.integers.radix import COARSE, Scaling
from revdistill.engine.integers.wide import Wide
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.hyperparameters import Table

THETA, GRADIENT = "theta", "gradient"


@dataclass
class State:
    """What training changes. fixed: int64 [numel] for theta and for each running average ("slot"), [2, numel] for a
    wide one;
    stores: the bit stores of all that decays, one per segment."""

    fixed: dict[str, Tensor]
    stores: dict[str, list[BitStore]]

    def all_stores(self) -> list[BitStore]:
        return [store for stores in self.stores.values() for store in stores]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.fixed.values()) + sum(s.head.nbytes for s in self.all_stores())


@dataclass
class Bars:
    """dL/d(...) during the way back. flat: float [numel] for theta, the slots, the gradient and what is derived;
    tables: float64, shaped like the table of each hyperparameter that wants a gradient."""

    flat: dict[str, Tensor]
    tables: dict[str, Tensor]


def axpy_(target: Tensor, source: Tensor, factor: float | Tensor) -> None:
    """target += factor * source."""
    if isinstance(factor, Tensor):
        target.add_(source * factor)
    else:
        target.add_(source, alpha=factor)


@dataclass(frozen=True)
class Factor:
    """A product of one constant and of hyperparameters at step k; `first` is the constant at k = 0."""

    constant: float | Tensor
    first: float
    names: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()

    def at(self, k: int, *, without: str | None = None) -> float | Tensor:
        value: float | Tensor = self.constant if k else self.first
        for name, table in zip(self.names, self.tables, strict=True):
            if name != without:
                value = value * table.at(k)
        return value

    def largest(self, k: int) -> float:
        value = self.constant if k else self.first
        bound = float(value.abs().max()) if isinstance(value, Tensor) else abs(value)
        for table in self.tables:
            bound *= table.largest(k)
        return bound


@dataclass(frozen=True)
class Decay:
    """slot <- slot * factor, exactly invertible: radix * factor is an integer n (Maclaurin et al. 2015,
    algorithm 3).
    """

    slot: str
    name: str
    table: Table
    segments: list[tuple[slice, int]] = field(repr=False)
    scaling: Scaling = COARSE

    def stores(self, device: torch.device, history: History) -> list[BitStore]:
        return [BitStore((part.stop - part.start,), device, history, self.scaling) for part, _ in self.segments]

    def parts(self, k: int, state: State) -> list[tuple[Tensor, BitStore, int]]:
        """(slot, store, n) per segment."""
        row, slot = self.table.row(k), state.fixed[self.slot]
        stores, quantise = state.stores[self.slot], self.scaling.quantise
        return [
            (slot[..., part], store, quantise(row[column]))
            for (part, column), store in zip(self.segments, stores, strict=True)
        ]

    def loses_everything(self, k: int) -> bool:
        return not any(self.table.row(k))

    def adjoint(self, k: int, before: dict[str, Tensor], bars: Bars) -> None:
        """factor_bar_k += <slot_bar, slot before the decay>; slot_bar <- factor slot_bar."""
        slot_bar = bars.flat[self.slot]
        if self.name in bars.tables:
            self.table.accumulate(k, slot_bar, before[self.slot], bars.tables[self.name])
        slot_bar.mul_(self.table.at(k))


Lookup = Callable[
    [Table], float | Tensor
]  # a hyperparameter at one step, as a number or a tensor that broadcasts to [numel]


class Derived(Protocol):
    """A function of the gradient, theta or slots, for an Add to use as its source; never stored, so that nothing undoes
    it.
    """

    @property
    def name(self) -> str:
        """What Adds call it."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of what `value` reads."""

    def value(self, values: dict[str, Tensor], at: Lookup) -> Tensor:
        """[numel], in the inputs' dtype, differentiable where they are."""

    def adjoint(self, k: int, values: dict[str, Tensor], bars: Bars) -> None:
        """Carry bars.flat[name] on to the inputs and the hyperparameters. values: the inputs, and the value by name."""

    def largest(self, k: int, bounds: dict[str, float]) -> float:
        """A proved bound on the magnitude at step k, from bounds on the inputs."""


@dataclass(frozen=True)
class Add:
    """target <- target + round(factor * source). source: the gradient, theta, a slot, or something derived."""

    target: str
    source: str
    factor: Factor

    def adjoint(self, k: int, values: dict[str, Tensor], bars: Bars) -> None:
        """source_bar += factor target_bar; factor_bar += <target_bar, source>. values: those the forward move saw."""
        target_bar = bars.flat[self.target]
        for name, table in zip(self.factor.names, self.factor.tables, strict=True):
            if name in bars.tables:
                rest = self.factor.at(k, without=name)
                weighted, scale = (target_bar * rest, 1.0) if isinstance(rest, Tensor) else (target_bar, rest)
                table.accumulate(k, weighted.to(target_bar.dtype), values[self.source], bars.tables[name], factor=scale)
        axpy_(bars.flat[self.source], target_bar, self.factor.at(k))


@dataclass(frozen=True)
class Peak:
    """slot <- max(slot, source), both wide: AMSGrad's. What it overwrites is gone, so no step that has one is walked
    back.
    """

    slot: str
    source: str

    def forward(self, state: State) -> None:
        slot, source = state.fixed[self.slot], state.fixed[self.source]
        higher = (source[0] > slot[0]) | ((source[0] == slot[0]) & (source[1] > slot[1]))
        torch.where(higher, source, slot, out=slot)

    def value(self, values: dict[str, Tensor]) -> Tensor:
        """In floating point, differentiable: of equal ones the source has the derivative."""
        return torch.where(values[self.source] >= values[self.slot], values[self.source], values[self.slot])

    def adjoint(self, after: dict[str, Tensor], bars: Bars) -> None:
        """Where the source won, slot_bar is the source's."""
        won = after[self.source] >= after[self.slot]
        bars.flat[self.source].add_(bars.flat[self.slot] * won)
        bars.flat[self.slot].mul_(~won)


@dataclass(frozen=True)
class Stage:
    """One half of a step: what is derived, then what decays, then what is added, then the peaks."""

    derived: tuple[Derived, ...]
    decays: tuple[Decay, ...]
    adds: tuple[Add, ...]
    peaks: tuple[Peak, ...] = ()


@dataclass(frozen=True)
class Update:
    """One optimizer's step as a list of moves.

    layout: of the flat buffer; tables: by name, every hyperparameter that can have a gradient. decays, kicks: of the
    slots, kicks with sources derived before any of them; peaks: of slots, after the kicks; shrink: theta's own decay,
    the first of the drifts; wide: slots in two words.
    """

    layout: Layout
    tables: dict[str, Table]
    decays: tuple[Decay, ...]
    kicks: tuple[Add, ...]
    drifts: tuple[Add, ...]
    for_kicks: tuple[Derived, ...] = ()
    for_drifts: tuple[Derived, ...] = ()
    peaks: tuple[Peak, ...] = ()
    shrink: tuple[Decay, ...] = ()
    wide: frozenset[str] = frozenset()

    @property
    def slots(self) -> tuple[str, ...]:
        return (*(decay.slot for decay in self.decays), *(peak.slot for peak in self.peaks))

    @property
    def derived(self) -> tuple[Derived, ...]:
        return (*self.for_kicks, *self.for_drifts)

    @property
    def stages(self) -> tuple[Stage, Stage]:
        """(kicks, drifts)"""
        return Stage(self.for_kicks, self.decays, self.kicks, self.peaks), Stage(
            self.for_drifts, self.shrink, self.drifts
        )

    @property
    def no_way_back(self) -> str | None:
        """Why the step cannot be undone explicitly; None where drifts see slots only, and no slot forgets."""
        if self.peaks:
            return "amsgrad=True: its maximum forgets what it replaces"
        of_slots = {d.name for d in self.for_drifts if set(d.inputs) <= set(self.slots)} | set(self.slots)
        if not all(drift.source in of_slots for drift in self.drifts):
            return "nesterov=True: its change of theta needs the gradient at the very theta that is to be found"
        return None

    def keeps_memory(self, steps: int) -> bool:
        """Whether any slot's or head's old value ever matters (momentum above 0 somewhere)."""
        return bool(self.shrink or self.peaks) or not all(
            decay.loses_everything(k) for decay in self.decays for k in range(steps)
        )

    def always_decays(self, steps: int) -> bool:
        """Whether momentum is above 0 at every step, in every group."""
        return all(d.scaling.quantise(m) > 0 for d in self.decays for k in range(steps) for m in d.table.row(k))

    def format_of(self, name: str, fixed: FixedPoint) -> FixedPoint | Wide:
        """The number format of theta or a slot, where the others have `fixed`."""
        return Wide() if name in self.wide else fixed

    def initial_state(self, theta: Tensor, history: History) -> State:
        """theta: int64 [numel]; the slots start at 0 and the stores empty."""
        fixed = {THETA: theta}
        for slot in self.slots:
            fixed[slot] = Wide.zeros(len(theta), theta.device) if slot in self.wide else torch.zeros_like(theta)
        return State(fixed, {decay.slot: decay.stores(theta.device, history) for decay in (*self.decays, *self.shrink)})
