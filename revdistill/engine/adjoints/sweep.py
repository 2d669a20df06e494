"""The adjoint recurrence: dL/d(...) carried from the last step to the first, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from revdistill.engine.adjoints.amplification import Amplification
from revdistill.engine.adjoints.guard import FiniteWatch
from revdistill.engine.adjoints.result import Result
from revdistill.engine.cotangents import Batching
from revdistill.engine.errors import NonFiniteError
from revdistill.engine.loss.linearization import Linearization, Products
from revdistill.engine.optimizers.sources import GRADIENT, THETA, Bars
from revdistill.engine.optimizers.update import Update
from revdistill.engine.problem import Problem
from revdistill.engine.progress import Bar

_AT_ONCE = 2**22  # bytes of one bar that the moves of a step work on: their temporary tensors stay in caches


@dataclass(frozen=True)
class Hypergradients:
    """theta: float [numel], None where the way back ends before theta_0, and so slots; tables: float64 by name;
    batches, hypers: like the tensors, None where not wanted. Of K losses at once all have a first dimension of K.
    """

    theta: Tensor | None
    slots: dict[str, Tensor] | None
    tables: dict[str, Tensor]
    batches: list[Tensor | None]
    hypers: list[Tensor | None]


class Sweep:
    """dL/d(theta_k, slots_k) at one step k, and what has been summed up over the steps after it.

    Args:
        problem: what was unrolled.
        bars: dL/d(the unroll's result), of the same shapes; of K losses at once with a first dimension of K.
        amplification: told how much longer dL/dtheta gets on the way.
        batching: how the products of K losses are evaluated; None for one loss.
    """

    def __init__(
        self, problem: Problem, bars: Result, amplification: Amplification, batching: Batching | None = None
    ) -> None:
        self.problem, self._batching = problem, batching
        result_bar, self._average_bar, self._amplification = bars.theta, bars.average, amplification
        update, data = problem.update, problem.data
        # theta's bars at the steps where the loss sees it: each enters when the way back is there
        self._entering: dict[int, Tensor] = {}
        rows = [result_bar] if problem.save_at is None else result_bar.unbind(-2)
        for k, bar in zip(problem.save_at or [problem.steps], rows, strict=True):
            self._entering[k] = self._entering[k] + bar if k in self._entering else bar
        first = () if batching is None else (len(result_bar),)
        zero = torch.zeros(*first, update.layout.numel, dtype=result_bar.dtype, device=result_bar.device)
        # That of the gradient is needed for as many losses only as are gone back for at once.
        flat = {THETA: self._entering.pop(problem.steps, zero).clone()}
        flat[GRADIENT] = torch.zeros_like(zero if batching is None else zero[: batching.chunk_size])
        flat |= {name: torch.zeros_like(zero) for name in update.slots}
        flat |= {name: bar.clone() for name, bar in bars.slots.items()}
        self._enter_average(problem.steps, flat[THETA])
        amplification.begin(bars.tensors(), problem.norms_of_whole, many=batching is not None)

        def zeros(t: Tensor) -> Tensor | None:
            if not t.requires_grad:
                return None
            return torch.zeros(first + t.shape, dtype=t.dtype, device=t.device) if first else torch.zeros_like(t)

        tables = {name: zeros(table.values) for name, table in update.tables.items()}
        self.bars = Bars(flat, {name: table for name, table in tables.items() if table is not None})
        self.batches, self.hypers = list(map(zeros, data.tensors)), list(map(zeros, data.hypers))
        fail = partial(_stopped_being_finite, problem.start.taken)
        self.watch = FiniteWatch(update.layout, problem.backend, fail)
        self.wants_slots = update.vjp_reads_slots
        self.wants_gradient = GRADIENT in update.vjp_reads()
        self.derivatives = Derivatives(update)
        self._clipped = False
        figure = "|dL/dtheta|" if problem.shards is None else "|this rank's part of dL/dtheta|"
        self._bar = Bar(problem.progress, problem.steps - problem.first, "back", figure)

    @property
    def is_of_many(self) -> bool:
        """Whether of several losses at once."""
        return self._batching is not None

    def to_theta(self, k: int, theta: Tensor, linear: Linearization, slots: dict[str, Tensor]) -> None:
        """From after step k to where the gradient was evaluated: through the moves, and through the gradient.

        theta: theta_k; linear: the loss linearised there; slots: after step k, {} where they are not wanted.
        """
        bars, values = self.bars, slots | {THETA: theta}
        if self.wants_gradient:
            gradient = linear.gradient
            values[GRADIENT] = self.derivatives.as_moves_saw_it(k, gradient)
        if self._batching is None:
            self.derivatives.to_gradient(k, values, linear, bars)
            self._add(bars, self.batches, self.hypers, k, linear.product(bars.flat[GRADIENT]))
        else:
            for rows in self._batching.chunks(len(bars.flat[THETA])):
                self._through_rows(k, values, linear, rows, self._batching)

    def arrive(self, k: int, *, watched: bool = False) -> None:
        """Step k is behind: what enters at theta_k, and what is done with dL/d(theta_k).

        watched: whether it is finite is looked at in another way.
        """
        bars = self.bars
        if k in self._entering:
            bars.flat[THETA].add_(self._entering.pop(k))
        self._enter_average(k, bars.flat[THETA])
        if not watched:
            self.watch.look(k, bars.flat[THETA])
        if self.problem.looks_back:
            with self.problem.determinism.watching():
                whole = bars.flat[THETA]
                kept = self.problem.look_back(k, whole)
                if kept is not whole:
                    whole.copy_(kept)
                    self._clipped = True
        self._tick()

    def copies(self) -> list[Tensor]:
        """Of everything that a step changes, save what enters there."""
        return [t.clone() for t in self._changed()]

    def restore(self, copies: Sequence[Tensor]) -> None:
        """Put all of it where `copies` was called."""
        for t, values in zip(self._changed(), copies, strict=True):
            t.copy_(values)

    def _changed(self) -> list[Tensor]:
        found = [*self.bars.flat.values(), *self.bars.tables.values()]
        return found + [t for t in (*self.batches, *self.hypers) if t is not None]

    def _through_rows(
        self, k: int, values: dict[str, Tensor], linear: Linearization, rows: slice, batching: Batching
    ) -> None:
        """Some of the losses only."""
        bars = self.bars.rows(rows)
        bars.flat[GRADIENT] = self.bars.flat[GRADIENT][: rows.stop - rows.start]
        whole = bars.flat[THETA]
        shards = self.problem.shards  # which meet for the norm of a clipped gradient: all ranks as often
        width = whole.shape[1] if shards is None else shards.each
        count = max(1, _AT_ONCE // (whole.element_size() * width))
        for few in (slice(first, first + count) for first in range(0, len(whole), count)):
            self.derivatives.to_gradient(k, values, linear, bars.rows(few))
        batches, hypers = ([None if bar is None else bar[rows] for bar in of] for of in (self.batches, self.hypers))
        self._add(bars, batches, hypers, k, linear.products(bars.flat[GRADIENT], batching), dim=1)

    def _add(
        self,
        bars: Bars,
        batches: Sequence[Tensor | None],
        hypers: Sequence[Tensor | None],
        k: int,
        products: Products,
        *,
        dim: int = 0,
    ) -> None:
        """dim: of the batches, where bars have their rows."""
        if products.theta is not None:
            bars.flat[THETA].add_(products.theta)
        for bar, product in zip(batches, products.batch, strict=False):
            if bar is not None and product is not None:
                self.problem.data.add_to(bar, k, product, dim)
        for bar, product in zip(hypers, products.hyper, strict=True):
            if bar is not None and product is not None:
                bar.add_(product)

    def to_start_of_step(self, k: int, slots: dict[str, Tensor], *, arrives: bool = True) -> None:
        """On to before step k: through the decays of the slots; then, unless somebody else does it, `arrive`.

        slots: before step k.
        """
        self.derivatives.to_start_of_step(k, slots, self.bars)
        if arrives:
            self.arrive(k)

    def _tick(self) -> None:
        if self.problem.progress:
            self._bar.step(lambda: torch.linalg.vector_norm(self.bars.flat[THETA]))

    def finish(self) -> Hypergradients:
        """What was found, once the first step is behind."""
        self.watch.flush()
        flat, ranks = self.bars.flat, self.problem.ranks
        if not self._clipped:  # what is left says nothing of training
            self._amplification.end(flat[THETA], self.problem.norms_of_whole)
        if ranks is not None:  # of hyper each rank has summed its own part; of tables, that of its part of theta
            ranks.meet("the sums at the start of the training")
            self.hypers = [None if bar is None else ranks.sum_in_order(bar) for bar in self.hypers]
            if self.problem.shards is not None:
                self.bars.tables = {name: ranks.sum_in_order(bar) for name, bar in self.bars.tables.items()}
        if self.problem.first:
            return Hypergradients(None, None, self.bars.tables, self.batches, self.hypers)
        slots = {name: flat[name] for name in self.problem.update.slots}
        return Hypergradients(flat[THETA], slots, self.bars.tables, self.batches, self.hypers)

    def close(self) -> None:
        """The way back is over, or was given up."""
        self._bar.close()

    def _enter_average(self, k: int, theta_bar: Tensor) -> None:
        if self._average_bar is not None:
            assert self.problem.average is not None
            theta_bar.add_(self._average_bar, alpha=self.problem.average[k])


class Derivatives:
    """The moves' derivatives in the order of the way back. update: the optimizer's step."""

    def __init__(self, update: Update) -> None:
        late = update.before_the_step
        self._moves = [move for move in reversed(update.moves) if move not in late]
        self._late = late[::-1]
        self._clipping = update.clipping

    def as_moves_saw_it(self, k: int, gradient: Tensor) -> Tensor:
        """Clipped, where it is."""
        return gradient if self._clipping is None else self._clipping.clipped(k, gradient)

    def to_gradient(self, k: int, values: dict[str, Tensor], linear: Linearization, bars: Bars) -> None:
        """Through the moves, to dL/d(the gradient)."""
        bars.flat[GRADIENT].zero_()
        for move in self._moves:
            move.vjp(k, values, bars)
        if self._clipping is not None:
            self._clipping.vjp(k, linear.gradient, bars)

    def to_start_of_step(self, k: int, slots: dict[str, Tensor], bars: Bars) -> None:
        """Through the decays of the slots. slots: before step k."""
        for decay in self._late:
            decay.vjp(k, slots, bars)


def _stopped_being_finite(taken: int, k: int, name: str | None) -> NoReturn:
    k += taken
    raise NonFiniteError(
        f"the hypergradient of params[{name!r}] stopped being finite at step {k} on the way back, though loss and "
        "gradient are finite there: the product of the loss's Hessian with it is infinite or NaN (a second derivative "
        "such as sqrt's at 0), or it exploded; a smoother loss, a smaller lr, a window or clip_back avoid it",
        parameter=name,
        step=k,
    )
