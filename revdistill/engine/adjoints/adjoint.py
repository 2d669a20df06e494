"""What every adjoint is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor

from revdistill.engine.adjoints.amplification import Amplification
from revdistill.engine.adjoints.result import Result
from revdistill.engine.adjoints.trajectory import Trajectory
from revdistill.engine.problem import Problem
from revdistill.engine.showing import size


@dataclass(frozen=True, repr=False)
class UnrollStats:
    """What one forward pass kept, and how the way back went.

    state_bytes: theta, the running averages and the bit store's heads. history_bytes: the words spilled so far
    (Reversible), or the snapshots (Checkpoint, StoreAll); None for Backprop, whose graphs are not counted. With
    shard=True all of these are of the part that this rank keeps, and so is parameters.
    """

    steps: int
    parameters: int
    state_bytes: int
    history_bytes: int | None
    _amplification: Amplification = field(default_factory=Amplification, repr=False, compare=False)

    def __repr__(self) -> str:
        found = [f"steps={self.steps}", f"parameters={self.parameters}", f"state={size(self.state_bytes)}"]
        if self.history_bytes is not None:
            bits = f"{self.history_bits_per_parameter_step:.3g} bits per parameter and step"
            found.append(f"history={size(self.history_bytes)} ({bits})")
        if self.amplification is not None:
            found.append(f"amplification={self.amplification:.3g}")
        return f"UnrollStats({', '.join(found)})"

    @property
    def history_bits_per_parameter_step(self) -> float | None:
        """8 history_bytes / (parameters steps); None for Backprop."""
        if self.history_bytes is None:
            return None
        return 8 * self.history_bytes / max(1, self.parameters * self.steps)

    @property
    def amplification(self) -> float | None:
        """|dL/dtheta_0| / |dL/dtheta_T| once the way back is over: what training makes of a small change of its start.

        Rounding errors grow as much. Far above 1 training is chaotic, and a float32 hypergradient has few right digits,
        or none, whatever computed it: compare in float64. None before, for Backprop, where nothing depends on the
        result, and where clip_back shortened dL/dtheta_k. (theta_T stands for all that the unroll returns; with a
        `window`, theta_0 for its first step.)
        """
        return self._amplification.value

    @classmethod
    def of(cls, trajectory: Trajectory, history_bytes: int) -> UnrollStats:
        """The figures of a forward pass in fixed point."""
        problem = trajectory.problem
        return cls(problem.steps, problem.update.layout.numel, trajectory.state.nbytes, history_bytes)


class Adjoint(ABC):
    """How the backward pass of an unroll gets theta_k back: `Reversible`, `Checkpoint`, `StoreAll` or `Backprop`."""

    @abstractmethod
    def run(self, problem: Problem, theta0: Tensor) -> tuple[Result, UnrollStats]:
        """The unroll's results from theta_0 [numel], differentiable with respect to all that went in."""
