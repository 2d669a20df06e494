"""Gradient clipping as torch.nn.utils.clip_grad_norm_ has it, over all parameters, and its derivative.

    g <- g min(1, max_norm / (|g| + 1e-6))

It comes before everything else that the update does with the gradient, weight decay included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.engine.cotangents import many
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.hyperparameters import Table, Value, above_zero, resolve
from revdistill.engine.optimizers.sources import GRADIENT, Bars

NAME = "max_norm"
_TORCHS = 1e-6  # what clip_grad_norm_ adds to the norm


@dataclass(frozen=True)
class Clipping:
    """table: max_norm, a row per step; with a column per network where networks are stacked, each clipped by its own
    norm; total: makes of the sum of squares [1] of a part of the gradient that of the whole, differentiable; None where
    it is whole.
    """

    table: Table
    total: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, max_norm: Value | None, layout: Layout, steps: int, taken: int) -> Clipping | None:
        """From what the user gave; None where nothing is clipped. Raises: TypeError, ValueError that name it."""
        if max_norm is None:
            return None
        if hasattr(max_norm, "keys"):
            raise TypeError(
                f"{NAME} must be a float or a tensor, got {type(max_norm).__name__}: the norm is of all parameters "
                "together, as in torch.nn.utils.clip_grad_norm_"
            )
        table = resolve(NAME, max_norm, layout, steps, stackable=True, taken=taken)
        if layout.networks > 1 and table.index is None:
            # Each network's training is what it would be alone.
            each = table.values.expand(-1, layout.networks)
            rows = each.expand(steps, -1)
            table = resolve(NAME, rows, layout, steps, stackable=True, taken=taken) if steps else table
        return cls(above_zero(NAME, table))

    def clipped(self, k: int, gradient: Tensor) -> Tensor:
        """What the moves of step k see: [numel], in the gradient's dtype; of the same bits in both directions."""
        return self.value(gradient, self.table.row_of(k, self.table.values.detach()))

    def differentiable(self, k: int, gradient: Tensor) -> Tensor:
        """The same, with a graph to the gradient and to max_norm."""
        return self.value(gradient, self.table.row_of(k, self.table.values))

    def value(self, gradient: Tensor, max_norm: Tensor) -> Tensor:
        """max_norm: float64 [groups]."""
        exact, index = gradient.double(), self.table.index
        squares = exact.square()
        if index is None:
            total = squares.sum().reshape(1)
            total = total if self.total is None else self.total(total)
        else:
            total = torch.zeros_like(max_norm, requires_grad=False).index_add(0, index, squares)
        positive = total > 0  # at 0 the norm has derivative 0, as torch has it
        norm = torch.where(positive, torch.where(positive, total, 1.0).sqrt(), 0.0)
        factor = (max_norm / (norm + _TORCHS)).clamp(max=1.0)
        # What is not finite is passed on as it is, and named by whoever looks for it.
        factor = torch.where(exact.detach().isfinite().all(), factor, 1.0)
        scaled = exact * (factor if index is None else factor[index])
        return scaled.to(gradient.dtype)

    def vjp(self, k: int, gradient: Tensor, bars: Bars) -> None:
        """From dL/d(clipped gradient) in `bars` to dL/d(gradient), and to max_norm. gradient: before clipping."""
        bar = bars.flat[GRADIENT]
        with torch.enable_grad():
            leaf = gradient.detach().requires_grad_()
            row = self.table.row_of(k, self.table.values.detach()).clone().requires_grad_()
            value = self.value(leaf, row)
        back = torch.autograd.grad if bar.ndim == 1 else many
        gradient_bar, row_bar = back(value, [leaf, row], bar.to(value.dtype))
        bar.copy_(gradient_bar)
        if NAME in bars.tables:
            self.table.row_of(k, bars.tables[NAME]).add_(row_bar)
