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
from revdistill.engine.errors import NonFiniteError, UnsupportedError
from revdistill.engine.loss.functions import Functions
from revdistill.engine.loss.gradient import BACKWARD_INSIDE, check_loss
from revdistill.engine.loss.graph import graph_nodes, saved_tensors
from revdistill.engine.loss.untouched import OpenLooks, Untouched, looked_at, settle
from revdistill.engine.loss.usage import UnusedParametersError
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
    update, layout, keep_graph = problem.update, problem.update.layout, torch.is_grad_enabled()
    begun = problem.gradient.first
    if begun is not None:
        theta = begun.theta  # with its hook
    values = {THETA: theta} | {slot: torch.zeros_like(theta) for slot in update.slots} | dict(problem.start.slots)
    average = torch.zeros_like(theta, dtype=torch.float64)
    saved: dict[int, Tensor] = {}
    evaluations, taken = _Evaluations(problem), problem.start.taken
    kept = KeptData(problem.data, problem.determinism.modules, problem.backend, taken)
    watch = FiniteWatch(layout, problem.backend, partial(_not_finite, taken))
    for k in range(problem.steps):
        if k and k == problem.first:
            values = {name: value.detach() for name, value in values.items()}
        looks_back = problem.looks_back and keep_graph and k >= problem.first
        if looks_back and (k or begun is None):
            if not values[THETA].requires_grad:
                values[THETA] = values[THETA].detach().requires_grad_()
            values[THETA].register_hook(partial(problem.look_back, k))  # type: ignore[no-untyped-call]
        if k in problem.saved_steps:
            saved[k] = values[THETA] if k >= problem.first else values[THETA].detach()
        if problem.average is not None:
            seen = values[THETA] if k >= problem.first else values[THETA].detach()
            average = average + problem.average[k] * seen
        found = evaluations.at(k, values[THETA])
        gradient = found.gradient
        if gradient.requires_grad:
            outer = (found.theta, *problem.data.tensors, *problem.data.hypers)
            kept.note(k, found.batch, partial(saved_tensors, gradient, outer), rest=problem.steps - 1 - k)
            gradient.register_hook(partial(_check_kept, kept, k))  # type: ignore[no-untyped-call]
        watch.look(k, gradient.detach(), found.loss)
        if problem.on_step is not None:
            with problem.determinism.watching():
                problem.on_step(problem.number(k), layout.views(values[THETA].detach().clone()), found.loss.clone())
        if update.clipping is not None:
            gradient = update.clipping.differentiable(k, gradient)
        values[GRADIENT] = gradient
        step = Differentiable(k, theta.dtype)
        for move in update.moves:
            values[move.target] = move.value(values, step)
        bar.step(lambda found=found: found.loss)  # type: ignore[misc]
    watch.flush()
    evaluations.flush()
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


@dataclass(frozen=True)
class _Evaluation:
    """Of one step: theta; the batch; the loss, detached; the gradient with its graph."""

    theta: Tensor
    batch: Any
    loss: Tensor
    gradient: Tensor


class _Evaluations:
    """The loss and its gradient, step by step, with the graphs that lead on."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._batches = problem.data.batches_of(problem.data.tensors)
        self._looks, self._open_looks = looked_at(problem.steps), OpenLooks()
        self._functions = Functions()

    def at(self, k: int, theta: Tensor) -> _Evaluation:
        """Step k's."""
        problem, gradient = self._problem, self._problem.gradient
        first, gradient.first = gradient.first, None
        if first is not None:
            return first  # type: ignore[no-any-return]
        data, layout, usage = problem.data, problem.update.layout, gradient.usage
        if data.function is None:
            batch: Any = self._batches.batch(data.row(k))
        else:
            with problem.determinism.outside():
                batch = data.from_function(k)
        leaf = theta if theta.requires_grad else theta.detach().requires_grad_()
        carries_on = torch.is_grad_enabled() and k >= problem.first
        if problem.looks_back and carries_on:
            leaf = theta.view_as(theta)  # its hook is for the way back, not for this step's gradient
        with problem.determinism.step(k):
            parts, views = layout.parts_and_views(leaf)
            untouched = Untouched(leaf, views, problem.determinism.modules) if k in self._looks else None
            evaluate = partial(gradient.loss, views, *data.arguments(batch, data.hypers))
            watched = k == gradient.originals.next
            with _Backwards((leaf, *data.tensors, *data.hypers)):
                value = gradient.originals.watch(k, evaluate, batch, leaf) if watched else evaluate()
            if untouched is not None:
                untouched.check(self._open_looks)
            check_loss(value)
            if carries_on:
                self._functions.check(graph_nodes(value, until=(leaf, *data.tensors, *data.hypers)), parts[0].grad_fn)
            found = _Evaluation(theta, batch, value.detach(), usage.gradient(k, value, parts, create_graph=carries_on))
        if usage.to_spare:
            raise UnusedParametersError(usage.unused, found)
        return found

    def flush(self) -> None:
        """All steps have been evaluated: the checks that are still open."""
        settle(self._open_looks)


class _Backwards:
    """The context of a call of the loss, which must not call backward() through what it is given."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self._given = [t for t in given if t.requires_grad]

    def __enter__(self) -> None:
        self._hooks = [t.register_hook(self._refuse) for t in self._given]  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _refuse(self, _: Tensor) -> None:
        raise UnsupportedError(BACKWARD_INSIDE)


def _check_kept(kept: KeptData, k: int, _: Tensor) -> None:
    """The way back comes to step k's graph."""
    kept.check(k)


def _not_finite(taken: int, k: int, name: str | None) -> NoReturn:
    what = f"the gradient of params[{name!r}]" if name else "the loss"
    raise NonFiniteError(f"{what} is not finite at step {k + taken}", parameter=name, step=k + taken)
