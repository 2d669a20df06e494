"""Which of two ways to compute the same thing is faster, found by running both."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

REPETITIONS = 5
ENOUGH = 1.0  # seconds, after which no repetition is begun: where one takes long, one tells


def best_times(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> tuple[float, float]:
    """The time that each of two calls takes: the best of a few repetitions, in turns, after one that is not timed.

    Args:
        first: returns the tensor whose values are waited for where they come from another device than the CPU.
        second: likewise.

    Returns:
        The best times of both, in seconds.
    """
    for call in (first, second):
        _wait(call())
    best = [float("inf"), float("inf")]
    begin = time.perf_counter()
    for _ in range(REPETITIONS):
        for i, call in enumerate((first, second)):
            start = time.perf_counter()
            _wait(call())
            best[i] = min(best[i], time.perf_counter() - start)
        if time.perf_counter() - begin > ENOUGH:
            break
    return best[0], best[1]


def _wait(result: Tensor) -> None:
    """Until `result` is computed: a device computes in order."""
    result.reshape(-1)[:1].cpu()
