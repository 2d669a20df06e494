"""What training changes: theta and the running averages as integers, and the bits that decays took from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.engine.integers.backend import Backend
from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.fixedpoint import Format

THETA = "theta"  # the name of the parameters among the numbers


@dataclass
class State:
    """Everything by the name of what it belongs to: theta, or a running average ("slot").

    numbers: int64 [numel], or [2, numel] of two words; formats: how they stand for floats; stores: the bit stores of
    what decays, one per segment; backend: what does the integer work.
    """

    numbers: dict[str, Tensor]
    formats: dict[str, Format]
    stores: dict[str, list[BitStore]]
    backend: Backend

    def all_stores(self) -> list[BitStore]:
        return [store for stores in self.stores.values() for store in stores]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.numbers.values()) + sum(s.head.nbytes for s in self.all_stores())

    def floats(self, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """theta or a slot as floats, in a new tensor [numel]."""
        q = self.numbers[name]
        out = torch.empty(q.shape[-1], dtype=dtype, device=q.device)
        return self.backend.to_float(q, out, self.formats[name])
