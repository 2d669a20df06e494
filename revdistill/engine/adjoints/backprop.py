"""Plain autograd through the loop in floating point: the reference that every other adjoint is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from revdistill.engine.adjoints.guard import FiniteWatch
from revdistill.engine.adjoints.trajectory import Problem
from revdistill.engine.errors import NonFiniteError
from revdistill.engine.loss.data import Loss
from revdistill.engine.loss.gradient import check_loss
from revdistill.engine.loss.operators import named_errors
from revdistill.engine.optimizers.hyperparameters import Table
from revdistill.engine.optimizers.moves import GRADIENT, THETA, Add, Factor


def unroll_with_graph(problem: Problem, loss: Loss, theta: Tensor) -> Tensor:
    """theta_T from theta_0 (float [numel]), or theta at `save_at` [n, numel], with the graph of every step.
    Differentiable any number of times."""
    update, data, layout = problem.update, problem.data, problem.update.layout
    # unbind once: its backward is one stack, where indexing step by step would fill a zero tensor per step.
    rows: Sequence[Sequence[Tensor]] = [t.unbind(0) for t in data.tensors]
    hyper = data.pack_hyper(data.hypers)
    values = {THETA: theta} | {slot: torch.zeros_like(theta) for slot in update.slots}
    keep_graph = torch.is_grad_enabled()
    saved: dict[int, Tensor] = {}
    watch = FiniteWatch(layout, problem.check_interval, _not_finite)
    for k in range(problem.steps):
        if k and k == problem.first:
            values = {name: value.detach() for name, value in values.items()}
        if k in problem.saved_steps:
            saved[k] = values[THETA] if k >= problem.first else values[THETA].detach()
        if data.function is None:
            batch: Any = tuple(r[data.row(k)] for r in rows)
        else:
            with problem.ambient.outside():
                batch = data.from_function(k)
        start = values[THETA]
        at = start if start.requires_grad else start.detach().requires_grad_()
        if problem.looks_back and keep_graph and k >= problem.first:
            start = at
            start.register_hook(partial(problem.look_back, k))  # type: ignore[no-untyped-call]
            at = start.view_as(start)  # the hook is for the way back, not for this step's gradient
        with problem.ambient.step(k), named_errors():
            value = loss(layout.views(at), batch, *hyper)
            if k == 0:
                check_loss(value)
            (gradient,) = torch.autograd.grad(value, at, create_graph=keep_graph and k >= problem.first)
        watch.look(k, gradient.detach(), value.detach())
        if problem.on_step is not None:
            with problem.ambient.watching():
                problem.on_step(k, layout.views(start.detach()), value.detach())
        seen = values | {THETA: start, GRADIENT: gradient}

        def lookup(table: Table, k: int = k) -> float | Tensor:
            return _at(table, k, theta.dtype)

        for stage in update.stages:
            seen |= {slot: values[slot] for slot in update.slots} if stage.derived else {}
            for function in stage.derived:
                seen[function.name] = function.value(seen, lookup)
            for decay in stage.decays:
                values[decay.slot] = values[decay.slot] * lookup(decay.table)
            for add in stage.adds:
                source = values[add.source] if add.source in update.slots else seen[add.source]
                values[add.target] = values[add.target] + source * _factor(add, k, theta.dtype)
            for peak in stage.peaks:
                values[peak.slot] = peak.value(values)
    watch.flush()
    if problem.save_at is None:
        return values[THETA]
    saved[problem.steps] = values[THETA]
    return torch.stack([saved[k] for k in problem.save_at])


def _at(table: Table, k: int, dtype: torch.dtype) -> float | Tensor:
    """Step k's values, differentiable where the table is."""
    if not table.values.requires_grad and table.index is None:
        return table.row(k)[0]
    row = table.values[k if len(table.host) > 1 else 0]
    return (row[0] if table.index is None else row[table.index]).to(dtype)


def _factor(add: Add, k: int, dtype: torch.dtype) -> float | Tensor:
    factor: Factor = add.factor
    value: float | Tensor = factor.constant if k else factor.first
    if isinstance(value, Tensor):
        value = value.to(dtype)
    for table in factor.tables:
        value = value * _at(table, k, dtype)
    return value


def _not_finite(k: int, name: str | None) -> NoReturn:
    what = f"the gradient of params[{name!r}]" if name else "the loss"
    raise NonFiniteError(f"{what} is not finite at step {k}", parameter=name, step=k)
