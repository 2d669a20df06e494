"""The adjoint recurrence: dL/d(...) carried from the last step to the first, one step at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from revdistill.engine.adjoints.guard import FiniteWatch
from revdistill.engine.adjoints.trajectory import Problem
from revdistill.engine.errors import NonFiniteError
from revdistill.engine.loss.gradient import Linearization
from revdistill.engine.optimizers.moves import GRADIENT, THETA, Bars, Stage


@dataclass(frozen=True)
class Hypergradients:
    """theta: float [numel], None where the way back ends before theta_0; tables: float64 by name; batches, hypers: like
    the tensors, None where not wanted.
    """

    theta: Tensor | None
    tables: dict[str, Tensor]
    batches: list[Tensor | None]
    hypers: list[Tensor | None]


class Sweep:
    """result_bar: dL/d(the unroll's result): of theta_T, float [numel], or of theta at each of `save_at`, [n,
    numel].
    """

    def __init__(self, problem: Problem, result_bar: Tensor) -> None:
        self.problem = problem
        update, data = problem.update, problem.data
        # theta's bars at the steps where the loss sees it: each enters when the way back is there
        self._entering: dict[int, Tensor] = {}
        rows = [result_bar] if problem.save_at is None else result_bar
        for k, bar in zip(problem.save_at or [problem.steps], rows, strict=True):
            self._entering[k] = self._entering[k] + bar if k in self._entering else bar
        zero = torch.zeros(update.layout.numel, dtype=result_bar.dtype, device=result_bar.device)
        flat = {THETA: self._entering.pop(problem.steps, zero).clone(), GRADIENT: torch.zeros_like(zero)}
        flat |= {name: torch.zeros_like(zero) for name in (*update.slots, *(d.name for d in update.derived))}
        tables = {name: torch.zeros_like(t.values) for name, t in update.tables.items() if t.values.requires_grad}
        self.bars = Bars(flat, tables)
        self._batches = [torch.zeros_like(t) if t.requires_grad else None for t in data.tensors]
        self._hypers = [torch.zeros_like(t) if t.requires_grad else None for t in data.hypers]
        self._watch = FiniteWatch(update.layout, problem.check_interval, _stopped_being_finite)
        moves = (*update.kicks, *update.drifts)
        multiplied = any(a.source == GRADIENT and tables.keys() & set(a.factor.names) for a in moves)
        self._wants_gradient = multiplied or any(GRADIENT in d.inputs for d in update.derived)

    def step(
        self,
        k: int,
        theta: Tensor,
        at: Linearization,
        after: dict[str, Tensor],
        before: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """From dL/d(theta_{k+1}, slots_{k+1}) to dL/d(theta_k, slots_k).

        theta: theta_k; at: the loss linearised there; after: the slots after step k; before: gives them as before step
        k, called last, when the gradient of step k is known, and returned. Both may be empty where `wants_slots` is
        False.
        """
        update, bars = self.problem.update, self.bars
        values = after | {THETA: theta}
        if self._wants_gradient:
            values[GRADIENT] = at.gradient
        for name in (GRADIENT, *(d.name for d in update.derived)):
            bars.flat[name].zero_()
        for derived in update.derived:
            values[derived.name] = derived.value(values, lambda table: table.at(k)).to(theta.dtype)
        kicks, drifts = update.stages
        self._step_back(k, drifts, values)
        for decay in drifts.decays:
            decay.adjoint(k, values, bars)
        self._step_back(k, kicks, values)
        products = at.product(bars.flat[GRADIENT])
        if products.theta is not None:
            bars.flat[THETA].add_(products.theta)
        for bar, product in zip(self._batches, products.batch, strict=False):
            if bar is not None and product is not None:
                bar[self.problem.data.row(k)].add_(product)
        for bar, product in zip(self._hypers, products.hyper, strict=True):
            if bar is not None and product is not None:
                bar.add_(product)
        if k in self._entering:
            bars.flat[THETA].add_(self._entering.pop(k))
        self._watch.look(k, bars.flat[THETA])
        if self.problem.looks_back:
            with self.problem.ambient.watching():
                bars.flat[THETA] = self.problem.look_back(k, bars.flat[THETA])
        slots_before = before()
        for decay in reversed(kicks.decays):
            decay.adjoint(k, slots_before, bars)
        return slots_before

    def _step_back(self, k: int, stage: Stage, values: dict[str, Tensor]) -> None:
        for peak in reversed(stage.peaks):
            peak.adjoint(values, self.bars)
        for add in reversed(stage.adds):
            add.adjoint(k, values, self.bars)
        for derived in reversed(stage.derived):
            derived.adjoint(k, values, self.bars)

    def finish(self) -> Hypergradients:
        self._watch.flush()
        return Hypergradients(
            None if self.problem.first else self.bars.flat[THETA], self.bars.tables, self._batches, self._hypers
        )


def _stopped_being_finite(k: int, name: str | None) -> NoReturn:
    raise NonFiniteError(
        f"the hypergradient of params[{name!r}] stopped being finite at step {k} on the way back, though loss and "
        "gradient are finite there: the product of the loss's Hessian with it is infinite or NaN (a second derivative "
        "such as sqrt's at 0), or it exploded; a smoother loss, a smaller lr, a window or clip_back avoid it",
        parameter=name,
        step=k,
    )


def wants_slots(problem: Problem) -> bool:
    """Whether the sweep will need the slots: something is derived from one, or some wanted hyperparameter multiplies
    one.
    """
    update = problem.update
    if any(set(derived.inputs) & set(update.slots) for derived in update.derived):
        return True
    wanted = {name for name, table in update.tables.items() if table.values.requires_grad}
    multiplied = {decay.name for decay in update.decays}
    for add in (*update.kicks, *update.drifts):
        if add.source in update.slots:
            multiplied |= set(add.factor.names)
    return bool(wanted & multiplied)
