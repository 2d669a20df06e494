"""What an unroll gives, from the first step to the last."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from revdistill.engine.integers.snapshot import Snapshot


@dataclass(frozen=True)
class Result:
    """theta: theta_T, float [numel], or theta at `save_at` [n, numel]; average: the weighted mean of the iterates,
    float [numel], or None; slots: the running averages at the end, float [numel], where they are asked for; integers:
    behind theta_T and the slots, where there are any.
    """

    theta: Tensor
    average: Tensor | None = None
    slots: dict[str, Tensor] = field(default_factory=dict)
    integers: Snapshot | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """theta, the average where there is one, and the slots in order."""
        return (self.theta, *(() if self.average is None else (self.average,)), *self.slots.values())

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Result:
        """The same with others in the place of `tensors`."""
        theta, *rest = tensors
        average = None if self.average is None else rest.pop(0)
        return Result(theta, average, dict(zip(self.slots, rest, strict=True)), self.integers)
