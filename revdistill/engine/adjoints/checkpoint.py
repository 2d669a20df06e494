"""Snapshots of the integers; each stretch between two of them is run again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.engine.adjoints.adjoint import UnrollStats
from revdistill.engine.adjoints.fixed_point import FixedPointAdjoint, Recording
from revdistill.engine.adjoints.repeated import NONDETERMINISTIC, Repeated
from revdistill.engine.adjoints.replayed import forward_of
from revdistill.engine.adjoints.result import Result
from revdistill.engine.adjoints.store_all import Stretch
from revdistill.engine.adjoints.sweep import Hypergradients, Sweep
from revdistill.engine.adjoints.trajectory import Trajectory
from revdistill.engine.errors import ReversalError
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.integers.history import NoHistory
from revdistill.engine.integers.snapshot import Snapshot
from revdistill.engine.optimizers.sources import THETA
from revdistill.engine.problem import Problem
from revdistill.engine.scalars import is_integer


@dataclass(frozen=True)
class Checkpoint(FixedPointAdjoint):
    """Keep a snapshot each `every` steps, and run each stretch between two of them again.

    Cost: two gradients per step and one double-backward product. T / every snapshots of 24 bytes per parameter (8
    without momentum), and every x 4 bytes per parameter (float32; 8 where lr or momentum want gradients) for one
    stretch. Use it without momentum, with Nesterov momentum, or for short unrolls. Source: Griewank & Walther 2000, one
    level.

    Args:
        every: steps between snapshots, at least 1; None: about sqrt(T).
        fractional_bits: of theta and v; range |value| < 2^(62 - fractional_bits).

    Raises:
        TypeError, ValueError: every is none of these.
    """

    every: int | None = None
    fractional_bits: int = 44

    def __post_init__(self) -> None:
        if self.every is not None and not is_integer(self.every):
            raise TypeError(f"every must be an int or None, got {type(self.every).__name__}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        FixedPoint(self.fractional_bits)

    def record(self, problem: Problem, theta0: Tensor) -> Recording:
        return _Snapshots(problem, theta0, self)


class _Snapshots(Recording):
    """Those of the first steps of all stretches, and theta at the end."""

    def __init__(self, problem: Problem, theta0: Tensor, adjoint: Checkpoint) -> None:
        self._every = adjoint.every or max(1, math.isqrt(problem.steps - problem.first))
        self._first = problem.first
        self._trajectory = Trajectory(problem, theta0, adjoint.fixed, NoHistory(), forward_of)
        # Without momentum each v is overwritten before it is read: theta alone is a snapshot. What is overwritten still
        # has a derivative with respect to momentum.
        update = problem.update
        self._with_slots = update.keeps_memory(problem.steps) or update.vjp_reads_slots
        self._snapshots: dict[int, Snapshot] = {}

    def forward(self) -> Result:
        self._trajectory.run(self._before_step)
        self._end = self._trajectory.state.numbers[THETA].clone()
        self.stats = UnrollStats.of(self._trajectory, sum(s.nbytes for s in self._snapshots.values()))
        return self._trajectory.result()

    def _before_step(self, k: int) -> None:
        if k >= self._first and (k - self._first) % self._every == 0:
            self._snapshots[k] = Snapshot(self._trajectory.state, with_slots=self._with_slots)

    def backward(self, sweep: Sweep) -> Hypergradients:
        problem, end = sweep.problem, self._end
        for start in reversed(range(problem.first, problem.steps, self._every)):
            snapshot = self._snapshots.pop(start)
            snapshot.restore(self._trajectory.state)
            stretch, repeated = Stretch(self._trajectory, sweep.wants_slots), Repeated(problem)
            for k in range(start, min(start + self._every, problem.steps)):
                stretch.before_step(k)
                linear = self._trajectory.step(k, again=True)
                repeated.check(k, linear.gradient if linear.own is None else linear.own)
                stretch.after_step(k, linear)
            repeated.finish()
            if not torch.equal(self._trajectory.state.numbers[THETA], end):
                raise ReversalError(
                    f"running steps {problem.number(start)} to {problem.number(k)} again did not end bit-exactly where "
                    "the forward pass ended, so the "
                    f"hypergradient would be wrong and is not returned. {NONDETERMINISTIC}"
                )
            stretch.sweep_back(sweep)
            end = snapshot.theta
        return sweep.finish()
