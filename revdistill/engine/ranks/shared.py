"""The gradient of the mean over ranks of each rank's loss, and its product with vectors.

Each rank evaluates its own loss. Its gradient is rounded to integers, at a scale that all ranks agree on from the
largest entry of any, and integers are summed: the sum does not depend on order or algorithm, so that theta has the same
bits on all ranks, and the way back finds the same gradient again. Nothing is differentiated through a collective: the
product is the sum of each rank's product, in the order of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.cotangents import Batching
from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.gradient import Gradient
from revdistill.engine.loss.linearization import Linearization, Products
from revdistill.engine.loss.usage import UnusedParametersError, Usage
from revdistill.engine.ranks.group import AT_ONCE, Ranks
from revdistill.engine.ranks.same import others
from revdistill.engine.ranks.shards import Shards

_BITS = 61  # of a sum of integers: no sum of as many ranks' wraps around
_SPREAD = 2.0**16  # between parameters' largest entries, up to which one scale serves all
_LIFT = 126  # the largest exponent whose power of two float32 has, and the inverse
_SMALLEST = 900  # the exponent that the scale never passes, so that it and its inverse are floats


class SharedGradient:
    """What `Gradient` is for one process, for the ranks of a group.

    Args:
        local: of this rank's loss.
        ranks: of the group.
        shards: where each rank keeps a part of the parameters: `linearize` takes and gives parts then.
        not_finite: makes the error of a loss (a float) or a gradient [numel] that is not finite at a step.
    """

    def __init__(
        self,
        local: Gradient,
        ranks: Ranks,
        shards: Shards | None,
        not_finite: Callable[[int, float, Tensor], Exception],
    ) -> None:
        self._local, self.ranks, self.shards, self._not_finite = local, ranks, shards, not_finite

    @property
    def usage(self) -> Usage:
        return self._local.usage

    def linearize(self, k: int, theta: Tensor) -> SharedLinearization:
        """See `Gradient.linearize`. The loss is the mean over ranks, and so is the gradient."""
        if self.shards is not None:
            theta = self.shards.joined(theta, "theta in parts", k)
        unused: UnusedParametersError | None = None
        try:
            linear: Linearization = self._local.linearize(k, theta)
        except UnusedParametersError as error:
            unused, linear = error, error.evaluation
        own = linear.gradient
        each, loss = self._largest_of_each(own), float(linear.loss)
        if not all(map(math.isfinite, (*each, loss))):
            raise self._not_finite(k, loss, own)
        entry, least = max(each), min((n for n in each if n), default=math.inf)
        rows = self.ranks.meet("a gradient", k, entry, loss, least, *self._missing())
        if self.usage.matters and others(rows[:, 3:]):
            self._refuse_to_miss_some(k)
        if unused is not None:
            raise unused
        largest, least = float(rows[:, 0].max()), float(rows[:, 2].min())
        far_apart = largest > least * _SPREAD
        mean = self._mean_of_lifted(own, largest, each) if far_apart else self._mean(own, largest)
        return SharedLinearization(self, linear, k, _mean_of(rows[:, 1], linear.loss), mean, own)

    def _missing(self) -> list[float]:
        """Which parameters this rank's loss does not use, in three numbers."""
        names = self.usage.unused
        found = [i for i, name in enumerate(self._local.layout.names) if name in names]
        return [float(len(found)), float(sum(found)), float(sum(i * i for i in found))]

    def _refuse_to_miss_some(self, k: int) -> None:
        names = [set(text.split("\n")) - {""} for text in self.ranks.texts("\n".join(sorted(self.usage.unused)))]
        rank = next(r for r, of in enumerate(names) if of != names[0])
        name = min(names[0] ^ names[rank])
        with_it, without = (rank, 0) if name in names[0] else (0, rank)
        raise self.ranks.for_all(
            UnsupportedError(
                f"the loss gives params[{name!r}] a gradient on rank {with_it} and none on rank {without}, at "
                f"step {k + self.usage.taken}: torch.optim would step it on one rank and not on the other. Make the "
                f"gradient 0 where it is missing: add 0 * params[{name!r}].sum() to the loss"
            )
        )

    def _largest_of_each(self, own: Tensor) -> list[float]:
        """The largest entry of each parameter, 0 where there is none."""
        sizes = self._local.layout.sizes
        parts = [part for part in torch.split(own, sizes) if part.numel()]
        found = iter(torch.stack(torch._foreach_norm(parts, math.inf)).tolist())
        return [next(found) if size else 0.0 for size in sizes]

    def _mean_of_lifted(self, own: Tensor, largest: float, each: list[float]) -> Tensor:
        """The same where parameters' gradients are of very different sizes: each is multiplied by a power of two that
        takes it near the largest, and the mean is divided by it, both exactly.
        """
        found = self.ranks.gather(torch.tensor(each, dtype=torch.float64, device=own.device)).amax(0).tolist()
        top = math.frexp(largest)[1]
        lifts = [min(_LIFT, top - math.frexp(n)[1]) if n else 0 for n in found]
        lifted = own.clone()
        for part, lift in zip(torch.split(lifted, self._local.layout.sizes), lifts, strict=True):
            part.mul_(2.0**lift)
        mean = self._mean(lifted, largest)
        layout = self._local.layout if self.shards is None else self.shards.layout
        for part, lift in zip(torch.split(mean, layout.sizes), lifts, strict=True):
            part.mul_(2.0**-lift)
        return mean

    def _mean(self, own: Tensor, largest: float) -> Tensor:
        """The mean over ranks, in the dtype of `own`: all of it, or this rank's part. largest: entry of any rank."""
        ranks = self.ranks
        bits = _BITS - math.frexp(largest)[1] - (ranks.size - 1).bit_length()
        scale = 2.0 ** min(bits, _SMALLEST)
        back = 1.0 / (scale * ranks.size)

        if self.shards is not None:

            def reduce(sent: Tensor) -> Tensor:
                return ranks.to_each(_rounded(sent, scale)).sum(0).double().mul_(back)

            return self.shards.reduced(own, reduce)
        mean = torch.empty_like(own)
        for piece, out in zip(torch.split(own, AT_ONCE), torch.split(mean, AT_ONCE), strict=True):
            q = _rounded(piece, scale)
            ranks.sum_of_integers(q)
            out.copy_(q.double().mul_(back))
        return mean

    def to_vector(self, k: int, vector: Tensor) -> Tensor:
        """Of dL/d(the mean gradient), dL/d(this rank's gradient). vector: [..., numel], or [..., n] in parts."""
        if self.shards is not None:
            vector = self.shards.joined(vector, "a vector in parts", k)
        return vector * (1.0 / self.ranks.size)

    def summed(self, k: int, theta: Tensor) -> Tensor:
        """Over ranks: all of it, or this rank's part. theta: [..., numel]."""
        self.ranks.meet("a product of second derivatives", k)
        return self.ranks.sum_in_order(theta) if self.shards is None else self.shards.summed_in_order(theta)


@dataclass
class SharedLinearization:
    """A `Linearization` of the mean over ranks."""

    shared: SharedGradient
    local: Linearization
    k: int
    loss: Tensor
    gradient: Tensor
    own: Tensor | None

    @property
    def batch(self) -> Any:
        """See `Linearization.batch`."""
        return self.local.batch

    @property
    def nbytes(self) -> int:
        """See `Linearization.nbytes`; that of the rank where it is most, at a meeting."""
        mine = self.local.nbytes
        mine = mine + self.gradient.nbytes if mine else 0
        return int(self.shared.ranks.agree("a number that all agree on", self.k, mine, max))

    def saved(self) -> Iterator[Tensor]:
        """See `Linearization.saved`."""
        return self.local.saved()

    def product(self, vector: Tensor) -> Products:
        """See `Linearization.product`. Of theta the sum over ranks; of the batch, and of hyper, this rank's part."""
        return self._summed(self.local.product(self.shared.to_vector(self.k, vector)), ())

    def products(self, vectors: Tensor, batching: Batching) -> Products:
        """See `Linearization.products`, and `product`."""
        found = self.local.products(self.shared.to_vector(self.k, vectors), batching)
        return self._summed(found, (len(vectors),))

    def _summed(self, found: Products, first: Sequence[int]) -> Products:
        theta = found.theta
        if theta is None:  # of a loss that is linear on this rank perhaps only
            own = self.local.gradient
            theta = own.new_zeros(*first, own.numel())
        return Products(self.shared.summed(self.k, theta), found.batch, found.hyper)


def _rounded(x: Tensor, scale: float) -> Tensor:
    return x.to(torch.float64, copy=True).mul_(scale).round_().to(torch.int64)


def _mean_of(losses: Tensor, like: Tensor) -> Tensor:
    """0-dim. losses: float64 [ranks]."""
    return losses.mean().to(like)
