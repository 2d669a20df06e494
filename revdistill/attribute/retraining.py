"""The truth beside the scores: trainings with other weights of the examples, several side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.attribute.arguments import checked_weights
from revdistill.attribute.run import Params, Run
from revdistill.attribute.side_by_side import Stack, how_many


@dataclass(frozen=True)
class Retrained:
    """Trainings with other weights.

    losses: [R, K], of the queries. theta: name -> [R, ...], the trained parameters; None where they were not asked for.
    """

    losses: Tensor
    theta: Params | None = None


def retrain(run: Run, weights: Tensor, *, return_theta: bool = False, progress: bool = False) -> Retrained:
    """Train again, from the same start in the same order with the same random numbers, with other weights.

    Trainings are stacked by torch.func.vmap, at most 64 and as many as fit in a GiB (on a CPU in caches). They are made
    one after another where vmap cannot evaluate the loss (a warning says so), and where it convolves on a CPU, which is
    faster.

    Args:
        run: the training.
        weights: bool or float [R, n], a row for each training; 0 leaves an example out.
        return_theta: whether the trained parameters are returned too.
        progress: bars on stderr.

    Returns:
        A `Retrained`. Cost: R trainings, without a way back.

    Raises:
        TypeError, ValueError: the weights will not do.
        NonFiniteError, RangeError: see `rd.unroll`; a query's loss is not finite.
    """
    rows = checked_weights(weights, run.examples).to(run.device, run.dtype)
    thetas: list[Params] = []
    losses: list[Tensor] = []
    with torch.no_grad():
        for part in torch.split(rows, how_many(run) if len(rows) > 1 else 1):
            if len(part) > 1:
                theta = Stack(run, len(part)).train(part, progress=progress)
            else:
                theta = {name: t[None] for name, t in run.train(part[0], progress=progress).items()}
            for e in range(len(part)):
                losses.append(run.checked(run.measured({name: t[e] for name, t in theta.items()})))
            thetas += [theta] if return_theta else []
    together = {name: torch.cat([theta[name] for theta in thetas]) for name in run.params} if thetas else None
    return Retrained(torch.stack(losses), together)
