"""Random draws as functions of numbers: the same whatever was drawn before, so that a run that is resumed draws them
again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from revdistill.outer.data import Dataset


def mix(*numbers: int) -> int:
    """One seed from several small numbers."""
    seed = 0
    for n in numbers:
        seed = (seed * 0x9E3779B1 + n + 1) % 2**62
    return seed


def generator(*numbers: int) -> torch.Generator:
    """Of the CPU, seeded by their mix."""
    return torch.Generator().manual_seed(mix(*numbers))


class Batches:
    """k -> (x, y): batch k of the shuffled epochs of the training data, a function of (*numbers, k); an epoch is
    shuffled once.
    """

    def __init__(self, data: Dataset, size: int, *numbers: int) -> None:
        self._data, self._numbers = data, numbers
        self._size = min(size, len(data.x))
        self._per_epoch = len(data.x) // self._size
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, k: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(k, self._per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(len(self._data.x), generator=generator(*self._numbers, epoch))
            self._epoch, self._order = epoch, order.to(self._data.x.device)
        chosen = self._order[position * self._size : (position + 1) * self._size]
        return self._data.x[chosen], self._data.y[chosen]
