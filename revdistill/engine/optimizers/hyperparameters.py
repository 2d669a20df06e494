"""An optimizer's hyperparameter, resolved once into a table: a row per step, a column per group of parameters.

A user gives a float, a tensor of shape () or [T], for the learning rate also [T, E] (a rate per stacked network), a
schedule (`schedules`), or a dict from parameter name to one of these. The table is built with differentiable
operations, so its gradient goes back to whatever the user gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from revdistill.engine.integers.radix import FINE, Radix
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.schedules import is_schedule, numbers
from revdistill.engine.scalars import as_float, is_real

Value = float | Tensor | Callable[[int], float] | LRScheduler
Hyperparameter = Value | Mapping[str, Value]


@dataclass(frozen=True)
class Table:
    """values: float64 [T or 1, G] on the parameters' device, maybe requiring grad. index: None where G is 1, else the
    column of each element of the flat buffer, int64 [numel]. host: `values` as Python floats. each: the column of each
    parameter, where all of its elements have one: of those too of which nothing lies in this flat buffer."""

    values: Tensor
    index: Tensor | None
    host: list[list[float]] = field(repr=False)
    each: tuple[int, ...] | None = field(default=None, repr=False)

    @property
    def is_number(self) -> bool:
        """Whether `value` is a number of the host."""
        return self.index is None

    def row(self, k: int) -> list[float]:
        """The groups' values at step k."""
        return self.host[k if len(self.host) > 1 else 0]

    def value(self, k: int) -> float | Tensor:
        """What multiplies the flat buffer at step k: a float, or float64 [numel]."""
        if self.index is None:
            return self.row(k)[0]
        return self.row_of(k, self.values.detach()).index_select(0, self.index)

    def row_of(self, k: int, like: Tensor) -> Tensor:
        """Step k's row of a tensor [..., T or 1, G], of the shape of `values` but for its first dimensions: a view."""
        return like.select(-2, k if len(self.host) > 1 else 0)

    def leaf(self, k: int) -> Tensor:
        """Step k's values, differentiable where the table is: float64 [], or [numel]."""
        row = self.row_of(k, self.values)
        return row[0] if self.index is None else row[self.index]

    def bound(self, k: int) -> float:
        """The largest of the groups' magnitudes at step k."""
        return self._bounds[k if len(self._bounds) > 1 else 0]

    def largest(self) -> tuple[float, int, int]:
        """The largest magnitude of all steps and groups, its step, and the first entry of the flat buffer that it is
        for; 0 without steps.
        """
        bound, k = max(((bound, -k) for k, bound in enumerate(self._bounds)), default=(0.0, 0))
        if self.index is None or not self.host:
            return bound, -k, 0
        column = max(range(len(self.host[-k])), key=lambda column: abs(self.host[-k][column]))
        return bound, -k, int((self.index == column).nonzero()[0]) if bool((self.index == column).any()) else 0

    @cached_property
    def _bounds(self) -> list[float]:
        return [max(map(abs, row)) for row in self.host]

    def matters(self) -> bool:
        """Whether it is above 0 anywhere, or wants a gradient."""
        return self.values.requires_grad or any(map(any, self.host))

    def accumulate(self, k: int, a: Tensor, b: Tensor, gradient: Tensor, *, factor: float | Tensor = 1.0) -> None:
        """gradient[k] += factor * <a, b>, group by group.

        a, b: [numel]; gradient has the shape of `values`. For K gradients at once a, or both, are [K, numel], and
        gradient is [K, ...]. factor: a number, or for one gradient one on the device, float64 [].
        """
        row = self.row_of(k, gradient)
        if isinstance(factor, Tensor):  # rounded as below
            if self.index is None:
                row.addcmul_(torch.dot(a, b).to(row.dtype), factor)
            else:
                row.index_add_(-1, self.index, (a * b).to(row.dtype) * factor)
            return
        if self.index is not None:
            row.index_add_(-1, self.index, (a * b).to(row.dtype), alpha=factor)
        elif a.ndim == 1:
            row.add_(torch.dot(a, b), alpha=factor)
        else:
            row.add_((a @ b if b.ndim == 1 else torch.linalg.vecdot(a, b))[:, None], alpha=factor)

    def segments(self, layout: Layout) -> list[tuple[slice, int]]:
        """(part of the flat buffer, column) for runs of neighbours that share a column."""
        if self.index is None:
            return [(slice(0, layout.numel), 0)]
        columns, counts = torch.unique_consecutive(self.index, return_counts=True)
        stops = counts.cumsum(0).tolist()
        return [(slice(a, b), c) for a, b, c in zip([0, *stops], stops, columns.tolist(), strict=False)]


def combined(function: Callable[..., Tensor], *tables: Table) -> Table:
    """The table of an elementwise function of other tables' values, differentiable where they are."""
    grouped = {id(t.index): t for t in tables if t.index is not None}
    if len(grouped) <= 1:
        alone = next(iter(grouped.values()), tables[0])
        values, index, each = function(*(t.values for t in tables)), alone.index, alone.each
    else:  # a column for each combination of columns that occurs
        code, codes = _combinations(tables)
        # Of parameters too, whose numbers may lie with another rank.
        known = torch.tensor(codes, dtype=code.dtype).to(code.device)
        present, places = torch.unique(torch.cat([known, code]), return_inverse=True)
        index = places[len(known) :]
        each = tuple(places[: len(known)].tolist()) if codes else None
        columns: list[Tensor] = []
        for t in reversed(tables):
            columns.insert(0, t.values[:, present % t.values.shape[1]])
            present = present // t.values.shape[1]
        values = function(*columns)
    return Table(values, index, values.detach().tolist(), each)


def _combinations(tables: Sequence[Table]) -> tuple[Tensor, list[int]]:
    """A number for each combination of columns: of each element [numel]; and of each parameter, none where some have
    several.
    """
    first = next(t.index for t in tables if t.index is not None)
    each = [t.each for t in tables if t.index is not None]
    code, codes = torch.zeros_like(first), [0] * len(each[0] or ())
    for t in tables:
        width = t.values.shape[1]
        code = code * width + (0 if t.index is None else t.index)
        columns = t.each if t.index is not None and t.each is not None else [0] * len(codes)
        codes = [n * width + column for n, column in zip(codes, columns, strict=False)]
    return code, [] if None in each else codes


def quantised(table: Table, radix: Radix) -> Table:
    """Every entry at the nearest n / radix; the derivative is taken as that of the factor asked for."""
    rounded = table.values.detach().mul(radix.base).round_().div_(radix.base)
    values: Tensor = rounded
    if table.values.requires_grad:
        values = _StraightThrough.apply(table.values, rounded)  # type: ignore[no-untyped-call]
    return Table(values, table.index, rounded.tolist(), table.each)


class _StraightThrough(torch.autograd.Function):
    """Forward: the rounded values, exactly. Backward: the identity."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def is_zero(given: Hyperparameter) -> bool:
    """Whether the user gave just 0. (A schedule that is 0 in this piece of a training may not be in the next.)"""
    values = given.values() if isinstance(given, Mapping) else [given]
    return all(is_real(value) and not value for value in values)


def above_zero(name: str, table: Table) -> Table:
    """The table; ValueError that names it where it is 0 anywhere."""
    if not all(map(all, table.host)):
        raise ValueError(f"{name} must be above 0 at every step")
    return table


def below_one(name: str, table: Table) -> Table:
    """A moving average's rate, at least 0 and below 1, as the nearest n / 2^30. Raises: ValueError that names it."""
    if any(v >= 1 for row in table.host for v in row):
        raise ValueError(f"{name} must be at least 0 and below 1, got {max(map(max, table.host)):g}")
    largest = 1 - 1 / FINE.base
    return quantised(combined(lambda values: values.clamp(max=largest), table), FINE)


def resolve(
    name: str,
    given: Hyperparameter,
    layout: Layout,
    steps: int,
    *,
    stackable: bool,
    upper: float = math.inf,
    taken: int = 0,
) -> Table:
    """The table of one hyperparameter. Errors name the argument, what came and what is accepted.

    stackable: whether tensors of shape [T, E] are accepted. upper: the largest value accepted. taken: steps that the
    training has behind it, from which a schedule given as a function counts.
    """
    if isinstance(given, Mapping):
        _check_names(name, given, layout)
        per_parameter = [given[parameter] for parameter in layout.names]
        labels = [f"{name}[{parameter!r}]" for parameter in layout.names]
    else:
        per_parameter = [given] * len(layout.names)
        labels = [name] * len(layout.names)

    columns: list[Tensor] = []
    first_column: dict[
        tuple[str, object], int
    ] = {}  # equal floats, and the same tensor given twice, share their columns
    blocks: dict[tuple[str, object], Tensor] = {}
    index: list[Tensor] = []
    places: list[int] = []  # of the parameters' first columns
    for i, (value, label, shape) in enumerate(zip(per_parameter, labels, layout.shapes, strict=True)):
        key = ("float", as_float(value)) if is_real(value) else ("object", id(value))
        if key not in blocks or key[0] == "float":  # a schedule is run through once, whatever it is given for
            blocks[key] = _block(label, value, layout, steps, stackable=stackable, taken=taken)
        block = blocks[key]
        networks = block.shape[1]
        if networks > 1 and (not shape or shape[0] != networks):
            raise ValueError(
                f"{label} has shape {list(value.shape)} for {networks} stacked networks, "  # type: ignore[union-attr]
                f"but a parameter has shape {list(shape)}; its leading dimension must be {networks}"
            )
        if key not in first_column:
            first_column[key] = sum(c.shape[1] for c in columns)
            columns.append(block)
        places.append(first_column[key])
        column = torch.arange(networks, device=layout.device) + first_column[key]
        each = column.repeat_interleave(shape.numel() // networks) if shape.numel() else column[:0]
        index.append(layout.flat(i, each.view(shape)))

    rows = 1 if all(c.shape[0] == 1 for c in columns) else steps
    values = torch.cat([c.expand(rows, -1) for c in columns], dim=1)
    host = values.detach().tolist()
    if not all(math.isfinite(v) and 0 <= v <= upper for row in host for v in row):
        wrong = next(v for row in host for v in row if not (math.isfinite(v) and 0 <= v <= upper))
        bounds = "at least 0" if math.isinf(upper) else f"between 0 and {upper:g}"
        raise ValueError(f"{name} must be finite and {bounds}, got {wrong:g}")
    one_each = values.shape[1] == len(columns)
    return Table(values, torch.cat(index) if values.shape[1] > 1 else None, host, tuple(places) if one_each else None)


def _check_names(name: str, given: Mapping[str, Value], layout: Layout) -> None:
    missing = [p for p in layout.names if p not in given]
    unknown = [p for p in given if p not in layout.names]
    if missing or unknown:
        problems = [f"nothing for {missing}"] * bool(missing) + [f"unknown names {unknown}"] * bool(unknown)
        raise ValueError(f"{name} is a dict with {' and '.join(problems)}; its keys must be the names in params")


def _block(label: str, value: object, layout: Layout, steps: int, *, stackable: bool, taken: int) -> Tensor:
    """One value as float64 [T or 1, E or 1]."""
    if is_schedule(value):
        rows = numbers(label, value, steps, taken)
        return torch.tensor(rows, dtype=torch.float64, device=layout.device)[:, None]
    if not isinstance(value, Tensor):
        if not is_real(value):
            raise TypeError(
                f"{label} must be a float, a tensor or a schedule, got {type(value).__name__}{_remedy(label, value)}"
            )
        return torch.full((1, 1), as_float(value), dtype=torch.float64, device=layout.device)
    if value.is_meta:
        raise ValueError(f"{label} is on device meta and holds no numbers; make it on {layout.device}")
    if value.layout != torch.strided:
        raise ValueError(f"{label} has layout {value.layout}; accepted are dense tensors: call .to_dense()")
    if not value.is_floating_point():
        raise TypeError(f"{label} must be a floating-point tensor, got {value.dtype}")
    accepted = f"[], [{steps}]" + (f" or [{steps}, networks]" if stackable else "")
    if value.ndim > (2 if stackable else 1) or (value.ndim and value.shape[0] != steps):
        raise ValueError(f"{label} has shape {list(value.shape)}; with steps={steps} it must be {accepted}")
    moved = value.to(device=layout.device, dtype=torch.float64)
    return moved.reshape(1, 1) if value.ndim == 0 else moved[:, None] if value.ndim == 1 else moved


def _remedy(label: str, value: object) -> str:
    if isinstance(value, (list, tuple, np.ndarray)):
        return f"; give torch.as_tensor({label})"
    return f"; give dict({label}.items())" if isinstance(value, nn.ParameterDict) else ""
