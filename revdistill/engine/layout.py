"""All parameters in one flat buffer, with a view per tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

# The dimensions of a tensor, from the one of the largest stride on; None for a contiguous one, and one with gaps.
Order = tuple[int, ...] | None


def order_of(t: Tensor) -> Order:
    """The order of a tensor's dimensions in memory; None where it is their own, or its numbers do not lie together."""
    if t.is_contiguous():
        return None
    order = tuple(sorted(range(t.ndim), key=t.stride, reverse=True))
    return order if t.permute(order).is_contiguous() else None


def permuted_back(t: Tensor, order: tuple[int, ...]) -> Tensor:
    """The view [..., *shape] of t, whose last dimensions are `shape` in this order."""
    first = t.ndim - len(order)
    return t.permute(*range(first), *(first + order.index(dim) for dim in range(len(order))))


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in the flat buffer: names and shapes in order; one dtype, one device.

    networks: how many are stacked along the parameters' first dimension. orders: of each parameter the order of its
    dimensions in memory, where that is not their own: what the loss is given has the strides of what the user gave.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device
    networks: int = 1
    orders: tuple[Order, ...] = ()

    @classmethod
    def of(cls, params: Mapping[str, Tensor], networks: int = 1) -> Layout:
        first = next(iter(params.values()))
        orders = tuple(map(order_of, params.values()))
        if networks > 1:  # each network's numbers lie together
            orders = tuple(order if order is None or order[0] == 0 else None for order in orders)
        shapes = tuple(p.shape for p in params.values())
        return cls(tuple(params), shapes, first.dtype, first.device, networks, orders if any(orders) else ())

    @cached_property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    @cached_property
    def stops(self) -> list[int]:
        return list(accumulate(self.sizes))

    @property
    def numel(self) -> int:
        return sum(self.sizes)

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """[numel], differentiable."""
        return torch.cat([self.flat(i, params[name]) for i, name in enumerate(self.names)])

    def flat(self, i: int, t: Tensor) -> Tensor:
        """[n], in the order of the buffer. t: of the shape of parameter i."""
        order = self.orders[i] if self.orders else None
        return (t if order is None else t.permute(order)).reshape(-1)

    def parts_and_views(self, flat: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The parts [..., n] of `flat` [..., numel], one for each parameter, and the parameters as views of them.

        Differentiable; one split.
        """
        parts: tuple[Tensor, ...] = torch.split(flat, self.sizes, -1)
        # A part that has its shape already is no view of itself: each is a node in every graph of the loss.
        views = {
            name: part if len(shape) == 1 else part.view(part.shape[:-1] + shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }
        for name, part, shape, order in zip(self.names, parts, self.shapes, self.orders, strict=False):
            if order is not None:
                in_memory = part.view(part.shape[:-1] + torch.Size(shape[dim] for dim in order))
                views[name] = permuted_back(in_memory, order)
        return parts, views

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters as views of `flat` [..., numel], differentiable."""
        return self.parts_and_views(flat)[1]

    def owned(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters as tensors with memory of their own: what is saved of one is not all of them."""
        return {name: view.clone() for name, view in self.views(flat).items()}

    def nonzero(self, flat: Tensor) -> list[str]:
        """The names of the parameters with an entry of `flat` [numel] that is not 0."""
        parts = torch.split(flat, self.sizes)
        return [name for name, part in zip(self.names, parts, strict=True) if bool(part.any())]

    def name_at(self, position: int) -> str:
        """The name of the parameter that holds flat[position]."""
        return next(name for name, stop in zip(self.names, self.stops, strict=True) if position < stop)

    def first_nonfinite(self, flat: Tensor) -> str | None:
        """The name of the first parameter with an entry of `flat` [..., numel] that is not finite."""
        bad = (~torch.isfinite(flat)).nonzero()
        return self.name_at(int(bad[0, -1])) if len(bad) else None


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape side by side.

    Args:
        tensors: [...] each.

    Returns:
        [E, ...], each with the strides that it had.
    """
    order = order_of(tensors[0])
    if order is None:
        return torch.stack(list(tensors))
    return permuted_back(torch.stack([t.permute(order) for t in tensors]), order)
