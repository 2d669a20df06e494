"""How the backward pass gets theta_k back: four adjoints of the same unroll, with the same hypergradient.

`Reversible`, `Checkpoint` and `StoreAll` train in the same fixed-point arithmetic, so their forward passes agree bit
for bit and their hypergradients up to the rounding of the adjoint. `Backprop` is plain autograd through a
floating-point loop.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from revdistill.engine.adjoints.recordings import Checkpoints, Recording, Reversal, Stored, UnrollStats, stats_of
from revdistill.engine.adjoints.trajectory import Problem, Trajectory
from revdistill.engine.errors import UnsupportedError
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.integers.history import NoHistory, check_place, open_history


class FixedPointAdjoint(ABC):
    """What the adjoints in fixed-point arithmetic share: the number format, see
    `revdistill.engine.integers.fixedpoint.FixedPoint`.
    """

    fractional_bits: int

    @property
    def fixed(self) -> FixedPoint:
        """The number format of theta and v."""
        return FixedPoint(self.fractional_bits)

    @abstractmethod
    def record(self, problem: Problem, theta0: Tensor) -> Recording:
        """Go forward, keeping what the way back needs."""

    def forward_only(self, problem: Problem, theta0: Tensor) -> tuple[Tensor, UnrollStats]:
        """The same forward pass bit for bit, keeping nothing."""
        trajectory = Trajectory(problem, theta0, self.fixed, NoHistory())
        trajectory.run()
        return trajectory.result(), stats_of(trajectory, trajectory.history.nbytes)


@dataclass(frozen=True)
class Reversible(FixedPointAdjoint):
    """Walk the trajectory back bit for bit; what momentum destroys is kept in a bit store (Maclaurin et al. 2015).

    history: where the bits are kept: "device", "host" (pinned when the device is CUDA) or a path (a temporary file in
    that folder, or beside that file name). fractional_bits: of theta and v; range |value| < 2^(62 - fractional_bits).
    graph_bytes: memory for the graphs of the last steps, as many as fit: their gradients are not evaluated again on the
    way back, which makes short unrolls faster. 0 keeps none. (Nothing is kept where `compile=True` compiles the
    product.)

    Cost: one gradient per step forward; one gradient and one double-backward product per step back. 24 bytes per
    parameter (theta, v, head) and log2(1/momentum) bits per parameter and step: 0.152 at 0.9. Use it for long unrolls
    with momentum. Without momentum each step loses v whole, 64 bits: use Checkpoint. After the way back the start is
    compared bit for bit, always; ReversalError where it differs.
    """

    history: str | os.PathLike[str] = "device"
    fractional_bits: int = 44
    graph_bytes: int = 0

    def __post_init__(self) -> None:
        check_place(self.history)
        if isinstance(self.graph_bytes, bool) or not isinstance(self.graph_bytes, int):
            raise TypeError(f"graph_bytes must be an int, got {type(self.graph_bytes).__name__}")
        if self.graph_bytes < 0:
            raise ValueError(f"graph_bytes must be at least 0, got {self.graph_bytes}")
        FixedPoint(self.fractional_bits)

    def record(self, problem: Problem, theta0: Tensor) -> Recording:
        reason = problem.update.no_way_back
        if reason is not None:
            raise UnsupportedError(
                f"Reversible cannot walk back {reason}; use adjoint=rd.Checkpoint() (its default) or rd.StoreAll()"
            )
        return Reversal(problem, theta0, self.fixed, open_history(self.history, theta0.device), self.graph_bytes)


@dataclass(frozen=True)
class Checkpoint(FixedPointAdjoint):
    """Keep a snapshot each `every` steps (default: about sqrt(T)), and run each stretch between two of them again.

    Cost: two gradients per step and one double-backward product. T / every snapshots of 24 bytes per parameter (8
    without momentum), and every x 4 bytes per parameter (float32; 8 where lr or momentum want gradients) for one
    stretch. Use it without momentum, with Nesterov momentum, or for short unrolls. Source: Griewank & Walther 2000, one
    level.
    """

    every: int | None = None
    fractional_bits: int = 44

    def __post_init__(self) -> None:
        if self.every is not None and (isinstance(self.every, bool) or not isinstance(self.every, int)):
            raise TypeError(f"every must be an int or None, got {type(self.every).__name__}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        FixedPoint(self.fractional_bits)

    def record(self, problem: Problem, theta0: Tensor) -> Recording:
        return Checkpoints(problem, theta0, self.fixed, self.every)


@dataclass(frozen=True)
class StoreAll(FixedPointAdjoint):
    """Keep every theta_k as floats, and no graphs: the simplest way back, and the rival to beat.

    Cost: the passes of Reversible without its inverse. 4 bytes per parameter and step in float32, 8 where lr or
    momentum want gradients (v_k is kept too), besides 24 bytes per parameter. Use it for short unrolls.
    """

    fractional_bits: int = 44

    def __post_init__(self) -> None:
        FixedPoint(self.fractional_bits)

    def record(self, problem: Problem, theta0: Tensor) -> Recording:
        return Stored(problem, theta0, self.fixed)


@dataclass(frozen=True)
class Backprop:
    """Plain autograd through the floating-point loop: the reference, and the baseline of the benchmarks.

    Cost: the graphs of all steps are kept, so memory grows with T by the activations of a step and its backward. Use it
    for short unrolls, for losses that are not deterministic, and where a second backward, or a derivative of the
    hypergradient, is needed.
    """


Adjoint = FixedPointAdjoint | Backprop


def default_adjoint(problem: Problem) -> FixedPointAdjoint:
    """Reversible where momentum > 0 at every step and the step can be walked back; otherwise Checkpoint."""
    update = problem.update
    if update.no_way_back is None and update.always_decays(problem.steps):
        return Reversible()
    return Checkpoint()
