"""The numbers of a step in static memory: one operator puts those of the next step there, and nothing comes from
Python.

A hyperparameter's table lies on the device whole. `DeviceNumbers` picks the row of a counter there; the optimizer's
moves are the same ones, but with a `RowTable` in the place of each table, which gives tensors over that row, not Python
floats.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.fingerprint import fingerprint_of
from revdistill.engine.integers.state import State
from revdistill.engine.optimizers.hyperparameters import Table
from revdistill.engine.optimizers.moves import Decay
from revdistill.engine.optimizers.update import Update

_OF_ONE_UNROLL = (
    "layout",
    "numbers",
    "places",
    "ratio",
)  # fields of moves and sources that no step on the device looks at
ANY = 1  # a step's number where each step after the first is like it


class NoRowsError(Exception):
    """The steps of an unroll are not all of one form. Says why."""


@dataclass(frozen=True)
class RowTable(Table):
    """A table of which one row is seen at a time. values: float64 [1, G], of the step that is made; host: empty."""

    @property
    def is_number(self) -> bool:
        """It is not."""
        return False

    def row(self, k: int) -> list[float]:
        """Numbers of the host are what this is without."""
        raise LookupError("a row of the device has no numbers on the host")

    def value(self, k: int) -> float | Tensor:
        """What multiplies the flat buffer: float64 [], or [numel]."""
        return self.values[0, 0] if self.index is None else self.values[0].index_select(0, self.index)

    def row_of(self, k: int, like: Tensor) -> Tensor:
        """The one row of a tensor [..., 1, G]: a view."""
        return like.select(-2, 0)


@dataclass(frozen=True)
class RowDecay(Decay):
    """A decay by a numerator in static memory.

    numbers: float64 [1, G], the numerators; places: the parts of the target, each with its column, in the order of the
    bit stores; kind: what is done to all of them at every step, "forget" where n is 0, "keep" where it is radix, else
    "shorten".
    """

    numbers: Tensor | None = None
    places: tuple[tuple[slice, int], ...] = ()
    kind: str = "shorten"

    def forward(self, k: int, state: State, gradient: Tensor) -> None:
        """The digits go to the head, where `BitStore.make_room` has made room for them."""
        if self.kind == "forget":
            state.numbers[self.target].zero_()
        for v, store, n in self._shortened(state):
            state.backend.multiply(v, store.head, n, self.radix)

    def inverse(self, k: int, state: State, gradient: Tensor | None) -> None:
        """The digits come back; `BitStore.take_back` does the rest."""
        for v, store, n in reversed(self._shortened(state)):
            state.backend.divide(v, store.head, n, self.radix)

    def _shortened(self, state: State) -> list[tuple[Tensor, BitStore, Tensor]]:
        if self.kind != "shorten":
            return []
        target, stores = state.numbers[self.target], state.stores[self.target]
        assert self.numbers is not None
        whole = len(stores) == 1
        return [
            (target if whole else target[..., part], store, self.numbers[0, column])
            for (part, column), store in zip(self.places, stores, strict=True)
        ]


def kind_of(decay: Decay, steps: int) -> str:
    """`RowDecay.kind`. Raises: NoRowsError where the steps after the first are not all of one.

    A factor of 1 is one like the others where some are smaller: it changes neither number nor head.
    """
    base = decay.radix.base
    found = {n for k in range(min(1, steps - 1), steps) for n in decay.numerators(k)}
    if found <= {base}:
        return "keep"
    if found == {0}:
        return "forget"
    if 0 in found:
        raise NoRowsError(f"{decay.name} is 0 at some steps, or in some groups, only")
    return "shorten"


class DeviceNumbers:
    """The same moves over static memory.

    Args:
        update: of one unroll.
        steps: of it.
        device: where the numbers are wanted.

    Attributes:
        update: with a row in the place of each table.
        capacity: how many steps an unroll that has the same memory may make.

    Raises:
        NoRowsError: the steps after the first are not all of one form.
    """

    def __init__(self, update: Update, steps: int, device: torch.device) -> None:
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._columns: list[Tensor] = []
        self._width = 0
        self._steps = steps
        self.capacity = 1 << max(0, steps - 1).bit_length()  # unrolls of other lengths fit in
        numerators = {}
        for move in update.moves:
            if isinstance(move, Decay):
                exact = move.table.values.detach() * float(move.radix.base)  # a power of two
                numerators[id(move)] = self._place(exact.round())
        tables = _tables_of(update)
        places = {key: self._place(table.values.detach()) for key, table in tables.items()}
        self._matrix = torch.zeros(self.capacity, self._width, dtype=torch.float64, device=device)
        torch.cat(self._columns, dim=1, out=self._matrix[:steps])
        self._columns.clear()  # a program that is kept would keep the tables of its first unroll
        self._row = self._matrix[:1].clone()
        self._rows = {key: RowTable(self._row[:, places[key]], table.index, []) for key, table in tables.items()}
        self._numerators = {key: self._row[:, place] for key, place in numerators.items()}
        moves = tuple(self._static(move, update, steps) for move in update.moves)
        named: dict[str, Table] = {name: self._rows[id(table)] for name, table in update.tables.items()}
        clipping = None if update.clipping is None else _substituted(update.clipping, self._rows)
        self.update = Update(update.layout, named, moves, update.formats, clipping)

    def _place(self, values: Tensor) -> slice:
        """Columns of the matrix, [T, G] of them."""
        self._columns.append(values.expand(self._steps, -1))
        first, self._width = self._width, self._width + values.shape[1]
        return slice(first, self._width)

    def _static(self, move: Any, update: Update, steps: int) -> Any:
        found = _substituted(move, self._rows)
        if not isinstance(move, Decay):
            return found
        own = {f.name: getattr(found, f.name) for f in fields(Decay)}
        return RowDecay(
            **own, numbers=self._numerators[id(move)], places=tuple(move.segments), kind=kind_of(move, steps)
        )

    @property
    def signature(self) -> Hashable:
        """What the moves are without the numbers of their tables: to be compared with another unroll's."""
        return tuple(_signature(part) for part in (*self.update.moves, self.update.clipping))

    def load(self, other: DeviceNumbers) -> None:
        """Take the numbers of another unroll, of the same form."""
        self._matrix[: other._steps].copy_(other._matrix[: other._steps])

    def go_to(self, k: int) -> None:
        """The next step is k."""
        self.counter.fill_(k)

    def begin(self) -> int:
        """The counter's row is put where the moves look, and the counter stays; the step that the moves are told."""
        torch.index_select(self._matrix, 0, self.counter, out=self._row)
        return ANY


def _signature(part: Any) -> Hashable:
    if isinstance(part, Table):
        return part.values.shape[1], None if part.index is None else fingerprint_of(part.index)
    if isinstance(part, Tensor):
        return tuple(part.shape), fingerprint_of(part)
    if isinstance(part, Mapping):
        return tuple((key, _signature(value)) for key, value in part.items())
    if is_dataclass(part) and not isinstance(part, type):
        own = [f.name for f in fields(part) if f.name not in _OF_ONE_UNROLL]
        return type(part), tuple((name, _signature(getattr(part, name))) for name in own)
    return part if isinstance(part, Hashable) else repr(part)


def _tables_of(update: Update) -> dict[int, Table]:
    """Every table that the moves or the clipping look at, by its id."""
    found: dict[int, Table] = {id(table): table for table in update.tables.values()}
    for part in (*update.moves, *(() if update.clipping is None else (update.clipping,))):
        _collect(part, found)
    return found


def _collect(part: Any, found: dict[int, Table]) -> None:
    if isinstance(part, Table):
        found[id(part)] = part
    elif isinstance(part, Mapping):
        for value in part.values():
            _collect(value, found)
    elif is_dataclass(part):
        for f in fields(part):
            _collect(getattr(part, f.name), found)


def _substituted(part: Any, rows: Mapping[int, RowTable]) -> Any:
    """The same with a row in the place of each table."""
    if isinstance(part, Table):
        return rows[id(part)]
    if isinstance(part, Mapping):
        return {key: _substituted(value, rows) for key, value in part.items()}
    if (
        is_dataclass(part)
        and not isinstance(part, type)
        and any(_collects(getattr(part, f.name)) for f in fields(part))
    ):
        return replace(part, **{f.name: _substituted(getattr(part, f.name), rows) for f in fields(part) if f.init})
    return part


def _collects(part: Any) -> bool:
    found: dict[int, Table] = {}
    _collect(part, found)
    return bool(found)
