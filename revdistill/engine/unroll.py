"""rd.unroll: a whole training run as one differentiable function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from torch import Tensor

from revdistill.engine.adjoints.adjoint import Adjoint, UnrollStats
from revdistill.engine.loss.data import Batches, Hyper, Loss
from revdistill.engine.optimizer_state import OptimizerState
from revdistill.engine.optimizers.optimizer import Optimizer
from revdistill.engine.problem import OnStep, OnStepBack
from revdistill.engine.ranks.group import together
from revdistill.engine.unrolled import ranks_of, unrolled

if TYPE_CHECKING:
    import torch.distributed as dist
    from typing_extensions import Unpack


class _Options(TypedDict, total=False):
    """The keyword arguments of `unroll`, for type checkers; see there."""

    hyper: Hyper
    adjoint: Adjoint | None
    compile: bool | Literal["graphs"]
    on_step: OnStep | None
    seed: int | None
    window: int | None
    save_at: Sequence[int] | None
    clip_back: float | None
    on_step_back: OnStepBack | None
    state: OptimizerState | None
    progress: bool
    group: dist.ProcessGroup | None
    shard: bool


@overload
def unroll(
    loss: Loss,
    params: Mapping[str, Tensor],
    batches: Batches,
    optimizer: Optimizer,
    *,
    steps: int,
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


@overload
def unroll(
    loss: Loss,
    params: Mapping[str, Tensor],
    batches: Batches,
    optimizer: Optimizer,
    *,
    steps: int,
    return_state: Literal[True],
    **options: Unpack[_Options],
) -> tuple[dict[str, Tensor], OptimizerState]: ...


@overload
def unroll(
    loss: Loss,
    params: Mapping[str, Tensor],
    batches: Batches,
    optimizer: Optimizer,
    *,
    steps: int,
    average: float | Tensor,
    **options: Unpack[_Options],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...


@overload
def unroll(
    loss: Loss,
    params: Mapping[str, Tensor],
    batches: Batches,
    optimizer: Optimizer,
    *,
    steps: int,
    average: float | Tensor | None = ...,
    return_stats: bool = ...,
    return_state: bool = ...,
    **options: Unpack[_Options],
) -> Any: ...


def unroll(
    loss: Loss,
    params: Mapping[str, Tensor],
    batches: Batches,
    optimizer: Optimizer,
    *,
    steps: int,
    hyper: Hyper = None,
    adjoint: Adjoint | None = None,
    compile: bool | Literal["graphs"] = False,
    on_step: OnStep | None = None,
    return_stats: bool = False,
    seed: int | None = None,
    window: int | None = None,
    save_at: Sequence[int] | None = None,
    clip_back: float | None = None,
    on_step_back: OnStepBack | None = None,
    average: float | Tensor | None = None,
    state: OptimizerState | None = None,
    return_state: bool = False,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
    shard: bool = False,
) -> Any:
    """The parameters after `steps` optimizer steps, differentiable with respect to all that went in.

    Gradients flow to params, batches, hyper, the optimizer's tensors and the state that came in; once: a second
    backward through the same unroll, and a derivative of the hypergradient, are UnsupportedErrors (`Backprop` can do
    both).

    As in torch.optim, a parameter to which the loss gives no gradient (None, not 0) at any step stays as it is, weight
    decay included. One that has a gradient at some steps only is an UnsupportedError.

    Args:
        loss: `loss(params, batch)`, or `loss(params, batch, hyper)` when hyper is given, returning a scalar tensor; any
            deterministic differentiable torch code (torch's own random numbers are seeded from (seed, step) around each
            call).
        params: name -> float32 or float64 tensor, all of one dtype and device. Every entry is trained, whether or not
            it requires grad, which only says whether a gradient to its start is wanted. Leave frozen parameters out, as
            `from_module` does: an nn.Parameter with requires_grad=False beside others is warned about.
        batches: a tuple (or dict) of tensors [s, ...], step k gets `tuple(t[k % s] for t in batches)`; `Minibatches`
            of a data set; or what is not differentiated: a list of batches (tuples or dicts), step k gets
            `batches[k % len(batches)]`, a DataLoader, or a deterministic function k -> batch. A DataLoader must give
            the same batches each time it is gone through: `shuffle=False`; of one that shuffles give `list(loader)`
            (several epochs: `[batch for _ in range(epochs) for batch in loader]`), or an `rd.epochs` order and
            `Minibatches`, which gradients flow through.
        optimizer: `SGD(...)`, `Adam(...)`, `AdamW(...)` or `RMSprop(...)`; its tensors may require grad.
        steps: T, at least 0.
        hyper: a tensor, or nested tuples, lists and dicts of tensors, given to the loss as they are.
        adjoint: how the backward pass gets theta_k back; see `Reversible` (the default where momentum > 0 at every
            step), `Checkpoint` (the default otherwise), `StoreAll` and `Backprop`. All give the same hypergradient, up
            to rounding: where training is chaotic (`UnrollStats.amplification` far above 1) rounding is amplified, and
            in float32 two of them may have nothing in common; compare in float64.
        compile: torch.compile for the gradient, the Hessian product and, on other devices than the CPU (where it is
            compiled always), the integer work; each is compared with eager on its first use, and dropped with a
            CompileWarning where it differs or cannot be compiled. Of gradient and product the faster form is kept. Keep
            one `loss` object to compile once.
            "graphs": on CUDA a step forward, and a step back of `Reversible` for one loss, is one CUDA graph that is
            replayed: a small network's step waits for kernel launches, and has none left. A step is captured once for
            each `loss` object (and form of batch and optimizer) and admitted where it was proved to have eager's bits,
            in every unroll at a few steps of each way, or else made eagerly, with a CompileWarning: a loss that waits
            for the device (`.item()`), draws random numbers on the host, checkpoints its activations, or changes what
            it does from step to step (an UnsupportedError where `on_step` saw such steps). A module that keeps tensors
            of its last call shows `on_step` the memory of a graph. A state of more than 1 GiB is stepped eagerly. On a
            CPU nothing is captured, but steps are taken to be like those before them, as with graphs: what is looked
            for at each step (a tensor that requires grad and reaches the loss by closure) is looked for at the first
            three, at those whose number is a power of two, at the last, and where a batch has a new form.
        on_step: called as `on_step(k: int, theta: dict[str, Tensor], loss: Tensor)` at each step of the forward pass,
            once its gradient is there: the step's number, the parameters before it (theta_k, in the form of `params`),
            and the loss at them of the step's batch, a scalar. The tensors are detached copies, which may be kept and
            changed; what is returned is ignored. Cost: a copy of theta per step, and where `loss.item()` is asked for a
            wait for a GPU.
        return_stats: also return an `UnrollStats`.
        seed: of the random numbers inside the loss; by default that of `state`, or else drawn from torch's default
            generator.
        window: go back over the last `window` steps only (truncated backpropagation: cheaper, and tamer where a long
            unroll's hypergradient explodes, but biased). Steps before it add nothing, and params and state get no
            gradient. By default all steps.
        save_at: steps k from 0 (the start) to `steps` (the end), in any order: the result is theta at each of them,
            stacked on a new first dimension, for losses along the way (learning curves, several horizons). Each one's
            gradient enters when the way back is there; it costs no pass more. Before a `window`, theta is saved but has
            no gradient.
        clip_back: on the way back dL/dtheta_k is scaled down to this norm at every step where it is longer. It tames a
            hypergradient that explodes over a long unroll (chaotic training: too large a rate), and makes it another
            vector than the true one. None changes nothing.
        on_step_back: called as `on_step_back(k: int, norm: float)` at each step of the way back, from the last to the
            first, with the norm of dL/dtheta_k (all parameters together, before any clipping; of several losses at once
            the largest). What is returned is ignored. `BackwardNorms` keeps them and says where they explode. This and
            clip_back cost a wait for a GPU per step.
        average: also return an average of the iterates, differentiable, without storing them: a decay d from 0 to 1 for
            the exponential moving average a <- d a + (1 - d) theta_{k+1} that starts as theta_0, or the weights of
            theta_0 to theta_T, a tensor [T + 1] that is not differentiated.
        state: an `OptimizerState` to go on from; k then counts on from `state.step` wherever it is seen (batches,
            random numbers, on_step, save_at, schedules given as functions, messages), and tensors [T] still have a row
            for each of the `steps` steps here.
        return_state: also return the `OptimizerState` after the last step, differentiable.
        progress: a bar on stderr, forward and back, where that is a terminal (with a group, on rank 0 alone).
        group: the processes of torch.distributed that share each step's batch: every one calls this with its own share
            as batches and with the same of all else, and the loss is a mean over its share; trained on is the mean over
            ranks. Gradients are summed as integers, so that theta has the same bits on all ranks. Gradients to params,
            hyper, the optimizer's tensors and the state are those of the whole, the same on all ranks; those to batches
            are of this rank's share. What is computed from the result must be the same on all ranks (or go through
            rd.distributed.copy and sum). An error on one rank is raised on all. Random numbers in the loss are the same
            on all ranks. No graphs are replayed, and `Backprop` is not to be had.
        shard: with a group, each rank keeps its part of theta, of the running averages, of the bit store and of all
            that is carried back; theta as floats and the gradient are whole on all of them, at a step.

    Returns:
        A dict like params, of tensors that own their memory. Where an average, stats or the state are asked for, a
        tuple of it and of these, in this order. The tensors are no leaves: copy them by
        `{n: t.detach().clone() for n, t in theta.items()}` instead of copy.deepcopy. `net.load_state_dict(theta,
        strict=False)` copies the values and cuts the gradient; for a loss that is to be differentiated call
        `torch.func.functional_call(net, theta, ...)`, or from_module's loss. Cost: see the adjoint.

    Raises:
        ValueError, TypeError: an argument will not do; the message names it.
        RangeError, NonFiniteError, ReversalError, UnsupportedError: see there.
        RankError: with a group, where another process of it failed or is gone.

    Source: Maclaurin, Duvenaud & Adams 2015, algorithms 1 to 3.
    """
    ranks = ranks_of(group, shard, params)
    with together(ranks):
        return unrolled(
            loss,
            params,
            batches,
            optimizer,
            steps=steps,
            hyper=hyper,
            adjoint=adjoint,
            compile=compile,
            on_step=on_step,
            return_stats=return_stats,
            seed=seed,
            window=window,
            save_at=save_at,
            clip_back=clip_back,
            on_step_back=on_step_back,
            average=average,
            state=state,
            return_state=return_state,
            progress=progress,
            ranks=ranks,
            shard=shard,
        )
