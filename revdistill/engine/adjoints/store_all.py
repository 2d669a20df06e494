"""Every theta_k kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from revdistill.engine.adjoints.adjoint import UnrollStats
from revdistill.engine.adjoints.fixed_point import FixedPointAdjoint, Recording
from revdistill.engine.adjoints.repeated import Repeated
from revdistill.engine.adjoints.replayed import forward_of
from revdistill.engine.adjoints.result import Result
from revdistill.engine.adjoints.sweep import Hypergradients, Sweep
from revdistill.engine.adjoints.trajectory import Trajectory
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.integers.history import NoHistory
from revdistill.engine.loss.linearization import Linearization
from revdistill.engine.problem import Problem


@dataclass(frozen=True)
class StoreAll(FixedPointAdjoint):
    """Keep every theta_k as floats, and no graphs: the simplest way back, and the rival to beat.

    Cost: the passes of Reversible without its inverse. 4 bytes per parameter and step in float32, 8 where lr or
    momentum want gradients (v_k is kept too), besides 24 bytes per parameter. Use it for short unrolls.

    Args:
        fractional_bits: of theta and v; range |value| < 2^(62 - fractional_bits).
    """

    fractional_bits: int = 44

    def __post_init__(self) -> None:
        FixedPoint(self.fractional_bits)

    def record(self, problem: Problem, theta0: Tensor) -> Recording:
        return _Stored(problem, theta0, self)


class _Stored(Recording):
    def __init__(self, problem: Problem, theta0: Tensor, adjoint: StoreAll) -> None:
        self._trajectory = Trajectory(problem, theta0, adjoint.fixed, NoHistory(), forward_of)
        self._stretch = Stretch(self._trajectory, wants_slots=problem.update.vjp_reads_slots)

    def forward(self) -> Result:
        self._trajectory.run(self._stretch.before_step, self._stretch.after_step)
        self.stats = UnrollStats.of(self._trajectory, self._stretch.nbytes)
        return self._trajectory.result()

    def backward(self, sweep: Sweep) -> Hypergradients:
        self._stretch.sweep_back(sweep)
        return sweep.finish()


class Stretch:
    """theta_k, and the slots where they are wanted, as floats over some steps; and the sweep back over them."""

    def __init__(self, trajectory: Trajectory, wants_slots: bool) -> None:
        self._trajectory = trajectory
        self._keep, self._first = wants_slots, trajectory.problem.first
        self._thetas: dict[int, Tensor] = {}
        self._slots: dict[int, dict[str, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        tensors = [*self._thetas.values(), *(t for slots in self._slots.values() for t in slots.values())]
        return sum(t.nbytes for t in tensors)

    def before_step(self, k: int) -> None:
        """Keep theta_k."""
        if k < self._first:
            return
        self._thetas[k] = self._trajectory.theta().clone()
        if self._keep and k not in self._slots:
            self._slots[k] = self._trajectory.slots()

    def after_step(self, k: int, _: Linearization | None) -> None:
        """Keep the slots."""
        if self._keep and k >= self._first:
            self._slots[k + 1] = self._trajectory.slots()

    def sweep_back(self, sweep: Sweep) -> None:
        """Go back over the steps that were kept, letting go of each."""
        repeated = Repeated(sweep.problem)
        for k in sorted(self._thetas, reverse=True):
            theta = self._thetas.pop(k)
            linear = sweep.problem.linearize(k, theta)
            sweep.to_theta(k, theta, linear, self._slots.pop(k + 1, {}))
            repeated.check(k, linear.gradient if linear.own is None else linear.own)
            sweep.to_start_of_step(k, self._slots.get(k, {}))
        repeated.finish()
