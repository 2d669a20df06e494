"""A flat buffer in parts, one for each rank, and the way between part and whole.

Theta, slots, bit stores and bars are elementwise in every move, so a rank that keeps a part of each steps it forward
and back alone. Whole are only theta as floats, from which the loss is computed, and the loss's gradient (Rajbhandari et
al. 2020, ZeRO, stage 2 for the gradient, 1 for the state).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.start import Start
from revdistill.engine.ranks.group import AT_ONCE, Ranks, summed


class Shards:
    """Of parameters that all ranks have, the part that each keeps: neighbours in the flat buffer, as many for each rank
    but the last.

    Args:
        ranks: that share them.
        layout: of all parameters.

    Attributes:
        all: the layout of all parameters.
        layout: of this rank's part: the same names, and of each parameter as many numbers as lie in the part.

    Raises:
        ValueError: there are too few numbers.
    """

    def __init__(self, ranks: Ranks, layout: Layout) -> None:
        least = ranks.size * (ranks.size - 1)
        if layout.numel <= least:
            raise ValueError(
                f"shard=True with {ranks.size} ranks needs more than {least} parameters, got {layout.numel}; leave it "
                "out, as there is no memory to be saved"
            )
        self.all, self.ranks, self.numel, self.each = layout, ranks, layout.numel, -(-layout.numel // ranks.size)
        self.first = ranks.rank * self.each
        self.last = min(self.first + self.each, self.numel)
        inside = [
            max(0, min(stop, self.last) - max(stop - size, self.first))
            for size, stop in zip(layout.sizes, layout.stops, strict=True)
        ]
        self.layout = Layout(layout.names, tuple(torch.Size([n]) for n in inside), layout.dtype, layout.device)

    def joined(self, own: Tensor, point: str, k: int = -1) -> Tensor:
        """[..., numel] of every rank's [..., n], detached: a meeting, and an exchange."""
        self.ranks.meet(point, k)
        rows = own.detach().reshape(-1, own.shape[-1])
        if rows.shape[1] < self.each:
            rows = torch.cat([rows, rows.new_zeros(len(rows), self.each - rows.shape[1])], 1)
        found = self.ranks.gather(rows.reshape(-1))
        if len(rows) > 1:
            found = found.view(self.ranks.size, len(rows), self.each).transpose(0, 1).reshape(len(rows), -1)
        return found.view(len(rows), -1)[:, : self.numel].view(*own.shape[:-1], self.numel)

    def summed_in_order(self, whole: Tensor) -> Tensor:
        """This rank's part [..., n] of the sum over ranks of [..., numel]. The ranks have met."""
        return self.reduced(whole, lambda sent: summed(self.ranks.to_each(sent)))

    def reduced(self, whole: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """This rank's part of what is made of all ranks' tensors.

        Args:
            whole: [..., numel].
            reduce: of a tensor [ranks, m], a row for each rank's part, makes this one's [m]; called for few numbers at
                a time, as often on all ranks.

        Returns:
            [..., n]
        """
        rows = whole.detach().reshape(-1, self.numel)
        out = whole.new_empty(len(rows), self.each)
        width = max(1, AT_ONCE // (self.ranks.size * len(rows)))
        for a in range(0, self.each, width):
            b = min(a + width, self.each)
            sent = rows.new_zeros(self.ranks.size, len(rows), b - a)
            for rank in range(self.ranks.size):
                piece = rows[:, rank * self.each + a : rank * self.each + b]  # the last one's may end before
                sent[rank, :, : piece.shape[1]] = piece
            out[:, a:b] = reduce(sent.view(self.ranks.size, -1)).view(len(rows), b - a)
        return out[:, : self.last - self.first].reshape(*whole.shape[:-1], -1)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor [..., numel], in new memory."""
        return whole.detach()[..., self.first : self.last].clone()

    def start(self, start: Start) -> Start:
        """This rank's part of the slots."""
        return Start(start.taken, {name: self.cut(flat) for name, flat in start.slots.items()})

    def total(self, part: Tensor) -> Tensor:
        """The sum over ranks of what each found of its part, float64 [1]; differentiable any number of times."""
        found: Tensor = _Total.apply(self.ranks, part)  # type: ignore[no-untyped-call]
        return found


class _Total(torch.autograd.Function):
    """The sum over ranks, of which all have the same: so is dL/d(a rank's part), as each rank knows its own only."""

    @staticmethod
    def forward(ranks: Ranks, part: Tensor) -> Tensor:
        ranks.meet("a norm")
        return ranks.sum_in_order(part.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.ranks = inputs[0]

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[None, Tensor]:
        return None, _Total.apply(ctx.ranks, bar)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], ranks: Ranks, part: Tensor) -> tuple[Tensor, int]:
        found: Tensor = _Total.apply(ranks, part.movedim(in_dims[1], 0))  # type: ignore[no-untyped-call]
        return found, 0
