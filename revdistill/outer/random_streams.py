"""Random numbers as functions of (seed, stream, step): a run that is resumed draws the same ones again."""

from __future__ import annotations

import torch
from torch import Tensor

from revdistill.outer.data import Dataset

# What a number is drawn for, as the second of the numbers that are mixed. They are part of every result: another one
# would give other bits. Distillation and tuning both have a third, which they use for different things.
MINIBATCHES, NETWORKS = 1, 2
FIXED_NETWORK, NOISE, HORIZON, AUGMENTATION = 3, 4, 5, 6  # of distillation
HELD_OUT = 3  # of tuning
EXAMPLES, QUERIES, FLIPS = 7, 8, 9  # of attribution
POOL, POOL_AGE = 11, 12  # of distillation
_PARTS = 10  # of networks that are trained side by side
_EVALUATION = 2**40


def mix(*numbers: int) -> int:
    """One seed from several small numbers."""
    seed = 0
    for n in numbers:
        seed = (seed * 0x9E3779B1 + n + 1) % 2**62
    return seed


def part_seed(seed: int, first: int) -> int:
    """Of the random numbers that some of many networks draw while they train, from the one with the number `first` on.
    Each part has its own.
    """
    return mix(_PARTS, seed, first) if first else seed


def generator(*numbers: int) -> torch.Generator:
    """A generator of the CPU, seeded by the mix of these numbers."""
    return torch.Generator().manual_seed(mix(*numbers))


def evaluation_seed(seed: int) -> int:
    """Far from every seed that training draws with, so that no network evaluated was ever distilled or tuned for."""
    return _EVALUATION + seed


class Minibatches:
    """k -> (x, y): minibatch k of the shuffled epochs of the training data.

    It depends on (*numbers, k) only, not on what was asked for before.

    Args:
        data: its training part is used.
        size: samples in each; at most all of them are taken.
        numbers: the seed, and whatever else the order shall depend on.
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
