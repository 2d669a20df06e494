"""What a move adds: the gradient, theta or a running average as it is, or a differentiable formula of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from revdistill.engine.cotangents import many
from revdistill.engine.integers.backend import Backend
from revdistill.engine.integers.select import root
from revdistill.engine.integers.state import THETA as THETA
from revdistill.engine.integers.state import State
from revdistill.engine.optimizers.hyperparameters import Table

GRADIENT = "gradient"  # its name among the values, beside THETA and those of the slots
Values = Mapping[str, Tensor]  # by name: theta, the gradient, slots; float [numel] each
SLACK = 1.0 + 1e-6  # bounds are floats, and so are the values that they bound


@dataclass
class Bars:
    """dL/d(...) during the way back.

    flat: float [numel] for theta, the slots and the gradient; tables: float64, shaped like the table of each
    hyperparameter that wants a gradient. With K losses at once all have a first dimension of K.
    """

    flat: dict[str, Tensor]
    tables: dict[str, Tensor]

    def rows(self, rows: slice) -> Bars:
        """Those of some of K losses, as views."""
        return Bars(*({name: bar[rows] for name, bar in of.items()} for of in (self.flat, self.tables)))


class Step(Protocol):
    """What a formula is evaluated with, beside its values: step k's hyperparameters, and a square root."""

    @property
    def k(self) -> int: ...

    def of(self, table: Table) -> float | Tensor:
        """Step k's value, as a number or a tensor that broadcasts to [numel]."""

    def root(self, x: Tensor) -> Tensor:
        """sqrt(x), with derivative 0 where x is 0."""


@dataclass(frozen=True)
class Exact:
    """For values that become integers: float64, of the same bits on both ways."""

    k: int
    backend: Backend

    def of(self, table: Table) -> float | Tensor:
        return table.value(self.k)

    def root(self, x: Tensor) -> Tensor:
        return self.backend.root(x)


@dataclass(frozen=True)
class Differentiable:
    """For autograd. leaves: [groups] in the place of a table's row, by the table's id."""

    k: int
    dtype: torch.dtype
    leaves: Mapping[int, Tensor] = field(default_factory=dict)

    def of(self, table: Table) -> float | Tensor:
        row = self.leaves.get(id(table))
        if row is not None:
            return (row[0] if table.index is None else row[table.index]).to(self.dtype)
        value = table.leaf(self.k) if table.values.requires_grad else table.value(self.k)
        return value.to(self.dtype) if isinstance(value, Tensor) else value

    def root(self, x: Tensor) -> Tensor:
        found: Tensor = _Root.apply(x)  # type: ignore[no-untyped-call]
        return found


class _Root(torch.autograd.Function):
    """sqrt, of the same bits on every device, and its derivative, any number of times; 0 where the root is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = root(x)
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        (found,) = ctx.saved_tensors
        positive = found > 0
        return torch.where(positive, bar / torch.where(positive, found, 1.0) / 2, 0.0)


class Source(ABC):
    """Elementwise, never stored. reads: the names of its values; tables: the hyperparameters in it, by name."""

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]: ...

    @property
    def tables(self) -> Mapping[str, Table]:
        return {}

    @abstractmethod
    def value(self, values: Values, step: Step) -> Tensor:
        """[numel], in the values' dtype, differentiable where they are."""

    @abstractmethod
    def bound(self, k: int, bounds: Mapping[str, float]) -> float:
        """A proved bound on the magnitude at step k, from bounds on what it reads; inf where there is none."""

    def operand(self, k: int, state: State, gradient: Tensor | None) -> tuple[Tensor, float]:
        """(x, unit) with the value x unit, from the state as it is; of the same bits on both ways."""
        return self.exact(k, state, gradient), 1.0

    def exact(self, k: int, state: State, gradient: Tensor | None) -> Tensor:
        """float64 [numel]"""
        return self.value({name: _float64(name, state, gradient) for name in self.reads}, Exact(k, state.backend))

    def vjp_reads(self, wanted: bool) -> frozenset[str]:
        """What `vjp` needs the values of; wanted: a hyperparameter that multiplies the source wants a gradient."""
        return frozenset(self.reads)

    def vjp(self, k: int, values: Values, bars: Bars, bar: Tensor, factor: float | Tensor) -> Tensor | None:
        """Carry factor * bar on to what is read and to the hyperparameters; return the value.

        By autograd over `value`. It never feeds the reversal (invariant 1).
        """
        learned = {name: table for name, table in self.tables.items() if name in bars.tables}
        with torch.enable_grad():
            inputs = {name: values[name].detach().requires_grad_() for name in self.reads}
            leaves = {id(t): t.row_of(k, t.values.detach()).clone().requires_grad_() for t in learned.values()}
            value = self.value(inputs, Differentiable(k, bar.dtype, leaves))
        value_bar = (bar * factor).to(value.dtype)
        read = [*inputs.values(), *leaves.values()]
        found = iter(torch.autograd.grad(value, read, value_bar) if bar.ndim == 1 else many(value, read, value_bar))
        for name in inputs:
            bars.flat[name].add_(next(found))
        for name, table in learned.items():
            table.row_of(k, bars.tables[name]).add_(next(found))
        return value.detach()


@dataclass(frozen=True)
class Read(Source):
    """The gradient, theta or a slot as it is."""

    name: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.name,)

    def value(self, values: Values, step: Step) -> Tensor:
        return values[self.name]

    def bound(self, k: int, bounds: Mapping[str, float]) -> float:
        return bounds[self.name]

    def operand(self, k: int, state: State, gradient: Tensor | None) -> tuple[Tensor, float]:
        if self.name == GRADIENT:
            assert gradient is not None
            return gradient, 1.0
        return state.numbers[self.name], state.formats[self.name].resolution

    def vjp_reads(self, wanted: bool) -> frozenset[str]:
        return frozenset(self.reads if wanted else ())

    def vjp(self, k: int, values: Values, bars: Bars, bar: Tensor, factor: float | Tensor) -> Tensor | None:
        """name_bar += factor bar."""
        target = bars.flat[self.name]
        if isinstance(factor, Tensor) and not factor.ndim:
            target.addcmul_(bar, factor)  # with one rounding, as below
        elif isinstance(factor, Tensor):
            target.add_(bar * factor)
        else:
            target.add_(bar, alpha=factor)
        return values.get(self.name)


@dataclass(frozen=True)
class Penalised(Source):
    """gradient + weight_decay theta: an L2 penalty, as torch.optim has it. weight_decay: None where there is none."""

    weight_decay: Table | None

    @property
    def reads(self) -> tuple[str, ...]:
        return (GRADIENT,) if self.weight_decay is None else (GRADIENT, THETA)

    @property
    def tables(self) -> Mapping[str, Table]:
        return {} if self.weight_decay is None else {"weight_decay": self.weight_decay}

    def value(self, values: Values, step: Step) -> Tensor:
        gradient = values[GRADIENT]
        return gradient if self.weight_decay is None else gradient + values[THETA] * step.of(self.weight_decay)

    def bound(self, k: int, bounds: Mapping[str, float]) -> float:
        penalty = 0.0 if self.weight_decay is None else self.weight_decay.bound(k) * bounds[THETA]
        return (bounds[GRADIENT] + penalty) * SLACK


@dataclass(frozen=True)
class Square(Source):
    """of^2"""

    of: Source

    @property
    def reads(self) -> tuple[str, ...]:
        return self.of.reads

    @property
    def tables(self) -> Mapping[str, Table]:
        return self.of.tables

    def value(self, values: Values, step: Step) -> Tensor:
        return self.of.value(values, step).square()

    def bound(self, k: int, bounds: Mapping[str, float]) -> float:
        root = self.of.bound(k, bounds)
        return root * root * SLACK


def _float64(name: str, state: State, gradient: Tensor | None) -> Tensor:
    if name != GRADIENT:
        return state.floats(name)
    assert gradient is not None
    return gradient.double()
