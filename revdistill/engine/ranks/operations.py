"""Exchanges inside a loss, each with its derivative, which is an exchange again: any number of times differentiable.

    copy     x -> x                        back: the sum over ranks
    total    x -> the sum over ranks       back: the identity
    gather   x -> every rank's x           back: this rank's rows of the sum over ranks

`copy` and `total` are each other's derivative (Shoeybi et al. 2019, Megatron-LM, f and g), and `gather` is that of
`rows`. torch's own all_reduce is none of these: autograd does not see it.

What is copied must be the same on all ranks, and so must be what the derivative of a sum is given: it is copied too.
That is looked at, outside of unrolls always, and within at the first evaluation of steps 0, 1, 2, 4, 8 and so on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.integers.fingerprint import fingerprint_of
from revdistill.engine.loss.evaluation import Modules, evaluating
from revdistill.engine.loss.originals import NO_GROUP
from revdistill.engine.ranks.group import Ranks
from revdistill.engine.ranks.paths import Paired, check_paths
from revdistill.engine.ranks.same import ROUNDING, difference, halves, others

POINT = "an exchange inside the loss"


@dataclass(frozen=True, eq=False)
class Place:
    """Where an exchange is made.

    Attributes:
        ranks: that make it.
        unroll: whose loss calls for it, None outside.
    """

    ranks: Ranks
    unroll: Modules | None

    @property
    def compares(self) -> bool:
        """Whether it is looked at here that ranks have the same: at the same steps on all of them."""
        unroll = self.unroll
        return unroll is None or (unroll.first_visit and not unroll.step & (unroll.step - 1))


def place_of(x: Any, group: dist.ProcessGroup | None, name: str) -> Place:
    """The place where a tensor is exchanged, which is looked at.

    Args:
        x: the tensor.
        group: of torch.distributed; None for the one of all processes.
        name: of the operation, for messages.

    Raises:
        TypeError: x is no tensor of float32 or float64, or group no group.
        ValueError: there is no group of all processes.
        UnsupportedError: within the loss of an unroll without a group.
    """
    unroll = evaluating()
    if unroll is not None and not unroll.grouped:
        raise UnsupportedError(NO_GROUP.format(f"rd.distributed.{name}"))
    if not isinstance(x, Tensor):
        raise TypeError(f"rd.distributed.{name} takes a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rd.distributed.{name} takes float32 and float64, got {x.dtype}")
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"rd.distributed.{name} needs the processes of a group: call "
                "torch.distributed.init_process_group first, and start the script by torchrun"
            )
        group = dist.group.WORLD
    if unroll is not None:
        unroll.check_exchanges = check_paths
    return Place(Ranks.of(group, x.device), unroll)


def _meet(ranks: Ranks, name: str, x: Tensor, *numbers: float) -> Tensor:
    """The ranks meet first: one that has failed before says so there.

    Returns:
        float64 [ranks, ...]: the numbers of each, and 0 for what is left of a meeting's.

    Raises:
        ValueError: the ranks do not exchange the same: another operation, shape or dtype.
    """
    text = f"rd.distributed.{name} of {list(x.shape)}, {x.dtype}"
    told = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")  # float64 holds it
    rows = ranks.meet(POINT, -1, float(told), *numbers)
    found = others(rows[:, :1])
    if found:
        texts = ranks.texts(text)
        raise ranks.for_all(
            ValueError(
                "what rd.distributed exchanges must be the same operation, of one shape and dtype, on all ranks, got "
                f"{texts[0]} on rank 0 and {texts[found[0]]} on rank {found[0]}"
            )
        )
    return rows[:, 1:]


def _compare(ranks: Ranks, x: Tensor) -> None:
    """Check that x is the same on all ranks, up to rounding. What is not finite is for others to tell.

    Raises:
        UnsupportedError: it is not.
    """
    if not others(_meet(ranks, "copy", x, *halves(fingerprint_of(x)))):
        return
    worst = ranks.meet(POINT, -1, difference(x.reshape(-1), ranks.first(x).view(-1)))[:, 0]
    apart = (worst > ROUNDING[x.dtype]).nonzero().flatten().tolist()
    if apart:
        raise ranks.for_all(
            UnsupportedError(
                f"rd.distributed.copy was given what is not the same on ranks 0 and {apart[0]} (shape "
                f"{list(x.shape)}, relative difference {float(worst[apart[0]]):.1e}), or what each of them computes "
                "from rd.distributed.sum is not: derivatives would be wrong. What each rank uses in its own way is "
                "to be rd.distributed.copy(rd.distributed.sum(x)), or rd.distributed.gather(x)"
            )
        )


class Copy(Paired):
    """place, x [...] -> x [...]"""

    more = -1

    @staticmethod
    def forward(place: Place, x: Tensor) -> Tensor:
        if place.compares:
            _compare(place.ranks, x.detach())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[None, Tensor]:
        return None, Total.apply(ctx.place, bar)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], place: Place, x: Tensor) -> tuple[Tensor, Any]:
        return Copy.apply(place, x), in_dims[1]  # type: ignore[no-untyped-call]


class Total(Paired):
    """place, x [...] -> the sum over ranks [...]"""

    more = 1

    @staticmethod
    def forward(place: Place, x: Tensor) -> Tensor:
        _meet(place.ranks, "sum", x)
        return place.ranks.sum_in_order(x.detach())

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[None, Tensor]:
        return None, Copy.apply(ctx.place, bar)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], place: Place, x: Tensor) -> tuple[Tensor, Any]:
        return Total.apply(place, x), in_dims[1]  # type: ignore[no-untyped-call]


class Gather(torch.autograd.Function):
    """place, dim, x [..., n, ...] -> [..., ranks n, ...], along dim"""

    @staticmethod
    def forward(place: Place, dim: int, x: Tensor) -> Tensor:
        _meet(place.ranks, "gather", x)
        rows = place.ranks.gather(x.detach().contiguous().view(-1))
        return torch.cat([row.view(x.shape) for row in rows], dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.place, ctx.dim, _ = inputs

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[None, None, Tensor]:
        return None, None, Rows.apply(ctx.place, ctx.dim, bar)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], place: Place, dim: int, x: Tensor) -> tuple[Tensor, int]:
        return Gather.apply(place, dim + 1, x.movedim(in_dims[2], 0)), 0  # type: ignore[no-untyped-call]


class Rows(torch.autograd.Function):
    """place, dim, x [..., ranks n, ...] -> this rank's [..., n, ...] of the sum over ranks, along dim"""

    @staticmethod
    def forward(place: Place, dim: int, x: Tensor) -> Tensor:
        _meet(place.ranks, "gather, back,", x)
        whole = place.ranks.sum_in_order(x.detach())
        return whole.chunk(place.ranks.size, dim)[place.ranks.rank].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.place, ctx.dim, _ = inputs

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[None, None, Tensor]:
        return None, None, Gather.apply(ctx.place, ctx.dim, bar)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], place: Place, dim: int, x: Tensor) -> tuple[Tensor, int]:
        return Rows.apply(place, dim + 1, x.movedim(in_dims[2], 0)), 0  # type: ignore[no-untyped-call]
