"""The moves that a training step is made of: each has its forward, its inverse and its adjoint.

    Decay   s <- s n / 2^16               inverse: the digits come back from the bit store
    Add     t <- t + round(factor source)   inverse: t <- t - round(factor source)

An Add is a *kick* when it changes a running average from the gradient or from theta, and a *drift* when it changes theta.
A step is its decays, then its kicks, then its drifts; the gradient is evaluated once, at theta, before all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from revdistill.engine.bitstore import BitStore, quantise
from revdistill.engine.history import History
from revdistill.engine.layout import Layout
from revdistill.engine.schedules import Table

THETA, GRADIENT = "theta", "gradient"


@dataclass
class State:
    """What training changes. fixed: int64 [numel] for theta and for each running average ("slot"); stores: the bit
    stores of each decayed slot, one per segment."""

    fixed: dict[str, Tensor]
    stores: dict[str, list[BitStore]]

    def all_stores(self) -> list[BitStore]:
        return [store for stores in self.stores.values() for store in stores]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.fixed.values()) + sum(s.head.nbytes for s in self.all_stores())


@dataclass
class Bars:
    """dL/d(...) during the way back. flat: float [numel] for theta, the slots and the gradient; tables: float64, shaped
    like the table of each hyperparameter that wants a gradient."""

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
    """slot <- slot * momentum, exactly invertible: 2^16 momentum is an integer n (Maclaurin et al. 2015, algorithm 3)."""

    slot: str
    name: str
    table: Table
    segments: list[tuple[slice, int]] = field(repr=False)

    def stores(self, device: torch.device, history: History) -> list[BitStore]:
        return [BitStore((part.stop - part.start,), device, history) for part, _ in self.segments]

    def parts(self, k: int, state: State) -> list[tuple[Tensor, BitStore, int]]:
        """(slot, store, n) per segment."""
        row, slot = self.table.row(k), state.fixed[self.slot]
        stores = state.stores[self.slot]
        return [(slot[part], store, quantise(row[column])) for (part, column), store in zip(self.segments, stores, strict=True)]

    def loses_everything(self, k: int) -> bool:
        return not any(self.table.row(k))

    def adjoint(self, k: int, before: dict[str, Tensor], bars: Bars) -> None:
        """momentum_bar_k += <slot_bar, slot before the decay>; slot_bar <- momentum slot_bar."""
        slot_bar = bars.flat[self.slot]
        if self.name in bars.tables:
            self.table.accumulate(k, slot_bar, before[self.slot], bars.tables[self.name])
        slot_bar.mul_(self.table.at(k))


@dataclass(frozen=True)
class Add:
    """target <- target + round(factor * source). source: the gradient, theta, or a slot."""

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
class Update:
    """One optimizer's step as a list of moves.

    layout: of the flat buffer; tables: by name, every hyperparameter that can have a gradient.
    """

    layout: Layout
    tables: dict[str, Table]
    decays: tuple[Decay, ...]
    kicks: tuple[Add, ...]
    drifts: tuple[Add, ...]

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(decay.slot for decay in self.decays)

    @property
    def is_explicitly_reversible(self) -> bool:
        """Whether drifts see slots only, so that theta comes back before its gradient is needed."""
        return all(drift.source in self.slots for drift in self.drifts)

    def keeps_memory(self, steps: int) -> bool:
        """Whether any slot's old value ever matters (momentum above 0 somewhere)."""
        return not all(decay.loses_everything(k) for decay in self.decays for k in range(steps))

    def always_decays(self, steps: int) -> bool:
        """Whether momentum is above 0 at every step, in every group."""
        return all(quantise(m) > 0 for decay in self.decays for k in range(steps) for m in decay.table.row(k))

    def initial_state(self, theta: Tensor, history: History) -> State:
        """theta: int64 [numel]; the slots start at 0 and the stores empty."""
        fixed = {THETA: theta} | {slot: torch.zeros_like(theta) for slot in self.slots}
        return State(fixed, {decay.slot: decay.stores(theta.device, history) for decay in self.decays})
