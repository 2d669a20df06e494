"""What the last steps found, in a ring of static memory: looked at once in a while, as a look waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Notes:
    """Rows of int64, the last of them at the end.

    Args:
        rows: how many are kept.
        width: numbers in each.
        device: where they are.

    Attributes:
        ring: int64 [rows, width].
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.ring = torch.zeros(rows, width, dtype=torch.int64, device=device)

    def write(self, *numbers: Tensor) -> None:
        """Add a row. numbers: 0-dim, integers, or floats, of which the bits of the float64 are kept."""
        words = [t.double().view(torch.int64) if t.is_floating_point() else t for t in numbers]
        self.ring.copy_(torch.cat([self.ring[1:], torch.stack(words)[None]]))

    def last(self, count: int) -> Tensor:
        """The last rows, int64 [count, width]: a view."""
        return self.ring[len(self.ring) - count :]


def as_floats(rows: Tensor) -> Tensor:
    """Of rows of words the floats that they are the bits of: float64 [count, width]."""
    return rows.contiguous().view(torch.float64)
