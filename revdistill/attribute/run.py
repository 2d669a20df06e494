"""A training whose examples have weights, and what is measured of it: all that it takes to make it again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revdistill.attribute.arguments import NOT_REDUCED, Tensors, check_each, examples
from revdistill.engine import Adjoint, Minibatches, NonFiniteError, Optimizer, UnsupportedError, unroll
from revdistill.engine.arguments import check_arguments
from revdistill.engine.loss.randomness import draw_seed, seeded
from revdistill.engine.loss.tree import leaves
from revdistill.engine.ranks.borrowed import Borrowed

if TYPE_CHECKING:
    import torch.distributed as dist

Params = dict[str, Tensor]
EachLoss = Callable[[Params, Tensors], Tensor]
_LOOKED_AT = 4  # steps whose losses at the start tell whether the loss is still the same one
_SAME = 1e-3  # relative: rounding is far below, another training mode or other data far above


class Run:
    """One training: theta_0, data, order, optimizer; its examples' weights are given when it is made.

    At weights w a step's loss is sum_i w_i loss_i / B over the B examples of the step.

    Args:
        loss, params, data, optimizer, order, queries, measure, adjoint, seed, group, shard: see `attribute`. Copies are
            made of params and order alone.

    Attributes:
        loss, data, optimizer, queries, adjoint, shard: as given.
        params: copies of theta_0.
        order: int64 [T, B] on the CPU.
        measure: the loss, where none was given.
        seed: of the random numbers, where none was given drawn from torch's default generator.
        measured_dtype: of the queries' losses.
        side_by_side: how many trainings are made at once, once that is known.

    Raises:
        TypeError, ValueError, UnsupportedError: an argument will not do; the message names it.
    """

    def __init__(
        self,
        loss: EachLoss,
        params: Mapping[str, Tensor],
        data: Sequence[Tensor],
        optimizer: Optimizer,
        *,
        order: Tensor,
        queries: Sequence[Tensor],
        measure: EachLoss | None = None,
        adjoint: Adjoint | None = None,
        seed: int | None = None,
        group: dist.ProcessGroup | None = None,
        shard: bool = False,
    ) -> None:
        _check_unrolls(loss=loss, params=params, optimizer=optimizer, adjoint=adjoint, seed=seed)
        if measure is not None and not callable(measure):
            raise TypeError(f"measure must be callable as measure(params, queries), got {type(measure).__name__}")
        self.device = next(iter(params.values())).device
        self.dtype = next(iter(params.values())).dtype
        self.data = examples("data", data, self.device)
        self.queries = examples("queries", queries, self.device)
        if measure is None and len(self.queries) != len(self.data):
            raise ValueError(
                f"queries has {len(self.queries)} tensors, but data has {len(self.data)}, and both go to loss; give "
                "queries the same parts, or measure=, which is called as measure(params, queries)"
            )
        self.loss, self.optimizer, self.adjoint = loss, optimizer, adjoint
        self._borrowed, self.shard = None if group is None else Borrowed(group), shard
        self.measure = loss if measure is None else measure
        self._measured_by = "loss" if measure is None else "measure"
        self.params: Params = {name: p.detach().clone() for name, p in params.items()}
        self.order = Minibatches(self.data, order).order
        self.seed = draw_seed() if seed is None else int(seed) % 2**63  # more torch's generators do not take
        self.side_by_side: int | None = None
        self._versions = self._count_changes()
        self._first = self._probe()
        self.measured_dtype = self._first[-1].dtype

    @property
    def on_many_ranks(self) -> bool:
        """Whether there was a group."""
        return self._borrowed is not None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """As given. Raises: RankError where it was destroyed."""
        return None if self._borrowed is None else self._borrowed.get()

    @property
    def examples(self) -> int:
        """n, the number of examples."""
        return len(self.data[0])

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self.order)

    def batches(self, weights: Tensor) -> Minibatches:
        """The steps' weights and examples. weights: [n], or [n, E] for E trainings side by side."""
        return Minibatches((weights, *self.data), self.order)

    def weighted(self, params: Params, batch: Tensors) -> Tensor:
        """A step's loss, from its weights [B] and its examples."""
        weights, *given = batch
        each = check_each(self.loss(params, tuple(given)), len(weights), "loss")
        return (weights * each).sum() / len(weights)

    def train(self, weights: Tensor, params: Mapping[str, Tensor] | None = None, *, progress: bool = False) -> Params:
        """theta_T, differentiable in the weights. weights: [n]; params: theta_0, by default the copies."""
        return unroll(
            self.weighted,
            self.params if params is None else params,
            self.batches(weights),
            self.optimizer,
            steps=self.steps,
            adjoint=self.adjoint,
            seed=self.seed,
            progress=progress,
            group=self.group,
            shard=self.shard,
        )

    def measured(self, theta: Params) -> Tensor:
        """The queries' losses [K] at these parameters, differentiable; random numbers are the same in each call."""
        with seeded(self.seed, self.device):
            return check_each(self.measure(theta, self.queries), len(self.queries[0]), self._measured_by)

    def checked(self, losses: Tensor) -> Tensor:
        """`losses` [K]. Raises: NonFiniteError that names a query whose loss is not finite."""
        values = losses.detach()
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            q = int(bad[0, 0])
            raise NonFiniteError(
                f"the loss of query {q} is {float(values[q])} after the training; look at {self._measured_by} "
                "and at that query, or train with a smaller lr",
                parameter=None,
                step=self.steps,
            )
        return losses

    def confirm(self) -> None:
        """Check that this is still the training that it was.

        Raises:
            UnsupportedError: data or queries were changed in place, or the loss gives other values for the same
                parameters.
        """
        if self._count_changes() != self._versions:
            raise UnsupportedError(
                "data, queries or a tensor of the optimizer were changed in place since this attribution was computed, "
                "so another training would be compared with it; call rd.attribute again, and pass clones of what is to "
                "change"
            )
        for before, now in zip(self._first, self._probe(), strict=True):
            if not torch.allclose(before, now, rtol=_SAME, atol=_SAME):
                raise UnsupportedError(
                    "the loss gives other values than when this attribution was computed, at the same parameters and "
                    "data, so another training would be compared with it; put its module back into the mode (train() "
                    "or eval()) that it was in, or call rd.attribute again"
                )

    def _count_changes(self) -> list[int]:
        held = [t for _, t in leaves(tuple(vars(self.optimizer).values()), "") if isinstance(t, Tensor)]
        return [t._version for t in (*self.data, *self.queries, *held)]

    def _probe(self) -> list[Tensor]:
        """Losses at theta_0, of the first steps' examples and of the queries; wrong shapes are found here, before the
        training.
        """
        found = []
        fewest = int((self.order >= 0).sum(1).argmin())
        with torch.no_grad():
            for k in dict.fromkeys([*range(min(self.steps, _LOOKED_AT)), fewest]):
                chosen = self.order[k][self.order[k] >= 0].to(self.device)
                each = self._losses(k, chosen)
                if len(chosen) > 1 and bool((each == each[0]).all()):
                    self._check_not_one(k, chosen[:2], each[:2])
                found.append(each)
            found.append(self.measured(dict(self.params)).detach().clone())
        return found

    def _losses(self, k: int, chosen: Tensor) -> Tensor:
        """Of some examples at theta_0, with random numbers of a number's own. chosen: int64 [B]."""
        with seeded(self.seed + k, self.device):
            each = self.loss(dict(self.params), tuple(t[chosen] for t in self.data))
        return check_each(each, len(chosen), "loss").detach().clone()

    def _check_not_one(self, k: int, chosen: Tensor, each: Tensor) -> None:
        """Raise ValueError where examples that have one loss together have others alone: a mean, made as long."""
        try:
            alone = torch.cat([self._losses(k, one) for one in chosen[:, None]])
        except Exception:  # a loss that takes no single example
            return
        if not torch.allclose(alone, each, rtol=_SAME, atol=_SAME):
            raise ValueError(
                f"loss returned the same number, {float(each[0]):g}, for all examples of a batch, two of which alone "
                f"have {float(alone[0]):g} and {float(alone[1]):g}: a mean over the batch, it seems; {NOT_REDUCED}"
            )


def _check_unrolls(**given: Any) -> None:
    """Raise what rd.unroll itself says of these arguments, before anything is computed; what it warns of, it will."""
    others = ("hyper", "on_step", "on_step_back", "clip_back", "window", "save_at", "state")
    flags = ("compile", "return_state", "return_stats", "progress")
    batches = {"batches": lambda k: (), "steps": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_arguments({**dict.fromkeys(others), **dict.fromkeys(flags, False), **batches, **given})
    if getattr(given["loss"], "networks", 1) > 1:
        raise UnsupportedError(
            "loss is of rd.stack_modules, which sums over networks and examples; attribute each network by the loss of "
            f"rd.from_module, and {NOT_REDUCED}"
        )
