"""From what a user gives rd.unroll to what it returns: a problem, and the adjoint that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from revdistill.engine.adjoints.adjoint import Adjoint, UnrollStats
from revdistill.engine.adjoints.checkpoint import Checkpoint
from revdistill.engine.adjoints.guard import not_finite
from revdistill.engine.adjoints.result import Result
from revdistill.engine.adjoints.reversible import Reversible
from revdistill.engine.arguments import check_arguments, check_average, check_grouped, check_shard
from revdistill.engine.errors import NonFiniteError
from revdistill.engine.integers.select import backend_for
from revdistill.engine.layout import Layout
from revdistill.engine.loss.compiled import CompiledGradient
from revdistill.engine.loss.data import Batches, Data, Hyper, Loss
from revdistill.engine.loss.determinism import Determinism
from revdistill.engine.loss.gradient import Gradient
from revdistill.engine.loss.originals import Originals
from revdistill.engine.loss.randomness import draw_seed
from revdistill.engine.loss.usage import UnusedParametersError, Usage
from revdistill.engine.optimizer_state import OptimizerState, check_slots, check_state, start_of
from revdistill.engine.optimizers.optimizer import Optimizer
from revdistill.engine.problem import OnStep, OnStepBack, Problem
from revdistill.engine.ranks.group import Ranks
from revdistill.engine.ranks.same import check_same, seed_of_first
from revdistill.engine.ranks.shards import Shards
from revdistill.engine.ranks.shared import SharedGradient
from revdistill.engine.same_problem import what_is_shared

if TYPE_CHECKING:
    import torch.distributed as dist


def ranks_of(group: dist.ProcessGroup | None, shard: object, params: object) -> Ranks | None:
    """The ranks that an unroll is made on; None without a group. Raises: ValueError, TypeError."""
    if group is None:
        check_shard(shard)
        if shard:
            raise ValueError(
                "shard=True keeps the state in parts on the ranks of a group; give "
                "group=torch.distributed.group.WORLD, under torchrun"
            )
        return None
    first = next(iter(params.values()), None) if isinstance(params, Mapping) else None
    return Ranks.of(group, first.device if isinstance(first, Tensor) else torch.device("cpu"))


def unrolled(
    loss: Loss,
    params: Mapping[str, Tensor],
    batches: Batches,
    optimizer: Optimizer,
    *,
    steps: int,
    hyper: Hyper,
    adjoint: Adjoint | None,
    compile: bool | Literal["graphs"],
    on_step: OnStep | None,
    return_stats: bool,
    seed: int | None,
    window: int | None,
    save_at: Sequence[int] | None,
    clip_back: float | None,
    on_step_back: OnStepBack | None,
    average: float | Tensor | None,
    state: OptimizerState | None,
    return_state: bool,
    progress: bool,
    ranks: Ranks | None,
    shard: bool,
) -> Any:
    """See `rd.unroll`. ranks: that make it together."""
    check_arguments(locals())
    if ranks is not None:
        check_grouped(loss, adjoint, compile, shard=shard)
    steps, window, seed = int(steps), *(None if n is None else int(n) for n in (window, seed))
    save_at = None if save_at is None else [int(k) for k in save_at]
    layout = Layout.of(params, getattr(loss, "networks", 1))
    if state is not None:
        check_state(state, layout)
    start = start_of(state, optimizer, layout)
    backend = backend_for(layout.device, compile=compile is True)
    data = Data(batches, hyper, start.taken)
    if seed is None and state is not None:
        seed = state.seed
    given = seed is not None
    seed = draw_seed() if seed is None else seed
    if ranks is not None:
        seed = seed_of_first(ranks, seed, given=given)
    determinism = Determinism.capture(layout.device, seed, start.taken, steps)
    shards = Shards(ranks, layout) if ranks is not None and shard else None
    determinism.modules.grouped = ranks is not None
    originals = Originals(loss, params, data.hypers, determinism.modules, steps, start.taken)
    first = max(0, steps - window) if window else 0
    weights = None if average is None else check_average(average, steps)

    def run(unused: frozenset[str], evaluation: Any = None) -> tuple[Result, UnrollStats, Usage]:
        chosen = optimizer.sparing(unused, layout) if unused else optimizer
        begin = start_of(state, optimizer, layout, unused) if unused else start
        update = chosen.resolve(layout if shards is None else shards.layout, steps, begin)
        if shards is not None and update.clipping is not None:
            update = replace(update, clipping=replace(update.clipping, total=shards.total))
        check_slots(begin, update.slots, optimizer)
        indifferent = update.ignores_zeros(steps)
        # A slot of a parameter without a gradient is passed on, and has nothing to do with theta: as torch has it.
        tells = update.penalises or any(flat.requires_grad for flat in begin.slots.values())
        moving = {name for flat in begin.slots.values() for name in layout.nonzero(flat.detach())}
        usage = Usage(
            layout.names,
            penalised=frozenset(layout.names) - unused if tells else frozenset(),
            moving=frozenset() if indifferent else frozenset(moving),
            rested=state._unused if state is not None and optimizer.counts_steps else frozenset(),
            taken=start.taken,
            indifferent=indifferent,
        )
        rest = (loss, layout, data, determinism, steps, usage, originals)
        gradient = CompiledGradient(*rest) if compile is True else Gradient(*rest, alike=compile == "graphs")
        if unused:
            usage.begin(0, unused)
            gradient.first = evaluation
        shared: SharedGradient | None = None
        if ranks is not None:
            shared = SharedGradient(gradient, ranks, shards, partial(_not_finite, layout, start.taken))
        problem = Problem(
            gradient=gradient,
            update=update,
            data=data,
            determinism=determinism,
            backend=backend,
            steps=steps,
            on_step=on_step,
            first=first,
            save_at=None if save_at is None else tuple(k - start.taken for k in save_at),
            clip_back=clip_back,
            on_step_back=on_step_back,
            start=begin,
            resumed=None if state is None else state._integers,
            returns_state=return_state,
            average=weights,
            progress=progress and (ranks is None or ranks.rank == 0),
            replays=compile == "graphs" and ranks is None,
            shared=shared,
            ranks=ranks,
            shards=shards,
        )
        theta0 = layout.flatten(params)
        if ranks is not None:
            check_same(ranks, what_is_shared(problem, theta0, optimizer, adjoint))
        return *(adjoint or default_adjoint(problem)).run(problem, theta0), usage

    try:
        result, stats, usage = run(frozenset())
    except UnusedParametersError as found:
        result, stats, usage = run(found.names, found.evaluation)

    theta = layout.owned(result.theta)
    extras: list[Any] = [] if result.average is None else [layout.owned(result.average)]
    if return_stats:
        extras.append(stats)
    if return_state:
        slots = {optimizer.slot_names[name]: layout.owned(flat) for name, flat in result.slots.items()}
        own = OptimizerState(start.taken + steps, slots, seed, result.integers, usage.unused)
        before = state.detach() if state is not None and first else state  # no gradient goes past a window
        extras.append(own if before is None else before.passed_on(own))
    return (theta, *extras) if extras else theta


def default_adjoint(problem: Problem) -> Adjoint:
    """Reversible where momentum > 0 at every step and the step can be walked back; otherwise Checkpoint."""
    update = problem.update
    if problem.on_all_ranks(update.no_way_back is None and update.always_decays(problem.steps)):
        return Reversible()
    return Checkpoint()


def _not_finite(layout: Layout, taken: int, k: int, loss: float, gradient: Tensor) -> NonFiniteError:
    return not_finite(layout, k + taken, loss, gradient)
