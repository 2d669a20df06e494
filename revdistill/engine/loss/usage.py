"""Parameters that the loss does not use: torch.optim leaves those without a gradient as they are.

Here a missing gradient is 0, and what is 0 at every step leaves the running averages at 0. Two things would tell the
difference: a penalty, which pulls at a parameter whatever its gradient is, and an average that is not 0. So the unroll
spares parameters that are unused at its first step every penalty (`UnusedParametersError`), and what is used at some
steps only is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revdistill.engine.errors import UnsupportedError


class UnusedParametersError(Exception):
    """These parameters have no gradient at the first step, and the update has a penalty for them: caught, and the
    unroll begins again.

    Args:
        names: of the parameters.
    """

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(f"unused: {sorted(names)}")
        self.names = names


class Usage:
    """Which parameters have a gradient; the same at every step.

    Args:
        names: of the parameters, in the order of the flat buffer.
        penalised: those that the update changes even where their gradients are 0 at every step.
        moving: those whose running averages are not 0 at the start.
        taken: steps of the training before the first one here, for messages.
        indifferent: whether a gradient of 0 changes nothing, whatever came before: then it may be missing anywhere.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        penalised: frozenset[str] = frozenset(),
        moving: frozenset[str] = frozenset(),
        taken: int = 0,
        indifferent: bool = False,
    ) -> None:
        self._names, self._penalised, self._moving = names, penalised, moving
        self._taken, self._indifferent = taken, indifferent
        self._first: int | None = None
        self._unused: frozenset[str] = frozenset()

    def gradient(self, k: int, loss: Tensor, parts: Sequence[Tensor], *, create_graph: bool = True) -> Tensor:
        """The loss's gradient, 0 where it is missing.

        Args:
            k: the step.
            loss: 0-dim.
            parts: the parameters that it was computed from, [n] each.
            create_graph: whether the gradient is to be differentiable.

        Returns:
            [numel]

        Raises:
            ValueError: at the first step, where no parameter has a gradient.
            UnusedParametersError: at the first step, where a penalised parameter has no gradient.
            UnsupportedError: a parameter has a gradient at some steps only.
        """
        found: Sequence[Tensor | None] = [None] * len(parts)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, parts, create_graph=create_graph, allow_unused=True)
        missing = [name for name, g in zip(self._names, found, strict=True) if g is None]
        if self._first is None:
            self._begin(k, frozenset(missing))
        elif (missing or self._unused) and not self._indifferent and self._unused.symmetric_difference(missing):
            self._refuse(k, self._unused.symmetric_difference(missing))
        return torch.cat([torch.zeros_like(part) if g is None else g for g, part in zip(found, parts, strict=True)])

    def _begin(self, k: int, unused: frozenset[str]) -> None:
        if len(unused) == len(self._names):
            raise ValueError(
                "the loss does not depend on params: loss(params, batch) must be computed from its first argument"
            )
        if unused & self._moving:
            name = min(unused & self._moving)
            raise UnsupportedError(
                f"the loss gives params[{name!r}] no gradient at step {k + self._taken}, but the state that came in "
                "has a running average for it that is not 0. torch.optim leaves a parameter without a gradient as "
                f"it is; here the average would move it. Add 0 * params[{name!r}].sum() to the loss if that is what "
                "you want, or set its averages to 0"
            )
        if unused & self._penalised:
            raise UnusedParametersError(unused)
        self._first, self._unused = k, unused

    def _refuse(self, k: int, changed: frozenset[str]) -> None:
        name = min(changed)
        here, there = ("a", "no") if name in self._unused else ("no", "a")
        raise UnsupportedError(
            f"the loss gives params[{name!r}] {here} gradient at step {k + self._taken} and {there} gradient at step "
            f"{(self._first or 0) + self._taken}. "
            "torch.optim leaves a parameter without a gradient as it is in that step, its running averages included; "
            "a step that does so has no way back here. Make the gradient 0 where it is missing, which averages and "
            f"penalties take for what it is: add 0 * params[{name!r}].sum() to the loss"
        )
