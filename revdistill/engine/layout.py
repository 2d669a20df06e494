"""All parameters in one flat buffer, with a view per tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in the flat buffer: names and shapes in order; one dtype, one device."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> Layout:
        first = next(iter(params.values()))
        return cls(tuple(params), tuple(p.shape for p in params.values()), first.dtype, first.device)

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
        return torch.cat([params[name].reshape(-1) for name in self.names])

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters as views of `flat` [..., numel], differentiable: one split, whose backward is one
        concatenation.
        """
        leading, parts = flat.shape[:-1], torch.split(flat, self.sizes, -1)
        # A part that has its shape already is no view of itself: each is a node in every graph of the loss.
        return {
            name: part if len(shape) == 1 else part.view(leading + shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def name_at(self, position: int) -> str:
        """The name of the parameter that holds flat[position]."""
        return next(name for name, stop in zip(self.names, self.stops, strict=True) if position < stop)

    def first_nonfinite(self, flat: Tensor) -> str | None:
        """The name of the first parameter with an entry of `flat` that is not finite."""
        bad = (~torch.isfinite(flat)).nonzero()
        return self.name_at(int(bad[0])) if len(bad) else None
