"""Everything that defines one unroll, whatever its adjoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from revdistill.engine.adjoints.result import Result
from revdistill.engine.errors import UnsupportedError
from revdistill.engine.integers.backend import Backend
from revdistill.engine.integers.snapshot import Snapshot
from revdistill.engine.loss.data import Data
from revdistill.engine.loss.determinism import Determinism
from revdistill.engine.loss.gradient import Gradient
from revdistill.engine.loss.linearization import Linearization
from revdistill.engine.optimizers.start import AT_REST, Start
from revdistill.engine.optimizers.update import Update
from revdistill.engine.ranks.group import Ranks
from revdistill.engine.ranks.shards import Shards
from revdistill.engine.ranks.shared import SharedGradient


class OnStep(Protocol):
    """What `rd.unroll(on_step=...)` calls at each step of the forward pass, whatever its arguments are named."""

    def __call__(self, k: int, theta: dict[str, Tensor], loss: Tensor, /) -> object:
        """k: the step's number; theta: the parameters before it; loss: at theta, of the step's batch, a scalar."""


class OnStepBack(Protocol):
    """What `rd.unroll(on_step_back=...)` calls at each step of the way back, whatever its arguments are named."""

    def __call__(self, k: int, norm: float, /) -> object:
        """k: the step's number; norm: of dL/dtheta_k, all parameters together."""


@dataclass(frozen=True)
class Problem:
    """The gradient of a loss, an optimizer, data and a number of steps.

    Steps count from 0 here; `number` tells their numbers in the training, which users see.

    backend: what does the integer work; first: the way back goes no further: dL/d(...) of the steps before it is left
    out; clip_back: the largest norm of dL/d(theta_k) that is carried on; save_at: the result is theta at these steps,
    stacked, or where it is None theta_T alone; start: of the optimizer; resumed: the integers behind theta_0 and the
    slots at the start, None where these are floats or 0; returns_state: whether the slots at the end are results too;
    average: the weights of theta_0 to theta_T in an average that is a result too; progress: whether there is a bar;
    replays: whether steps that were proved to be like eager ones may be replayed; shared: what makes of the gradient on
    each rank the mean over ranks; ranks: that share each step's batch, None for one process; shards: of the parameters,
    where each rank keeps a part, and theta, slots and bars are parts.
    """

    gradient: Gradient
    update: Update
    data: Data
    determinism: Determinism
    backend: Backend
    steps: int
    on_step: OnStep | None = None
    first: int = 0
    clip_back: float | None = None
    on_step_back: OnStepBack | None = None
    save_at: tuple[int, ...] | None = None
    start: Start = AT_REST
    resumed: Snapshot | None = None
    returns_state: bool = False
    average: Sequence[float] | None = None
    progress: bool = False
    replays: bool = False
    shared: SharedGradient | None = None
    ranks: Ranks | None = None
    shards: Shards | None = None

    @property
    def interval(self) -> int:
        """Steps between two looks at the device's numbers. Ranks wait for each other, and so for it, at each step."""
        return self.backend.interval if self.ranks is None else 1

    @cached_property
    def begin(self) -> Start:
        """`start`, or this rank's part of it."""
        return self.start if self.shards is None else self.shards.start(self.start)

    @cached_property
    def linearize(self) -> Callable[[int, Tensor], Linearization]:
        """See `Gradient.linearize` and `SharedGradient.linearize`."""
        return self.gradient.linearize if self.shared is None else self.shared.linearize

    def number(self, k: int) -> int:
        """The step's number in the whole training."""
        return k + self.start.taken

    @cached_property
    def saved_steps(self) -> frozenset[int]:
        """`save_at`, to be looked into at each step."""
        return frozenset(self.save_at or ())

    @cached_property
    def looks_back(self) -> bool:
        """Whether something is done with dL/d(theta_k) on the way back."""
        return self.clip_back is not None or self.on_step_back is not None

    def meet(self, point: str) -> None:
        """Wait for the other ranks: none has failed on the way here."""
        if self.ranks is not None:
            self.ranks.meet(point)

    def cut(self, theta: Tensor) -> Tensor:
        """Theta [numel], or this rank's part of it."""
        return theta if self.shards is None else self.shards.cut(theta)

    def joined(self, result: Result) -> Result:
        """The result whole, at the end of the forward pass: where each rank keeps a part, of all of these."""
        self.meet("the end of the forward pass")
        if self.shards is None:
            return result
        return result.with_tensors(
            tuple(self.shards.joined(t, "the end of the forward pass") for t in result.tensors())
        )

    def views(self, k: int, theta: Tensor) -> dict[str, Tensor]:
        """The parameters as a user sees them, at step k. theta: [numel], or this rank's part."""
        if self.shards is None:
            return self.update.layout.views(theta)
        return self.shards.all.views(self.shards.joined(theta, "on_step", k))

    def norms_of_whole(self, norms: Tensor) -> Tensor:
        """Of vectors of which each rank has a part, from the parts' norms, float64 [] or [K]; otherwise these."""
        if self.shards is None or self.ranks is None:
            return norms
        self.ranks.meet("a norm")
        return self.ranks.sum_in_order(norms.square()).sqrt()

    def on_all_ranks(self, true: bool) -> bool:
        """Whether it is true on all of them."""
        if self.ranks is None:
            return true
        return bool(self.ranks.agree("a number that all agree on", -1, true, min))

    def look_back(self, k: int, theta_bar: Tensor) -> Tensor:
        """dL/d(theta_k) [numel] as it is carried on: its norm told, and scaled down to `clip_back`.

        Of K losses at once, [K, numel], the largest norm is told, and each is scaled by its own.
        """
        if torch._C._functorch.is_batchedtensor(theta_bar):
            raise UnsupportedError(
                "adjoint=rd.Backprop() looks at the norm of one dL/dtheta_k at a time: with clip_back or on_step_back, "
                "call backward() for each output, or leave the adjoint out"
            )
        many = theta_bar.ndim > 1
        norms = torch.linalg.vector_norm(theta_bar.detach(), dim=-1 if many else None, dtype=torch.float64)
        norms = self.norms_of_whole(norms)
        norm = float(norms.max())
        if self.on_step_back is not None:
            self.on_step_back(self.number(k), norm)
        if self.clip_back is None or not norm > self.clip_back:
            return theta_bar
        if not many:
            return theta_bar * (self.clip_back / norm)
        factors: Tensor = (self.clip_back / norms).clamp(max=1.0)
        return theta_bar * factors.to(theta_bar.dtype)[:, None]
