"""Batches that are rows of a data set: which ones each step takes is a table of row numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.loss.batches import is_table
from revdistill.engine.loss.tree import check_form, leaves
from revdistill.engine.showing import Shown
from revdistill.engine.tensors import check_tensor

_DATA, _ORDER = "Minibatches: data", "Minibatches: order"


@dataclass(frozen=True, eq=False, repr=False)
class Minibatches(Shown):
    """Batches for `rd.unroll`: step k gets the examples of a data set that a row of `order` names.

    `rd.unroll(loss, params, rd.Minibatches((x, y), torch.tensor([[2, 0, 1], [3, 4, -1]])), optimizer, steps=2)` takes
    the batch `(x[[2, 0, 1]], y[[2, 0, 1]])`, and then the last two examples.

    Step k gets `tuple(t[order[k % T]] for t in data)`, without the entries of -1: in the form of `data`, as a tuple
    would give it. Gradients flow to the tensors of `data` that require grad: [n, ...], summed over the steps and over
    what a batch has twice. Where each batch has different examples, they have the same bits every time, on any device;
    where one has an example twice, torch adds up on CUDA in any order, unless
    `torch.use_deterministic_algorithms(True)` is set. (So does `rd.Backprop`.)

    Cost: what is gathered at each step, on the way back once more; in memory one batch, a gradient [n, ...] of each
    tensor that requires grad, and `order` itself. No step does work that grows with n, save with `rd.Backprop`, where
    torch makes a gradient [n, ...] for each step.

    Args:
        data: a tuple (or dict) of tensors [n, ...], the n examples.
        order: int64 [T, B], the examples of each step's batch, from 0 to n - 1; -1 at the end of a row is no example,
            for batches that are smaller. Each row has at least one example, and may have one twice. On the CPU or where
            data are; it is copied.

    Raises:
        TypeError, ValueError, UnsupportedError: data or order is none of these.
    """

    data: Sequence[Tensor] | Mapping[str, Tensor]
    order: Tensor

    def __post_init__(self) -> None:
        n, device = self._check_data()
        _check_order(self.order, n, device)
        object.__setattr__(self, "order", self.order.clone())
        object.__setattr__(self, "_checked", (n, self.order._version))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what comes out of a pickle, is made and checked anew."""
        return type(self), (self.data, self.order)

    def check(self) -> None:
        """Check again what may have changed since. Raises: as the class does."""
        n, _ = self._check_data()
        if (n, self.order._version) != self._checked:  # type: ignore[attr-defined]
            raise ValueError("Minibatches: data or order was changed after it was made; make another rd.Minibatches")

    def _check_data(self) -> tuple[int, torch.device]:
        """n, and where the data are."""
        data: Any = self.data
        if isinstance(data, (tuple, list, Mapping)) and not data:
            raise ValueError(f"{_DATA} is empty; it must hold at least one tensor [n, ...]")
        if not is_table(data):
            what = f" of shape {list(data.shape)}; put it in a tuple: (t,)" if isinstance(data, Tensor) else ""
            if isinstance(data, (tuple, list, Mapping)):
                entries = data.values() if isinstance(data, Mapping) else data
                what = f" with a {next(type(t).__name__ for t in entries if not isinstance(t, Tensor))} in it"
            raise TypeError(f"{_DATA} must be a tuple (or dict) of tensors [n, ...], got {type(data).__name__}{what}")
        check_form(data, _DATA)
        (first_label, first), *_ = named = list(leaves(data, _DATA))
        for label, t in named:
            check_tensor(label, t)
            if not t.ndim or not len(t):
                raise ValueError(
                    f"{label} has shape {list(t.shape)}; its first dimension must be the number of examples, at least 1"
                )
            if len(t) != len(first):
                raise ValueError(
                    f"{label} holds {len(t)} examples (its first dimension), but {first_label} holds {len(first)}"
                )
            if t.device != first.device:
                raise ValueError(f"{label} is on {t.device}, but {first_label} is on {first.device}; all must be there")
        return len(first), first.device


def _check_order(order: Tensor, n: int, device: torch.device) -> None:
    check_tensor(_ORDER, order)
    if order.dtype != torch.int64:
        raise TypeError(f"{_ORDER} has dtype {order.dtype}; accepted is torch.int64: the numbers of examples")
    if order.ndim != 2 or not order.numel():
        raise ValueError(
            f"{_ORDER} has shape {list(order.shape)}; accepted is [T, B]: a row for each step, with the numbers of the "
            "examples in its batch, at least 1"
        )
    if order.device not in (device, torch.device("cpu")):
        raise ValueError(
            f"{_ORDER} is on {order.device}, but data are on {device}; leave it on the CPU, or move it with "
            f".to({str(device)!r})"
        )
    order = order.cpu()
    wrong = (order < -1) | (order >= n)
    if wrong.any():
        k, i = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{_ORDER}[{k}, {i}] is {int(order[k, i])}; accepted are 0 to {n - 1}, because data hold {n} examples, and "
            "-1 at the end of a row"
        )
    absent = order < 0
    if absent[:, 0].any():
        k = int(absent[:, 0].nonzero()[0])
        raise ValueError(
            f"{_ORDER}[{k}] begins with -1; each row must have at least one example, and -1 at its end only"
        )
    late = absent[:, :-1] & ~absent[:, 1:]
    if late.any():
        k, i = late.nonzero()[0].tolist()
        raise ValueError(
            f"{_ORDER}[{k}, {i}] is -1, but an example comes after it; -1 is accepted at the end of a row only"
        )


class Indices:
    """The order of one unroll, where its data are.

    Args:
        minibatches: whose order it is.
        device: of the data.
    """

    def __init__(self, minibatches: Minibatches, device: torch.device) -> None:
        order = minibatches.order.cpu()
        # A copy: a change of the other one must not reach the way back.
        self._order = minibatches.order.to(device, copy=True)
        self._lengths: list[int] = (order >= 0).sum(1).tolist()
        in_order = order.sort(1).values
        repeats = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
        self._repeats: list[bool] = repeats.any(1).tolist()

    def __len__(self) -> int:
        """T."""
        return len(self._lengths)

    def __getitem__(self, row: int) -> Tensor:
        """The numbers of the examples in this row of the order, int64 [B] or fewer."""
        return self._order[row, : self._lengths[row]]

    def add_to(self, bar: Tensor, row: int, product: Tensor, dim: int) -> None:
        """Add what is of a batch to what is of the data.

        Args:
            bar: [n, ...], changed in place; [K, n, ...] where dim is 1.
            row: of the order.
            product: [B, ...], or [K, B, ...].
            dim: the dimension that counts examples.
        """
        index = self[row]
        if self._repeats[row]:
            bar.index_add_(dim, index, product)
        else:  # in no order, so that on any device the bits are the same every time
            bar.index_copy_(dim, index, bar.index_select(dim, index).add_(product))


class Gathered:
    """Batches gathered from tensors [n, ...], each in memory of its own."""

    def __init__(self, indices: Indices, tensors: Sequence[Tensor]) -> None:
        self._indices, self._tensors = indices, tensors

    def batch(self, row: int) -> tuple[Tensor, ...]:
        """The examples in this row of the order."""
        index = self._indices[row]
        return tuple(t.index_select(0, index) for t in self._tensors)
