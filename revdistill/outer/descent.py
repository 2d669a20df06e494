"""Adam steps along hypergradients: the loop that distillation, tuning and the benchmarks share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.engine import NonFiniteError, RangeError
from revdistill.engine.loss.determinism import repeatable
from revdistill.outer.ranks import ALONE, Processes

MAX_FAILURES = 10
MEMORY = 0.95  # of the running mean of norms: some twenty steps
Leaves = dict[str, Tensor]
Clip = Callable[[Leaves], float]  # clips gradients in place, and returns the norm that they had


@dataclass(frozen=True)
class Outcome:
    """Of one outer step.

    Attributes:
        loss: the outer loss; NaN where the step failed.
        norm: of the hypergradient before clipping; NaN where the step failed.
        diverged: why the step failed, or None.
    """

    loss: float
    norm: float
    diverged: str | None = None


def cosine(k: float, steps: int) -> float:
    """The factor on the outer rate at step k that falls from 1 to 0 over all steps."""
    return 0.5 * (1 + math.cos(math.pi * k / steps))


def total_norm(leaves: Leaves) -> float:
    """The Euclidean norm of all gradients together."""
    return float(torch.nn.utils.get_total_norm([leaf.grad for leaf in leaves.values() if leaf.grad is not None]))


class ClipTo:
    """Clips the gradients of all leaves together, as torch.nn.utils.clip_grad_norm_ does.

    Args:
        max_norm: to this norm; 0: not at all.
        times_mean: also to this many times the running mean of the norms of the steps so far, above 1; 0: not at all
            (Feng et al. 2023 clip at twice it).

    Raises:
        ValueError: times_mean is above 0, but not above 1.

    Attributes:
        mean: the running mean, of norms as they were clipped; 0 before the first step.
    """

    def __init__(self, max_norm: float = 0.0, times_mean: float = 0.0) -> None:
        if 0 < times_mean <= 1:
            raise ValueError(
                f"clip_mean is {times_mean}; accepted is 0 (none) or a number above 1, as the mean is of norms as they "
                "were clipped, and would never rise again"
            )
        self._max_norm, self.times_mean = max_norm, times_mean
        self.mean = 0.0

    def __call__(self, leaves: Leaves) -> float:
        """Clip; return the norm that the gradients had."""
        norm = total_norm(leaves)
        if not math.isfinite(norm):
            return norm
        most = min(self._max_norm or math.inf, self.times_mean * self.mean or math.inf)
        if most < math.inf:
            torch.nn.utils.clip_grad_norm_(leaves.values(), most)
        clipped = min(norm, most)
        self.mean = MEMORY * self.mean + (1 - MEMORY) * clipped if self.mean else clipped
        return norm


class Descent:
    """Adam on named leaves, along the hypergradient of an outer loss.

    A step whose inner training left the fixed-point range or was not finite changes nothing but the number of the step.

    Args:
        leaves: what is learned: tensors that require grad, by name.
        lr: Adam's rate, of all leaves or by leaf.
        betas: Adam's.
        decay: step k -> the factor on the rates.
        clip: clips the leaves' gradients in place and returns the norm that they had; `ClipTo` is the usual one.
        average_from: the first step whose iterate goes into the mean of the last iterates; None for no mean.
        after_step: called with k once step k has changed the leaves, before they go into the mean.
        advice: what avoids steps that fail, for the message of the error.
        processes: that share the units of a step; each has the same leaves, and makes the same steps.

    Attributes:
        optimizer: torch.optim.Adam, a parameter group for each leaf.
        outer_step: how many steps were made, failed ones included.
        averages: the mean of the last `averaged` iterates by leaf; empty without `average_from`.
    """

    def __init__(
        self,
        leaves: Leaves,
        *,
        lr: float | Mapping[str, float],
        betas: tuple[float, float],
        decay: Callable[[int], float],
        clip: Clip,
        average_from: float | None = None,
        after_step: Callable[[int], None] | None = None,
        advice: str = "a smaller lr",
        processes: Processes = ALONE,
    ) -> None:
        self.leaves, self._processes = leaves, processes
        self._lr = dict(lr) if isinstance(lr, Mapping) else dict.fromkeys(leaves, lr)
        self.optimizer = torch.optim.Adam([{"params": [leaf]} for leaf in leaves.values()], betas=betas)
        self._decay, self.clip, self._after_step, self._advice = decay, clip, after_step, advice
        self._average_from = math.inf if average_from is None else average_from
        self.averages = {} if average_from is None else {n: torch.zeros_like(leaf) for n, leaf in leaves.items()}
        self.outer_step, self.averaged = 0, 0
        self._failures = 0

    def step(self, outer_loss: Callable[[int], Tensor]) -> Outcome:
        """One step, with torch's settings of an unroll, so that on a GPU too a run repeats itself.

        Args:
            outer_loss: k -> the scalar to descend, for the number of this step.

        Raises:
            RangeError, NonFiniteError: that of the tenth step in a row that failed.
        """
        return self.step_over(1, lambda k, unit: outer_loss(k))

    def step_over(self, units: int, outer_loss: Callable[[int, int], Tensor]) -> Outcome:
        """One step likewise, along a sum that is shared out: each unit's part is differentiated by itself, and the
        hypergradients are added in the order of units, whichever process has them.

        Args:
            units: how many parts the outer loss has.
            outer_loss: (k, unit) -> that part of the scalar to descend.

        Raises:
            As `step`, and as `Processes.share`.
        """
        k = self.outer_step
        for name, group in zip(self.leaves, self.optimizer.param_groups, strict=True):
            group["lr"] = self._lr[name] * self._decay(k)
        with repeatable(next(iter(self.leaves.values())).device):
            outcome = self._step(k, units, outer_loss)
        self.outer_step = k + 1
        return outcome

    def fingerprint(self) -> int:
        """Of the leaves and their mean, in 48 bits."""
        found = hashlib.blake2b(digest_size=6)
        for t in (*self.leaves.values(), *self.averages.values()):
            found.update(t.detach().cpu().contiguous().numpy().tobytes())
        return int.from_bytes(found.digest(), "big")

    def _step(self, k: int, units: int, outer_loss: Callable[[int, int], Tensor]) -> Outcome:
        self.optimizer.zero_grad(set_to_none=True)
        parts = _Parts(self.leaves)
        try:
            found = self._processes.share(
                [parts.numel] * units,
                lambda unit: parts.pack(outer_loss(k, unit)),
                dtype=parts.dtype,
                device=parts.device,
            )
            loss = parts.add_up(found)
            norm = self.clip(self.leaves)
            if not math.isfinite(norm):
                raise NonFiniteError("the hypergradient's norm is not finite", parameter=None, step=0)
        except (RangeError, NonFiniteError) as error:
            return self._failed(error)
        self.optimizer.step()
        self._failures = 0
        if self._after_step is not None:
            self._after_step(k)
        self._average(k)
        return Outcome(loss, norm)

    def failed(self, error: RangeError | NonFiniteError) -> Outcome:
        """A step that failed before it had a loss. Raises: the tenth in a row."""
        outcome = self._failed(error)
        self.outer_step += 1
        return outcome

    def _failed(self, error: RangeError | NonFiniteError) -> Outcome:
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise type(error)(
                f"{MAX_FAILURES} outer steps in a row diverged; {self._advice} avoids it. The last: {error}",
                **error.__dict__,
            ) from error
        return Outcome(math.nan, math.nan, str(error))

    def _average(self, k: int) -> None:
        if not self.averages or k < self._average_from:
            return
        self.averaged += 1
        for name, average in self.averages.items():
            average.lerp_(self.leaves[name].detach(), 1 / self.averaged)


class _Parts:
    """What a unit of an outer step gives, as one vector: its part of the loss, which leaves it depends on, and the
    gradients of all.
    """

    def __init__(self, leaves: Leaves) -> None:
        self._leaves = list(leaves.values())
        self._sizes = [leaf.numel() for leaf in self._leaves]
        self.numel = 1 + len(self._leaves) + sum(self._sizes)
        self.device = self._leaves[0].device
        self.dtype = self._leaves[0].dtype
        for leaf in self._leaves:
            self.dtype = torch.promote_types(self.dtype, leaf.dtype)

    def pack(self, loss: Tensor) -> Tensor:
        """[numel]"""
        found = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        used = torch.tensor([grad is not None for grad in found])
        grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(self._leaves, found, strict=True)]
        flat = [loss.detach().reshape(1), used, *(g.detach().reshape(-1) for g in grads)]
        return torch.cat([t.to(self.device, self.dtype) for t in flat])

    def add_up(self, parts: list[Tensor]) -> float:
        """Set the leaves' gradients to the sums over units, in their order; return that of the losses."""
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        loss, used, *grads = torch.split(total, [1, len(self._leaves), *self._sizes])
        for leaf, depends, grad in zip(self._leaves, used.tolist(), grads, strict=True):
            leaf.grad = grad.view_as(leaf).to(leaf.dtype).clone() if depends else None
        return loss.item()
