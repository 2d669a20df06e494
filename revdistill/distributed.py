"""rd.distributed: exchanges between the processes of a group inside a loss, differentiable any number of times.

In `rd.unroll(..., group=)` a rank's loss may be a function of every rank's share. The engine takes each rank's gradient
with respect to its own copy of theta and trains on the mean over ranks. An exchange of activations must carry back what
*all* ranks' losses say of them: then a rank's gradient is that of the sum of all losses with respect to its copy, and
the mean over ranks is the gradient of the mean loss; so are second derivatives, and those by batches and hyper.

    gather(h)       activations of all ranks, for a contrastive loss
    copy(sum(h))    a statistic over all ranks' samples, for BatchNorm: forward a sum, and back a sum

`sum` and `copy` come in pairs: in the loss of an unroll one without the other is an UnsupportedError.

Where each rank computes a part of one number, as of an outer loss from the result of an unroll, all that is
differentiated goes through `copy` and the parts through `sum`:

    loss = rd.distributed.sum(part({name: rd.distributed.copy(p) for name, p in theta.items()}))

In the loss of an unroll itself this is right for theta and hyper, and refused where batches are differentiated: let
each rank's loss be a mean over its share there, which needs no exchange.

All ranks must call them in the same order. The bits of what they return are the same on all ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["copy", "gather", "sum"]


def copy(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """x, which is the same on all ranks, to be used by each for itself.

    Args:
        x: float32 or float64, of any shape.
        group: of torch.distributed; by default of all processes.

    Returns:
        x. Its derivative is the sum over ranks of what each found.

    Raises:
        TypeError, ValueError: x or the group will not do.
        UnsupportedError: within the loss of an unroll without a group, or not paired (see above).
        RankError: another rank failed or is gone.
    """
    from revdistill.engine.ranks.operations import Copy, place_of

    found: Tensor = Copy.apply(place_of(x, group, "copy"), x)  # type: ignore[no-untyped-call]
    return found


def sum(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of every rank's x, the same on all ranks.

    Args:
        x: float32 or float64, of one shape on all ranks.
        group: of torch.distributed; by default of all processes.

    Returns:
        Of the same shape. Its derivative is the identity: of what each rank goes on to compute from the sum, it must be
        the same on all of them, or go through `copy`.

    Raises:
        TypeError, ValueError: x or the group will not do.
        UnsupportedError: within the loss of an unroll without a group, or not paired (see above).
        RankError: another rank failed or is gone.
    """
    from revdistill.engine.ranks.operations import Total, place_of

    found: Tensor = Total.apply(place_of(x, group, "sum"), x)  # type: ignore[no-untyped-call]
    return found


def gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Every rank's x, the first rank's first, one after another along the first dimension.

    Args:
        x: float32 or float64 [n, ...], of one shape on all ranks.
        group: of torch.distributed; by default of all processes.

    Returns:
        [ranks n, ...]. Its derivative is this rank's rows of the sum over ranks.

    Raises:
        TypeError, ValueError: x or the group will not do; also where shapes differ, on all ranks.
        RankError: another rank failed or is gone.
    """
    from revdistill.engine.ranks.operations import Gather, place_of

    place = place_of(x, group, "gather")
    if not x.ndim:
        raise ValueError("rd.distributed.gather takes a tensor with a first dimension, got shape []")
    found: Tensor = Gather.apply(place, 0, x)  # type: ignore[no-untyped-call]
    return found
