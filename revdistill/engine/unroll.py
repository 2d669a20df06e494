"""rd.unroll: a whole training run as one differentiable function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, overload

from torch import Tensor

from revdistill.engine.adjoints.adjoint import Adjoint, UnrollStats
from revdistill.engine.adjoints.checkpoint import Checkpoint
from revdistill.engine.adjoints.reversible import Reversible
from revdistill.engine.arguments import check_arguments
from revdistill.engine.integers.select import backend_for
from revdistill.engine.layout import Layout
from revdistill.engine.loss.compiled import CompiledGradient
from revdistill.engine.loss.data import Batches, Data, Hyper, Loss
from revdistill.engine.loss.determinism import Determinism
from revdistill.engine.loss.gradient import Gradient
from revdistill.engine.loss.randomness import draw_seed
from revdistill.engine.optimizers.optimizer import Optimizer
from revdistill.engine.problem import OnStep, OnStepBack, Problem

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Options(TypedDict, total=False):
    """The keyword arguments of `unroll`, for type checkers; see there."""

    hyper: Hyper
    adjoint: Adjoint | None
    compile: bool
    on_step: OnStep | None
    seed: int | None
    window: int | None
    save_at: Sequence[int] | None
    clip_back: float | None
    on_step_back: OnStepBack | None


@overload
def unroll(
    loss: Loss,
    params: Mapping[str, Tensor],
    batches: Batches,
    optimizer: Optimizer,
    *,
    steps: int,
    return_stats: Literal[False] = ...,
    **options: Unpack[_Options],
) -> dict[str, Tensor]: ...


@overload
def unroll(
    loss: Loss,
    params: Mapping[str, Tensor],
    batches: Batches,
    optimizer: Optimizer,
    *,
    steps: int,
    return_stats: Literal[True],
    **options: Unpack[_Options],
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

    Gradients flow to params, batches, hyper and the optimizer's tensors; once: a second backward through the same
    unroll, and a derivative of the hypergradient, are UnsupportedErrors (`Backprop` can do both).

    Args:
        loss: `loss(params, batch)`, or `loss(params, batch, hyper)` when hyper is given, returning a scalar tensor; any
            deterministic differentiable torch code (torch's own random numbers are seeded from (seed, step) around each
            call).
        params: name -> float32 or float64 tensor, all of one dtype and device.
        batches: a tuple of tensors [s, ...], step k gets `tuple(t[k % s] for t in batches)`; or a function k -> batch,
            which must be deterministic and is not differentiated.
        optimizer: `SGD(...)`, `Adam(...)`, `AdamW(...)` or `RMSprop(...)`; its tensors may require grad.
        steps: T, at least 0.
        hyper: a tensor, or a tuple or dict of tensors, given to the loss as it is.
        adjoint: how the backward pass gets theta_k back; see `Reversible` (the default where momentum > 0 at every
        step),
            `Checkpoint` (the default otherwise), `StoreAll` and `Backprop`. All give the same hypergradient.
        compile: torch.compile for the gradient, the Hessian product and, on other devices than the CPU (where it is
            compiled always), the integer work; each is compared with eager on its first use, and dropped with a
            CompileWarning where it differs or cannot be compiled. Of gradient and product the faster form is kept. Keep
            one `loss` object to compile once.
        on_step: called as on_step(k, theta_k, loss_k) at each step of the forward pass, with detached tensors.
        return_stats: also return an `UnrollStats`.
        seed: of the random numbers inside the loss; by default drawn from torch's default generator.
        window: go back over the last `window` steps only (truncated backpropagation: cheaper, and tamer where a long
            unroll's hypergradient explodes, but biased). Steps before it add nothing, and params get no gradient. By
            default all steps.
        save_at: steps k from 0 (the start) to `steps` (the end), in any order: the result is theta at each of them,
            stacked on a new first dimension, for losses along the way (learning curves, averaged iterates, several
            horizons). Each one's gradient enters when the way back is there; it costs no pass more. Before a `window`,
            theta is saved but has no gradient.
        clip_back: on the way back dL/dtheta_k is scaled down to this norm at every step where it is longer. It tames a
            hypergradient that explodes over a long unroll (chaotic training: too large a rate), and makes it another
            vector than the true one. None changes nothing.
        on_step_back: called as on_step_back(k, norm) at each step of the way back, from the last to the first, with the
            norm of dL/dtheta_k before any clipping; `BackwardNorms` keeps them and says where they explode. This and
            clip_back cost a wait for a GPU per step.

    Returns:
        A dict like params; with return_stats, that and an `UnrollStats`. Cost: see the adjoint.

    Raises:
        ValueError, TypeError: an argument will not do; the message names it.
        RangeError, NonFiniteError, ReversalError, UnsupportedError: see there.

    Source: Maclaurin, Duvenaud & Adams 2015, algorithms 1 to 3.
    """
    check_arguments(locals())
    layout = Layout.of(params)
    backend = backend_for(layout.device, compile=compile)
    data = Data(batches, hyper)
    determinism = Determinism.capture(layout.device, draw_seed() if seed is None else seed)
    problem = Problem(
        gradient=(CompiledGradient if compile else Gradient)(loss, layout, data, determinism, steps),
        update=optimizer.resolve(layout, steps),
        data=data,
        determinism=determinism,
        backend=backend,
        steps=steps,
        on_step=on_step,
        first=max(0, steps - window) if window else 0,
        save_at=None if save_at is None else tuple(save_at),
        clip_back=clip_back,
        on_step_back=on_step_back,
    )
    theta, stats = (adjoint or default_adjoint(problem)).run(problem, layout.flatten(params))
    result = layout.views(theta)
    return (result, stats) if return_stats else result


def default_adjoint(problem: Problem) -> Adjoint:
    """Reversible where momentum > 0 at every step and the step can be walked back; otherwise Checkpoint."""
    update = problem.update
    if update.no_way_back is None and update.always_decays(problem.steps):
        return Reversible()
    return Checkpoint()
