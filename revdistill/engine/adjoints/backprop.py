"""Plain autograd through the loop in floating point: the reference that every other adjoint is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from revdistill.engine.adjoints.adjoint import Adjoint, UnrollStats
from revdistill.engine.adjoints.guard import FiniteWatch
from revdistill.engine.adjoints.kept_data import KeptData
from revdistill.engine.adjoints.result import Result
from revdistill.engine.errors import NonFiniteError
from revdistill.engine.loss.gradient import check_loss
from revdistill.engine.loss.untouched import OpenLooks, Untouched, looked_at, settle
from revdistill.engine.optimizers.sources import GRADIENT, THETA, Differentiable
from revdistill.engine.problem import Problem
from revdistill.engine.progress import Bar


@dataclass(frozen=True)
class Backprop(Adjoint):
    """Plain autograd through the floating-point loop: the reference, and the baseline of the benchmarks.

    Cost: the graphs of all steps are kept, so memory grows with T by the activations of a step and its backward. Use it
    for short unrolls, for losses that are not deterministic, and where a second backward, or a derivative of the
    hypergradient, is needed.
    """

    def run(self, problem: Problem, theta0: Tensor) -> tuple[Result, UnrollStats]:
        bar = Bar(problem.progress, problem.steps, "forward", "loss")
        try:
            with problem.determinism.passage():
                result = _unroll_with_graph(problem, theta0, bar)
        finally:
            bar.close()
        state_bytes = (1 + len(problem.update.slots)) * theta0.nbytes
        return result, UnrollStats(problem.steps, theta0.numel(), state_bytes, None)


def _unroll_with_graph(problem: Problem, theta: Tensor, bar: Bar) -> Result:
    """The results with the graph of every step: differentiable any number of times."""
    update, data, layout, loss = problem.update, problem.data, problem.update.layout, problem.gradient.loss
    # unbind once: its backward is one stack, where indexing step by step would fill a zero tensor per step.
    rows: Sequence[Sequence[Tensor]] = [t.unbind(0) for t in data.tensors]
    values = {THETA: theta} | {slot: torch.zeros_like(theta) for slot in update.slots} | dict(problem.start.slots)
    average = torch.zeros_like(theta, dtype=torch.float64)
    keep_graph = torch.is_grad_enabled()
    saved: dict[int, Tensor] = {}
    usage, taken = problem.gradient.usage, problem.start.taken
    looks, open_looks = looked_at(problem.steps), OpenLooks()
    kept = KeptData(data, problem.determinism.modules, problem.backend, taken)
    watch = FiniteWatch(layout, problem.backend, partial(_not_finite, taken))
    for k in range(problem.steps):
        if k and k == problem.first:
            values = {name: value.detach() for name, value in values.items()}
        looks_back = problem.looks_back and keep_graph and k >= problem.first
        if looks_back:
            if not values[THETA].requires_grad:
                values[THETA] = values[THETA].detach().requires_grad_()
            values[THETA].register_hook(partial(problem.look_back, k))  # type: ignore[no-untyped-call]
        if k in problem.saved_steps:
            saved[k] = values[THETA] if k >= problem.first else values[THETA].detach()
        if problem.average is not None:
            seen = values[THETA] if k >= problem.first else values[THETA].detach()
            average = average + problem.average[k] * seen
        if data.function is None:
            batch: Any = tuple(r[data.row(k)] for r in rows)
        else:
            with problem.determinism.outside():
                batch = data.from_function(k)
        start = values[THETA]
        leaf = start if start.requires_grad else start.detach().requires_grad_()
        if looks_back:
            leaf = start.view_as(start)  # the hook is for the way back, not for this step's gradient
        with problem.determinism.step(k):
            parts, views = layout.parts_and_views(leaf)
            untouched = Untouched(leaf, views, problem.determinism.modules) if k in looks else None
            value = loss(views, *data.arguments(batch, data.hypers))
            if untouched is not None:
                untouched.check(open_looks)
            if k == 0:
                check_loss(value)
            gradient = usage.gradient(k, value, parts, create_graph=keep_graph and k >= problem.first)
        if gradient.requires_grad:
            kept.note(k, batch)
            gradient.register_hook(partial(_check_kept, kept, k))  # type: ignore[no-untyped-call]
        watch.look(k, gradient.detach(), value.detach())
        if problem.on_step is not None:
            with problem.determinism.watching():
                problem.on_step(problem.number(k), layout.views(start.detach().clone()), value.detach().clone())
        if update.clipping is not None:
            gradient = update.clipping.differentiable(k, gradient)
        values |= {THETA: start, GRADIENT: gradient}
        step = Differentiable(k, theta.dtype)
        for move in update.moves:
            values[move.target] = move.value(values, step)
        bar.step(value.detach)
    watch.flush()
    settle(open_looks)
    theta = saved[problem.steps] = values[THETA]
    if problem.save_at is not None:
        theta = torch.stack([saved[k] for k in problem.save_at])
    if problem.average is not None:
        average = average + problem.average[problem.steps] * values[THETA]
    return Result(
        theta,
        None if problem.average is None else average.to(theta.dtype),
        {slot: values[slot] for slot in update.slots} if problem.returns_state else {},
    )


def _check_kept(kept: KeptData, k: int, _: Tensor) -> None:
    """The way back comes to step k's graph."""
    kept.check(k)


def _not_finite(taken: int, k: int, name: str | None) -> NoReturn:
    what = f"the gradient of params[{name!r}]" if name else "the loss"
    raise NonFiniteError(f"{what} is not finite at step {k + taken}", parameter=name, step=k + taken)
