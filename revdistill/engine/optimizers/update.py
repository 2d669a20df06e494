"""One optimizer's step: an ordered list of moves, and what follows from what they read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from revdistill.engine.integers.backend import Backend
from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.fixedpoint import FixedPoint, Format
from revdistill.engine.integers.history import History
from revdistill.engine.integers.state import State
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.clipping import NAME, Clipping
from revdistill.engine.optimizers.hyperparameters import Table
from revdistill.engine.optimizers.moves import Decay, Move
from revdistill.engine.optimizers.sources import GRADIENT, THETA


@dataclass(frozen=True)
class Update:
    """layout: of the flat buffer; tables: by name, every hyperparameter that can have a gradient; moves: in the order
    in which they are made; formats: of slots that have another number format than theta; clipping: what is done with
    the gradient before any move sees it.

    On the way back a move's derivative is taken with the values of after the step, but a decay's with its target's
    value of before it. Raises: ValueError where the order of the moves would make these other values than the move saw.
    """

    layout: Layout
    tables: dict[str, Table]
    moves: tuple[Move, ...]
    formats: dict[str, Format] = field(default_factory=dict)
    clipping: Clipping | None = None

    def __post_init__(self) -> None:
        if self.clipping is not None:
            self.tables[NAME] = self.clipping.table
        for i, move in enumerate(self.moves):
            if isinstance(move, Decay) and any(m.target == move.target for m in self.moves[:i]):
                raise ValueError(f"{move.target} must decay before anything else is done to it")
            changed_later = {m.target for m in self.moves[i + 1 :]} - {THETA}
            if changed_later & set(move.reads):
                raise ValueError(f"a move reads {sorted(changed_later & set(move.reads))}, which a later one changes")
            if THETA in move.reads and any(m.target == THETA for m in self.moves[:i]):
                raise ValueError("a move reads theta after an earlier one has changed it")

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """The running averages."""
        return tuple(dict.fromkeys(move.target for move in self.moves if move.target != THETA))

    @cached_property
    def blind(self) -> tuple[Move, ...]:
        """The last moves, as many as see neither gradient nor theta: they are undone before either is known."""
        return self.moves[len(self.seeing) :]

    @cached_property
    def seeing(self) -> tuple[Move, ...]:
        """Those before them."""
        count = len(self.moves)
        while count and not {GRADIENT, THETA} & set(self.moves[count - 1].reads):
            count -= 1
        return self.moves[:count]

    @cached_property
    def before_the_step(self) -> tuple[Decay, ...]:
        """The decays of slots: their derivatives take values of before the step."""
        return tuple(move for move in self.moves if isinstance(move, Decay) and move.target != THETA)

    @property
    def no_way_back(self) -> str | None:
        """Why the step cannot be undone explicitly, as the move that forbids it says; None where it can be."""
        for move in self.moves:
            if move.irreversible is not None:
                return move.irreversible
        if any(move.target == THETA for move in self.seeing):
            return self.seeing[-1].needs_the_gradient
        return None

    def keeps_memory(self, steps: int) -> bool:
        """Whether the next step depends on more than theta: on a slot's old value, or on a head."""
        forgotten = {decay.target for decay in self.before_the_step if decay.forgets(steps)}
        return bool(set(self.slots) - forgotten) or any(isinstance(m, Decay) and m.target == THETA for m in self.moves)

    @property
    def penalises(self) -> bool:
        """Whether a parameter whose gradients are all 0 may change, or give weight decay a derivative."""
        return self.tables["weight_decay"].matters()

    def ignores_zeros(self, steps: int) -> bool:
        """Whether a gradient of 0 changes nothing, whatever came before."""
        return not self.penalises and not self.keeps_memory(steps)

    def always_decays(self, steps: int) -> bool:
        """Whether every slot keeps something of its old value at every step, in every group."""
        return all(decay.keeps(steps) for decay in self.before_the_step)

    def vjp_reads(self) -> frozenset[str]:
        """What the derivatives need the values of, given which hyperparameters want a gradient."""
        wanted = frozenset(name for name, table in self.tables.items() if table.values.requires_grad)
        return frozenset().union(*(move.vjp_reads(wanted) for move in self.moves))

    @property
    def vjp_reads_slots(self) -> bool:
        """Whether any of them is a slot's."""
        return not self.vjp_reads().isdisjoint(self.slots)

    def formats_with(self, fixed: FixedPoint) -> dict[str, Format]:
        """The number format of theta and of each slot, where most have `fixed`."""
        return {name: self.formats.get(name, fixed) for name in (THETA, *self.slots)}

    def initial_state(self, theta: Tensor, fixed: FixedPoint, history: History, backend: Backend) -> State:
        """theta: int64 [numel]; the slots start at 0 and the stores empty."""
        formats, device = self.formats_with(fixed), theta.device
        numbers = {THETA: theta} | {name: formats[name].zeros(len(theta), device) for name in self.slots}
        stores = {}
        for move in self.moves:
            if isinstance(move, Decay):
                heads = torch.zeros(len(theta), dtype=torch.int64, device=device)  # in a row, for kernels
                stores[move.target] = [
                    BitStore(part.stop - part.start, device, history, move.radix, backend, heads[part])
                    for part, _ in move.segments
                ]
        return State(numbers, formats, stores, backend)
