"""rd.attribute: which training example did this, by the derivative of a whole training by its examples' weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revdistill.attribute.arguments import flag, integer
from revdistill.attribute.attribution import Attribution
from revdistill.attribute.run import EachLoss, Run
from revdistill.engine import Adjoint, Optimizer, jacobian
from revdistill.engine.loss.randomness import draw_seed
from revdistill.engine.ranks.group import together
from revdistill.engine.ranks.same import seed_of_first
from revdistill.engine.scalars import is_integer
from revdistill.engine.unrolled import ranks_of

if TYPE_CHECKING:
    import torch.distributed as dist


def attribute(
    loss: EachLoss,
    params: Mapping[str, Tensor],
    data: Sequence[Tensor],
    optimizer: Optimizer,
    *,
    order: Tensor,
    queries: Sequence[Tensor],
    measure: EachLoss | None = None,
    chunk_size: int = 32,
    adjoint: Adjoint | None = None,
    seed: int | None = None,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
    shard: bool = False,
) -> Attribution:
    """What each training example did to each query's loss: dL_q/dw_i through the whole training, at weights w = 1.

    A step's loss is sum_i w_i loss_i / B over the B examples of the step. To leave example i out is w_i = 0, with the
    divisor, the start and the order as they are.

    Args:
        loss: `loss(params, examples) -> [B]`, the losses of single examples; `rd.from_module` makes one of a module and
            a criterion with reduction="none". Where examples mix within a batch (BatchNorm in training mode), w_i
            weighs loss_i alone.
        params: theta_0, as of `rd.unroll`.
        data: a tuple of tensors [n, ...], such as (x, y).
        optimizer: as of `rd.unroll`.
        order: int64 [T, B], the examples that each step takes; -1 at the end of a row is none. `rd.epochs` makes one.
        queries: a tuple of tensors [K, ...], of which the losses are asked for.
        measure: `measure(params, queries) -> [K]`, any differentiable torch code; by default the loss, with its modules
            in the mode that they are in. Random numbers in it are seeded.
        chunk_size: of `rd.jacobian`, how many queries' products are computed at once.
        adjoint: as of `rd.unroll`.
        seed: of the random numbers inside the loss; by default drawn from torch's default generator.
        progress: bars on stderr, as of `rd.unroll`.
        group: as of `rd.unroll`: every rank gives its own examples as `data`, with an `order` of its own of as many
            steps, and the same queries; a step's loss is the mean over ranks, and the scores are of its own examples.
        shard: as of `rd.unroll`; the K vectors that are carried back are kept in parts too.

    Returns:
        An `Attribution`. Cost: one training, one way back with K products per step instead of 1; K vectors of the size
        of the parameters, and the scores, K n numbers.

    Raises:
        ValueError, TypeError: an argument will not do; the message names it.
        NonFiniteError: a query's loss is not finite; and as of `rd.unroll`.
        RangeError, ReversalError, UnsupportedError, RankError: as of `rd.unroll`.

    Source: Ilyas & Engstrom 2025 (MAGIC); Engstrom et al. 2025 (metagradients).
    """
    progress, chunk_size = flag("progress", progress), integer("chunk_size", chunk_size, 1)
    ranks = ranks_of(group, shard, params)
    with together(ranks), torch.enable_grad():
        if ranks is not None and (seed is None or is_integer(seed)):
            seed = seed_of_first(ranks, draw_seed() if seed is None else int(seed), given=seed is not None)
        run = Run(
            loss,
            params,
            data,
            optimizer,
            order=order,
            queries=queries,
            measure=measure,
            adjoint=adjoint,
            seed=seed,
            group=group,
            shard=shard,
        )
        weights = torch.ones(run.examples, dtype=run.dtype, device=run.device, requires_grad=True)
        theta = run.train(weights, params, progress=progress)
        losses = run.checked(run.measured(theta))
        # What does not depend on theta does so by a factor of 0: no example influences it.
        linked = losses + 0 * sum(t.sum() for t in theta.values())
        scores = jacobian(linked, weights, chunk_size=chunk_size)
    return Attribution(scores.detach(), losses.detach(), theta={name: t.detach() for name, t in theta.items()}, run=run)
