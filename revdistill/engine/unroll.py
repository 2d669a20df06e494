"""rd.unroll: a whole training run as one differentiable function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from revdistill.engine.adjoints.backprop import unroll_with_graph
from revdistill.engine.adjoints.recordings import Recording, UnrollStats
from revdistill.engine.adjoints.reversible import Adjoint, Backprop, FixedPointAdjoint, default_adjoint
from revdistill.engine.adjoints.sweep import Sweep
from revdistill.engine.adjoints.trajectory import Kernels, OnStep, OnStepBack, Problem
from revdistill.engine.arguments import check_arguments
from revdistill.engine.errors import ReversalError, UnsupportedError
from revdistill.engine.integers.compiled import CompiledKernels
from revdistill.engine.layout import Layout
from revdistill.engine.loss.compiled import CompiledGradient
from revdistill.engine.loss.data import Batches, Data, Hyper, Loss
from revdistill.engine.loss.determinism import Determinism
from revdistill.engine.loss.gradient import Gradient
from revdistill.engine.loss.operators import CHANGED_IN_PLACE
from revdistill.engine.loss.randomness import draw_seed
from revdistill.engine.optimizers.sgd import Optimizer


@overload
def unroll(
    loss: Loss,
    params: Mapping[str, Tensor],
    batches: Batches,
    optimizer: Optimizer,
    *,
    steps: int,
    hyper: Hyper = ...,
    adjoint: Adjoint | None = ...,
    compile: bool = ...,
    on_step: OnStep | None = ...,
    return_stats: Literal[False] = ...,
    seed: int | None = ...,
    window: int | None = ...,
    save_at: Sequence[int] | None = ...,
    clip_back: float | None = ...,
    on_step_back: OnStepBack | None = ...,
) -> dict[str, Tensor]: ...


@overload
def unroll(
    loss: Loss,
    params: Mapping[str, Tensor],
    batches: Batches,
    optimizer: Optimizer,
    *,
    steps: int,
    hyper: Hyper = ...,
    adjoint: Adjoint | None = ...,
    compile: bool = ...,
    on_step: OnStep | None = ...,
    return_stats: Literal[True],
    seed: int | None = ...,
    window: int | None = ...,
    save_at: Sequence[int] | None = ...,
    clip_back: float | None = ...,
    on_step_back: OnStepBack | None = ...,
) -> tuple[dict[str, Tensor], UnrollStats]: ...


def unroll(
    loss: Loss,
    params: Mapping[str, Tensor],
    batches: Batches,
    optimizer: Optimizer,
    *,
    steps: int,
    hyper: Hyper = None,
    adjoint: Adjoint | None = None,
    compile: bool = False,
    on_step: OnStep | None = None,
    return_stats: bool = False,
    seed: int | None = None,
    window: int | None = None,
    save_at: Sequence[int] | None = None,
    clip_back: float | None = None,
    on_step_back: OnStepBack | None = None,
) -> dict[str, Tensor] | tuple[dict[str, Tensor], UnrollStats]:
    """The parameters after `steps` optimizer steps, differentiable with respect to all that went in.

    loss: `loss(params, batch)`, or `loss(params, batch, hyper)` when hyper is given, returning a scalar tensor; any
    deterministic differentiable torch code (torch's own random numbers are seeded from (seed, step) around each call).
    params: name -> float32 or float64 tensor, all of one dtype and device.
    batches: a tuple of tensors [s, ...], step k gets `tuple(t[k % s] for t in batches)`; or a function k -> batch,
    which must be deterministic and is not differentiated.
    optimizer: `SGD(...)`, `Adam(...)` or `AdamW(...)`; its tensors may require grad.
    hyper: a tensor, or a tuple or dict of tensors, given to the loss as it is.
    adjoint: how the backward pass gets theta_k back; see `Reversible` (the default where momentum > 0 at every step),
    `Checkpoint` (the default otherwise), `StoreAll` and `Backprop`. All give the same hypergradient.
    compile: torch.compile for the gradient, the Hessian product and, on other devices than the CPU (where it is
    compiled always), the integer work; each is compared with eager on its first use, and dropped with a CompileWarning
    where it differs or cannot be compiled. Keep one `loss` object to compile once.
    on_step: called as on_step(k, theta_k, loss_k) at each step of the forward pass, with detached tensors.
    return_stats: also return an `UnrollStats`.
    seed: of the random numbers inside the loss; by default drawn from torch's default generator.
    window: go back over the last `window` steps only (truncated backpropagation: cheaper, and tamer where a long
    unroll's hypergradient explodes, but biased). Steps before it add nothing, and params get no gradient. By default
    all steps.
    save_at: steps k from 0 (the start) to `steps` (the end), in any order: the result is theta at each of them, stacked
    on a new first dimension, for losses along the way (learning curves, averaged iterates, several horizons). Each
    one's gradient enters when the way back is there; it costs no pass more. Before a `window`, theta is saved but has
    no gradient.
    clip_back: on the way back dL/dtheta_k is scaled down to this norm at every step where it is longer. It tames a
    hypergradient that explodes over a long unroll (chaotic training: too large a rate), and makes it another vector
    than the true one. None changes nothing.
    on_step_back: called as on_step_back(k, norm) at each step of the way back, from the last to the first, with the
    norm of dL/dtheta_k before any clipping; `BackwardNorms` keeps them and says where they explode. Either costs a wait
    for a GPU per step.

    Returns a dict like params. Gradients flow to params, batches, hyper and the optimizer's tensors; once: a second
    backward through the same unroll, and a derivative of the hypergradient, are UnsupportedErrors (`Backprop` can do
    both).

    Cost: see the adjoint. Errors: ValueError and TypeError for arguments; RangeError, NonFiniteError, ReversalError,
    UnsupportedError. Source: Maclaurin, Duvenaud & Adams 2015, algorithms 1 to 3.
    """
    check_arguments(
        loss,
        params,
        batches,
        optimizer,
        steps=steps,
        hyper=hyper,
        adjoint=adjoint,
        on_step=on_step,
        seed=seed,
        window=window,
        save_at=save_at,
        clip_back=clip_back,
        on_step_back=on_step_back,
    )
    layout = Layout.of(params)
    data = Data(batches, hyper)
    ambient = Determinism.capture(layout.device, draw_seed() if seed is None else seed)
    theta0 = layout.flatten(params)
    problem = Problem(
        gradient=(CompiledGradient if compile else Gradient)(loss, layout, data, ambient, steps),
        update=optimizer.resolve(layout, steps),
        data=data,
        ambient=ambient,
        steps=steps,
        kernels=CompiledKernels() if compile and layout.device.type != "cpu" else Kernels(),
        on_step=on_step,
        first=max(0, steps - window) if window else 0,
        save_at=None if save_at is None else tuple(save_at),
        clip_back=clip_back,
        on_step_back=on_step_back,
    )
    theta, stats = _run(problem, loss, theta0, adjoint or default_adjoint(problem))
    result = layout.views(theta)
    return (result, stats) if return_stats else result


def _run(problem: Problem, loss: Loss, theta0: Tensor, adjoint: Adjoint) -> tuple[Tensor, UnrollStats]:
    if isinstance(adjoint, Backprop):
        with problem.ambient.passage():
            theta = unroll_with_graph(problem, loss, theta0)
        state_bytes = (1 + len(problem.update.slots)) * theta0.nbytes
        return theta, UnrollStats(problem.steps, theta0.numel(), state_bytes, None)
    tables = [table.values for table in problem.update.tables.values()]
    inputs = (*tables, *problem.data.tensors, *problem.data.hypers)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (theta0, *inputs)):
        run = _Run(problem, adjoint)
        theta = _Unroll.apply(run, theta0, *inputs)  # type: ignore[no-untyped-call]
        assert run.recording is not None
        return theta, run.recording.stats
    with torch.no_grad(), problem.ambient.passage():
        return adjoint.forward_only(problem, theta0)


@dataclass
class _Run:
    """One unroll between its forward and its backward pass."""

    problem: Problem
    adjoint: FixedPointAdjoint
    recording: Recording | None = None
    versions: tuple[int, ...] = ()

    def data_versions(self) -> tuple[int, ...]:
        """torch counts the in-place changes of each tensor."""
        return tuple(t._version for t in (*self.problem.data.tensors, *self.problem.data.hypers))


class _Unroll(torch.autograd.Function):
    """Inputs: the run, theta_0 and every differentiable tensor; output theta_T. The mathematics is the adjoint's."""

    @staticmethod
    def forward(ctx: Any, run: _Run, theta0: Tensor, *inputs: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(theta0, *inputs)
        run.versions = run.data_versions()
        with run.problem.ambient.passage():
            run.recording = run.adjoint.record(run.problem, theta0.detach())
        if run.data_versions() != run.versions:
            raise UnsupportedError(CHANGED_IN_PLACE.format("a tensor in batches or hyper"))
        return run.recording.theta

    @staticmethod
    def backward(ctx: Any, theta_bar: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        recording, run.recording = run.recording, None  # used up, even if the way back fails
        if recording is None:
            raise UnsupportedError(
                "this unroll was already gone back through, which used it up; add the losses before one backward(), "
                "call "
                "rd.unroll again, or use adjoint=rd.Backprop() with retain_graph=True"
            )
        if run.data_versions() != run.versions:
            raise ReversalError(
                "a tensor in batches or hyper was changed in place between the forward and the backward pass, so the "
                "way back "
                "would see other data; change it after backward(), or pass a clone"
            )
        with torch.no_grad(), run.problem.ambient.passage():
            sweep = Sweep(run.problem, theta_bar.contiguous())
            found = recording.backward(sweep)
        tables = [found.tables.get(name) for name in run.problem.update.tables]
        gradients = (found.theta, *tables, *found.batches, *found.hypers)
        if torch.is_grad_enabled():  # backward(create_graph=True)
            inputs = ctx.saved_tensors
            gradients = tuple(None if g is None else _OnceOnly.apply(g, *inputs) for g in gradients)  # type: ignore[no-untyped-call]
        return (None, *gradients)


class _OnceOnly(torch.autograd.Function):
    """Passes a hypergradient through, and says what to do when it is differentiated in its turn.

    It hangs on everything that the hypergradient depends on: a derivative with respect to any of it comes past here.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise UnsupportedError(
            "a hypergradient of rd.unroll cannot be differentiated again with this adjoint; use "
            "adjoint=rd.Backprop(), or "
            "backward() without create_graph=True"
        )
