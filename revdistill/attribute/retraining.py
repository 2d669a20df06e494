"""The truth beside the scores: trainings with other weights of the examples, several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.attribute.arguments import checked_weights
from revdistill.attribute.run import Params, Run
from revdistill.attribute.side_by_side import Stack, how_many
from revdistill.engine.showing import Shown
from revdistill.outer.ranks import ALONE, Processes


@dataclass(frozen=True, repr=False)
class Retrained(Shown):
    """Trainings with other weights.

    losses: [R, K], of the queries. theta: name -> [R, ...], the trained parameters; None where they were not asked for.
    """

    losses: Tensor
    theta: Params | None = None


def retrain(
    run: Run, weights: Tensor, *, return_theta: bool = False, progress: bool = False, processes: Processes = ALONE
) -> Retrained:
    """Train again, from the same start in the same order with the same random numbers, with other weights.

    Trainings are stacked by torch.func.vmap, at most 64 and as many as fit in a GiB (on a CPU in caches). They are made
    one after another where vmap cannot evaluate the loss (a warning says so), and where it convolves on a CPU, which is
    faster.

    Args:
        run: the training.
        weights: bool or float [R, n], a row for each training; 0 leaves an example out.
        return_theta: whether the trained parameters are returned too.
        progress: bars on stderr.
        processes: that share the trainings, of the same run each.

    Returns:
        A `Retrained`. Cost: R trainings, without a way back.

    Raises:
        TypeError, ValueError: the weights will not do.
        NonFiniteError, RangeError: see `rd.unroll`; a query's loss is not finite.
    """
    rows = checked_weights(weights, run.examples).to(run.device, run.dtype)
    at_once = how_many(run) if len(rows) > 1 else 1
    return retrain_pieces(
        run, torch.split(rows, at_once), return_theta=return_theta, progress=progress, processes=processes
    )


def retrain_pieces(
    run: Run,
    pieces: Sequence[Tensor],
    *,
    return_theta: bool = False,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Retrained:
    """The same, for weights [r, n] whose trainings are made side by side, piece by piece."""
    dtype = torch.promote_types(run.dtype, run.measured_dtype)
    queries, numbers = len(run.queries[0]), sum(p.numel() for p in run.params.values()) if return_theta else 0

    @torch.no_grad()
    def trained(unit: int) -> Tensor:
        """[r, K + numbers] in one: the losses, and the parameters."""
        part = pieces[unit]
        if len(part) > 1:
            theta = Stack(run, len(part)).train(part, progress=progress)
        else:
            theta = {name: t[None] for name, t in run.train(part[0], progress=progress).items()}
        losses = [run.checked(run.measured({name: t[e] for name, t in theta.items()})) for e in range(len(part))]
        found = [torch.stack(losses), *(t.reshape(len(part), -1) for t in theta.values() if return_theta)]
        return torch.cat([t.to(dtype) for t in found], 1).reshape(-1)

    each = queries + numbers
    shared = processes.share([len(part) * each for part in pieces], trained, dtype=dtype, device=run.device)
    rows = torch.cat([found.view(-1, each) for found in shared])
    losses = rows[:, :queries].to(run.measured_dtype)
    if not return_theta:
        return Retrained(losses)
    sizes = [p.numel() for p in run.params.values()]
    flat = torch.split(rows[:, queries:], sizes, 1)
    theta = {n: t.reshape(len(t), *p.shape).to(p.dtype) for (n, p), t in zip(run.params.items(), flat, strict=True)}
    return Retrained(losses, theta)
