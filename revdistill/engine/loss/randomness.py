"""torch's random numbers: the generators that code on a device draws from, seeded for a while and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def draw_seed() -> int:
    """Draw a seed from torch's default generator, so that torch.manual_seed repeats what follows.

    Returns:
        An integer from 0 to 2^62 - 1.
    """
    return int(torch.randint(0, 2**62, ()).item())


def generators_of(device: torch.device) -> list[torch.Generator]:
    """torch's generators that code on a device draws from.

    Args:
        device: of the code.

    Returns:
        The CPU's, and on CUDA the device's own.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    return generators


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The context of code that draws the numbers of torch.manual_seed(seed); afterwards the caller's go on.

    Not torch.manual_seed within fork_rng(devices=[]): it seeds the generators of every GPU, and leaves them so.

    Args:
        seed: as of torch.manual_seed.
        device: on which the code draws.
    """
    generators = generators_of(device)
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
