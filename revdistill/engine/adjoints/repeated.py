"""A gradient evaluated again must be the one of the forward pass, to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from revdistill.engine.errors import ReversalError
from revdistill.engine.problem import Problem

NONDETERMINISTIC = (
    "The loss must be deterministic: no random numbers but torch's (the engine seeds those, and torch has one "
    "generator for "
    "all threads: a thread outside an unroll may not draw from it meanwhile), no counters or other state "
    "that changes between calls, the module in the same training mode, batches given as a function must return the "
    "same "
    "tensors for the same k. adjoint=rd.Backprop() needs no second evaluation"
)


class Repeated:
    """Raises ReversalError where a gradient evaluated again is not the one of the forward pass, to the bit."""

    def __init__(self, problem: Problem) -> None:
        self._fingerprints, self._taken = problem.gradient.fingerprints, problem.start.taken
        self._modules = problem.determinism.modules
        self._first: Tensor | None = (
            None  # of the steps checked, the first that was not the same; -1: none. One for all steps
        )

    def check(self, k: int, gradient: Tensor) -> None:
        """At once on the CPU; elsewhere noted, so that nothing waits for the device."""
        matches = self._fingerprints.matches(k, gradient)
        if isinstance(matches, Tensor):
            first = torch.full((), -1, device=matches.device) if self._first is None else self._first
            self._first = torch.where(matches | (first >= 0), first, k)
        elif not matches:
            self._raise(k)

    def compare(self, first: int, found: list[int]) -> None:
        """The fingerprints of gradients that were evaluated again, of the steps from `first` on."""
        recorded = self._fingerprints.recorded(first, first + len(found))
        for k, (mine, other) in reversed(list(enumerate(zip(found, recorded, strict=True), start=first))):
            if mine != other:
                self._raise(k)

    def finish(self) -> None:
        """Read what was noted."""
        if self._first is not None and int(self._first) >= 0:
            self._raise(int(self._first))

    def _raise(self, k: int) -> None:
        raise ReversalError(
            f"the gradient at step {k + self._taken} was not the same bit for bit when it was evaluated again, so the "
            "way back cannot end "
            f"bit-exactly at the start and no hypergradient is returned. {self._why()}"
        )

    def _why(self) -> str:
        """What changed of the module that the loss calls, and if nothing did, what there is besides."""
        changed = self._modules.what_changed()
        if not changed:
            return NONDETERMINISTIC
        return (
            "The module that the loss calls is not what it was at the first step: it changed "
            f"{', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''}. Change it after backward() only, and "
            "let its forward keep no counters or other state. adjoint=rd.Backprop() needs no second evaluation"
        )
