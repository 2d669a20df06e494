"""A bar for long unrolls, forward and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

_SECONDS = 0.5  # between two looks at the figure: on a GPU each waits for the device


class Bar:
    """A bar on stderr; nothing where that is no terminal.

    Args:
        shown: whether there is one at all.
        steps: that fill it.
        label: before it.
        figure: the name of the number after it.
    """

    def __init__(self, shown: bool, steps: int, label: str, figure: str) -> None:
        self._bar: Any = None
        self._figure, self._next_look = figure, 0.0
        if shown:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, desc=label, unit="step", disable=None)

    def step(self, figure: Callable[[], Tensor]) -> None:
        """One step is done. figure: gives the number after the bar, and is asked a few times a second at most."""
        if self._bar is None:
            return
        now = time.monotonic()
        if now >= self._next_look and not self._bar.disable:
            self._next_look = now + _SECONDS
            self._bar.set_postfix_str(f"{self._figure} {float(figure()):.4g}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """The bar stays as it is."""
        if self._bar is not None:
            self._bar.close()
