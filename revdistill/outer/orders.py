"""Which examples each training step takes: epochs of shuffled minibatches as one table of indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revdistill.engine.scalars import is_integer
from revdistill.outer.random_streams import mix

NONE = -1  # in the place of an example, where a batch has fewer than the others


def epochs(n: int, batch_size: int, epochs: int, seed: int = 0) -> Tensor:
    """The order in which epochs of shuffled minibatches take the examples: a fresh permutation for each epoch.

    The epochs of a shorter training are the first ones of a longer one with the same seed.

    Args:
        n: examples, at least 1.
        batch_size: B, examples of a step, at least 1; the last step of an epoch takes what is left of it.
        epochs: at least 1.
        seed: of the permutations, at least 0.

    Returns:
        int64 [T, B] on the CPU, T = epochs ceil(n / B): row k holds the numbers of the examples of step k, and -1 at
        its end where they are fewer than B. B is at most n.

    Raises:
        TypeError, ValueError: an argument is no int, or too small; the message names it.
    """
    least: dict[str, tuple[Any, int]] = {
        "n": (n, 1),
        "batch_size": (batch_size, 1),
        "epochs": (epochs, 1),
        "seed": (seed, 0),
    }
    for name, (value, smallest) in least.items():
        if not is_integer(value):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")
    n, size = int(n), min(int(batch_size), int(n))
    steps = -(-n // size)
    order = torch.full((int(epochs), steps * size), NONE)
    for epoch, row in enumerate(order):
        generator = torch.Generator().manual_seed(mix(int(seed), epoch))
        row[:n] = torch.randperm(n, generator=generator)
    return order.view(-1, size)
