"""Parameters that the loss does not use: torch.optim leaves those without a gradient as they are.

Here a missing gradient is 0, and what is 0 at every step leaves the running averages at 0. Two things would tell the
difference: a penalty, which pulls at a parameter whatever its gradient is, and an average that is not 0. So the unroll
spares parameters that are unused at its first step every penalty (`UnusedParametersError`), and what is used at some
steps only is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.integers.passes import INTERVAL
from revdistill.engine.layout import Layout


class UnusedParametersError(Exception):
    """Parameters have no gradient at the first step, and the update has a penalty for them: caught, and the unroll
    begins again, with the same evaluation of the first step. To call the loss twice would move whatever counts its
    calls.

    Args:
        names: of the parameters.
        evaluation: of the first step, as the adjoint that made it knows to take it up again.
    """

    def __init__(self, names: frozenset[str], evaluation: Any) -> None:
        super().__init__(f"unused: {sorted(names)}")
        self.names, self.evaluation = names, evaluation


class Usage:
    """Which parameters have a gradient; the same at every step.

    Args:
        names: of the parameters, in the order of the flat buffer.
        penalised: those for which a missing gradient is another thing than one of 0 at every step: the update changes
            them, or their averages require grad.
        moving: those whose running averages are not 0 at the start.
        rested: those that had no gradient in the training so far, which the steps before count for as for the others.
        taken: steps of the training before the first one here, for messages.
        indifferent: whether a gradient of 0 changes nothing, whatever came before: then it may be missing anywhere.

    Attributes:
        unused: the parameters without a gradient at the first step.
        to_spare: whether the update would change some of them: then an UnusedParametersError is to be raised.
        taken: as given.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        penalised: frozenset[str] = frozenset(),
        moving: frozenset[str] = frozenset(),
        rested: frozenset[str] = frozenset(),
        taken: int = 0,
        indifferent: bool = False,
    ) -> None:
        self._names, self._penalised, self._moving, self._rested = names, penalised, moving, rested
        self.taken, self._indifferent = taken, indifferent
        self._first: int | None = None
        self.unused: frozenset[str] = frozenset()
        self.to_spare = False

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
            UnsupportedError: a parameter has a gradient at some steps only.
        """
        found: Sequence[Tensor | None] = [None] * len(parts)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, parts, create_graph=create_graph, allow_unused=True)
        lacks = [g is None for g in found]
        if self._first is not None and not self.unused and True not in lacks:  # as nearly always
            return torch.cat(found)  # type: ignore[arg-type]
        missing = [name for name, lack in zip(self._names, lacks, strict=True) if lack]
        if self._first is None:
            self.begin(k, frozenset(missing))
        elif (missing or self.unused) and not self._indifferent and self.unused.symmetric_difference(missing):
            self.refuse(k, self.unused.symmetric_difference(missing))
        return torch.cat([torch.zeros_like(part) if g is None else g for g, part in zip(found, parts, strict=True)])

    @property
    def matters(self) -> bool:
        """Whether it makes a difference that a gradient is missing and not 0."""
        return not self._indifferent

    def begin(self, k: int, unused: frozenset[str]) -> None:
        """The first step is k, and these parameters have no gradient there. Raises: as `gradient`."""
        if len(unused) == len(self._names):
            raise ValueError(
                "the loss does not depend on params: loss(params, batch) must be computed from its first argument"
            )
        if self._rested - unused and not self._indifferent:
            name = min(self._rested - unused)
            raise UnsupportedError(
                f"the loss gives params[{name!r}] a gradient at step {k + self.taken}, and gave it none before the "
                "state that came in. torch.optim counts the steps of such a parameter, on which its first gradients "
                "depend, from here; the state has one count for all. Begin without a state, or make the gradient 0 "
                f"where it is missing, in the steps before too: add 0 * params[{name!r}].sum() to the loss"
            )
        if unused & self._moving:
            name = min(unused & self._moving)
            raise UnsupportedError(
                f"the loss gives params[{name!r}] no gradient at step {k + self.taken}, but the state that came in "
                "has a running average for it that is not 0. torch.optim leaves a parameter without a gradient as "
                f"it is; here the average would move it. Add 0 * params[{name!r}].sum() to the loss if that is what "
                "you want, or set its averages to 0"
            )
        self.to_spare = bool(unused & self._penalised)
        self._first, self.unused = k, unused

    def refuse(self, k: int, changed: Collection[str]) -> NoReturn:
        """Raise the UnsupportedError of parameters that have no gradient at step k and had one at the first, or had
        none there and have one here.
        """
        name = min(changed)
        here, there = ("a", "no") if name in self.unused else ("no", "a")
        raise UnsupportedError(
            f"the loss gives params[{name!r}] {here} gradient at step {k + self.taken} and {there} gradient at step "
            f"{(self._first or 0) + self.taken}. "
            "torch.optim leaves a parameter without a gradient as it is in that step, its running averages included; "
            "a step that does so has no way back here. Make the gradient 0 where it is missing, which averages and "
            f"penalties take for what it is: add 0 * params[{name!r}].sum() to the loss"
        )


class Zeros:
    """Which parameters' gradients are 0 throughout, step by step: a compiled gradient is 0 where it is missing.

    Args:
        usage: of the loss, which has seen its first step.
        layout: of the parameters.
    """

    def __init__(self, usage: Usage, layout: Layout) -> None:
        self._usage, self._layout = usage, layout
        self._last = -1
        self._notes: list[tuple[int, Tensor]] = []

    def are_new(self, k: int) -> bool:
        """Whether step k was not looked at yet, and is to be."""
        return self._usage.matters and k > self._last

    def look(self, k: int, gradient: Tensor, *, wait: bool) -> bool:
        """Look at step k's gradient [numel].

        Args:
            k: the step.
            gradient: compiled.
            wait: whether to wait for its numbers; otherwise they are read some steps later.

        Returns:
            Whether a gradient is 0 that was not missing at the first step, so that it may be missing here.

        Raises:
            UnsupportedError: a parameter without a gradient at the first step has one; where there is no waiting, also
                where this returns True.
        """
        self._last = k
        parts = [part for part in self._layout.parts_and_views(gradient)[0] if part.numel()]
        self._notes.append((k, torch.stack(torch._foreach_norm(parts, float("inf"))) != 0))
        if wait:
            return any(self._read().values())
        if len(self._notes) >= INTERVAL:
            self.flush()
        return False

    def flush(self) -> None:
        """Read what was noted."""
        for k, names in self._read().items():
            if names:
                raise UnsupportedError(
                    f"the gradient of params[{names[0]!r}] is 0 at step {k + self._usage.taken}, and compiled it "
                    "cannot be told from one that is missing, which torch.optim would skip; use compile=False, which "
                    "knows the one from the other"
                )

    def _read(self) -> dict[int, list[str]]:
        """By step, the parameters that were used at the first step and whose gradients are 0."""
        notes, self._notes = self._notes, []
        names = [name for name, size in zip(self._layout.names, self._layout.sizes, strict=True) if size]
        found: dict[int, list[str]] = {}
        # One transfer for all steps: on a device each is a wait.
        table = torch.stack([nonzero for _, nonzero in notes]).tolist() if notes else []
        for (k, _), nonzero in zip(notes, table, strict=True):
            has = dict(zip(names, nonzero, strict=True))
            gained = [name for name in names if has[name] and name in self._usage.unused]
            if gained:
                self._usage.refuse(k, gained)
            found[k] = [name for name in names if not has[name] and name not in self._usage.unused]
        return found
