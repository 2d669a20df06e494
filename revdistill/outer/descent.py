"""Adam steps along hypergradients: what the outer loops of distillation and of tuning have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.engine import NonFiniteError, RangeError
from revdistill.engine.loss.determinism import repeatable

MAX_FAILURES = 10


@dataclass(frozen=True)
class Outcome:
    """norm: of the hypergradient before clipping; diverged: why the step changed nothing, or None. NaN where there is
    none.
    """

    loss: float
    norm: float
    diverged: str | None = None


class Descent:
    """leaves: what is learned, in `optimizer`; clip: the largest norm of a hypergradient, 0 for none; advice: what
    avoids failures.

    A step whose inner training left the range or was not finite changes nothing. Errors: that of the tenth such step in
    a row.
    """

    def __init__(self, leaves: list[Tensor], optimizer: torch.optim.Optimizer, clip: float, advice: str) -> None:
        self._leaves, self._optimizer, self._clip, self._advice = leaves, optimizer, clip, advice
        self._failures = 0

    def step(self, outer_loss: Callable[[], Tensor]) -> Outcome:
        """Evaluate, differentiate, and step; with torch's settings of an unroll, so that on a GPU too a run repeats
        itself.
        """
        with repeatable(self._leaves[0].device):
            return self._step(outer_loss)

    def _step(self, outer_loss: Callable[[], Tensor]) -> Outcome:
        self._optimizer.zero_grad(set_to_none=True)
        try:
            loss = outer_loss()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = float(torch.nn.utils.get_total_norm([leaf.grad for leaf in self._leaves if leaf.grad is not None]))
            if not math.isfinite(norm):
                raise NonFiniteError("the hypergradient's norm is not finite", parameter=None, step=0)
        except (RangeError, NonFiniteError) as error:
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                raise type(error)(
                    f"{MAX_FAILURES} outer steps in a row diverged; {self._advice} avoids it. The last: {error}",
                    **error.__dict__,
                ) from error
            return Outcome(math.nan, math.nan, str(error))
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._leaves, self._clip)
        self._optimizer.step()
        self._failures = 0
        return Outcome(loss.item(), norm)
