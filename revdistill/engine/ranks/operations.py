"""Exchanges inside a loss, each with its derivative, which is an exchange again: any number of times differentiable.

    copy     x -> x                        back: the sum over ranks
    total    x -> the sum over ranks       back: the identity
    gather   x -> every rank's x           back: this rank's rows of the sum over ranks

`copy` and `total` are each other's derivative (Shoeybi et al. 2019, Megatron-LM, f and g), and `gather` is that of
`rows`. torch's own all_reduce is none of these: autograd does not see it.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.evaluation import evaluating
from revdistill.engine.loss.originals import NO_GROUP
from revdistill.engine.ranks.group import Ranks
from revdistill.engine.ranks.same import others

POINT = "an exchange inside the loss"


def ranks_for(x: Any, group: dist.ProcessGroup | None, name: str) -> Ranks:
    """The ranks that exchange a tensor, which is looked at.

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
    return Ranks.of(group, x.device)


def _meet(ranks: Ranks, name: str, x: Tensor) -> None:
    """The ranks meet first: one that has failed before says so there.

    Raises:
        ValueError: the ranks do not exchange the same: another operation, shape or dtype.
    """
    text = f"rd.distributed.{name} of {list(x.shape)}, {x.dtype}"
    told = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")  # float64 holds it
    found = others(ranks.meet(POINT, -1, float(told)))
    if found:
        texts = ranks.texts(text)
        raise ranks.for_all(
            ValueError(
                "what rd.distributed exchanges must be the same operation, of one shape and dtype, on all ranks, got "
                f"{texts[0]} on rank 0 and {texts[found[0]]} on rank {found[0]}"
            )
        )


class _Linear(torch.autograd.Function):
    """What these have in common: linear, so that nothing is kept but the ranks, and that vmap's rows go along."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.ranks = inputs[0]


class Copy(_Linear):
    """ranks, x [...] -> x [...]"""

    @staticmethod
    def forward(ranks: Ranks, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[None, Tensor]:
        return None, Total.apply(ctx.ranks, bar)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], ranks: Ranks, x: Tensor) -> tuple[Tensor, Any]:
        return Copy.apply(ranks, x), in_dims[1]  # type: ignore[no-untyped-call]


class Total(_Linear):
    """ranks, x [...] -> the sum over ranks [...]"""

    @staticmethod
    def forward(ranks: Ranks, x: Tensor) -> Tensor:
        _meet(ranks, "sum", x)
        return ranks.sum_in_order(x.detach())

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[None, Tensor]:
        return None, Copy.apply(ctx.ranks, bar)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], ranks: Ranks, x: Tensor) -> tuple[Tensor, Any]:
        return Total.apply(ranks, x), in_dims[1]  # type: ignore[no-untyped-call]


class Gather(torch.autograd.Function):
    """ranks, dim, x [..., n, ...] -> [..., ranks n, ...], along dim"""

    @staticmethod
    def forward(ranks: Ranks, dim: int, x: Tensor) -> Tensor:
        _meet(ranks, "gather", x)
        rows = ranks.gather(x.detach().contiguous().view(-1))
        return torch.cat([row.view(x.shape) for row in rows], dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.ranks, ctx.dim, _ = inputs

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[None, None, Tensor]:
        return None, None, Rows.apply(ctx.ranks, ctx.dim, bar)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], ranks: Ranks, dim: int, x: Tensor) -> tuple[Tensor, int]:
        return Gather.apply(ranks, dim + 1, x.movedim(in_dims[2], 0)), 0  # type: ignore[no-untyped-call]


class Rows(torch.autograd.Function):
    """ranks, dim, x [..., ranks n, ...] -> this rank's [..., n, ...] of the sum over ranks, along dim"""

    @staticmethod
    def forward(ranks: Ranks, dim: int, x: Tensor) -> Tensor:
        _meet(ranks, "gather, back,", x)
        whole = ranks.sum_in_order(x.detach())
        return whole.chunk(ranks.size, dim)[ranks.rank].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.ranks, ctx.dim, _ = inputs

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[None, None, Tensor]:
        return None, None, Gather.apply(ctx.ranks, ctx.dim, bar)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], ranks: Ranks, dim: int, x: Tensor) -> tuple[Tensor, int]:
        return Rows.apply(ranks, dim + 1, x.movedim(in_dims[2], 0)), 0  # type: ignore[no-untyped-call]
