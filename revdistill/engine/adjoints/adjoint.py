"""What every adjoint is, and the autograd.Function that those in fixed point share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.adjoints.amplification import Amplification
from revdistill.engine.adjoints.result import Result
from revdistill.engine.adjoints.sweep import Hypergradients, Sweep
from revdistill.engine.adjoints.trajectory import Trajectory
from revdistill.engine.errors import ReversalError, UnsupportedError
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.integers.history import NoHistory
from revdistill.engine.loss.operators import CHANGED_IN_PLACE
from revdistill.engine.problem import Problem


@dataclass(frozen=True)
class UnrollStats:
    """What one forward pass kept, and how the way back went.

    state_bytes: theta, the running averages and the bit store's heads. history_bytes: the words spilled so far
    (Reversible), or the snapshots (Checkpoint, StoreAll); None for Backprop, whose graphs are not counted.
    """

    steps: int
    parameters: int
    state_bytes: int
    history_bytes: int | None
    _amplification: Amplification = field(default_factory=Amplification, repr=False, compare=False)

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


class Recording(ABC):
    """A forward pass that can be gone back over once.

    It does not hold the results themselves: these hold it, through their graph, and would never be let go of.
    """

    stats: UnrollStats

    @abstractmethod
    def forward(self) -> Result:
        """All steps, with what the way back needs kept; to be called once, and first."""

    @abstractmethod
    def backward(self, sweep: Sweep) -> Hypergradients:
        """Carry the sweep from the last step to the first."""


class FixedPointAdjoint(Adjoint):
    """What the adjoints in fixed-point arithmetic share: their forward passes agree bit for bit."""

    fractional_bits: int

    @property
    def fixed(self) -> FixedPoint:
        """The number format of theta and v."""
        return FixedPoint(self.fractional_bits)

    @abstractmethod
    def record(self, problem: Problem, theta0: Tensor) -> Recording:
        """A forward pass from theta_0, float [numel], yet to be made."""

    def run(self, problem: Problem, theta0: Tensor) -> tuple[Result, UnrollStats]:
        tables = [table.values for table in problem.update.tables.values()]
        inputs = (*tables, *problem.data.tensors, *problem.data.hypers, *problem.start.slots.values())
        if torch.is_grad_enabled() and any(t.requires_grad for t in (theta0, *inputs)):
            unrolled = Unrolled(problem, self)
            tensors = _Unroll.apply(unrolled, theta0, *inputs)  # type: ignore[no-untyped-call]
            assert unrolled.recording is not None
            assert unrolled.form is not None
            return unrolled.form.with_tensors(tensors), unrolled.recording.stats
        with torch.no_grad(), problem.determinism.passage():
            trajectory = Trajectory(problem, theta0, self.fixed, NoHistory())
            trajectory.run()
            return trajectory.result(), UnrollStats.of(trajectory, trajectory.history.nbytes)


@dataclass
class Unrolled:
    """One unroll between its forward and its backward pass.

    form: its results, in shape only: tensors on the meta device stand for them.
    """

    problem: Problem
    adjoint: FixedPointAdjoint
    recording: Recording | None = None
    form: Result | None = None
    versions: tuple[int, ...] = ()

    def data_versions(self) -> tuple[int, ...]:
        """torch counts the in-place changes of each tensor."""
        return tuple(t._version for t in (*self.problem.data.tensors, *self.problem.data.hypers))

    def go_back(self, bars: tuple[Tensor, ...]) -> Hypergradients:
        """The way back; once. bars: dL/d(each of the results)."""
        recording, self.recording = self.recording, None  # used up, even if the way back fails
        if recording is None or self.form is None:
            raise UnsupportedError(
                "this unroll was already gone back through, which used it up; add the losses before one backward(), "
                "call rd.unroll again, or use adjoint=rd.Backprop() with retain_graph=True"
            )
        if self.data_versions() != self.versions:
            raise ReversalError(
                "a tensor in batches or hyper was changed in place between the forward and the backward pass, so the "
                "way back would see other data; change it after backward(), or pass a clone"
            )
        with torch.no_grad(), self.problem.determinism.passage():
            result_bars = self.form.with_tensors(tuple(bar.contiguous() for bar in bars))
            sweep = Sweep(self.problem, result_bars, recording.stats._amplification)
            try:
                return recording.backward(sweep)
            finally:
                sweep.close()


class _Unroll(torch.autograd.Function):
    """Inputs: the unroll, theta_0 and every differentiable tensor; outputs theta_T, the average and the slots, where
    they are asked for. The mathematics is the adjoint's.
    """

    @staticmethod
    def forward(ctx: Any, unrolled: Unrolled, theta0: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.unrolled = unrolled
        ctx.save_for_backward(theta0, *inputs)
        unrolled.versions = unrolled.data_versions()
        with unrolled.problem.determinism.passage():
            unrolled.recording = unrolled.adjoint.record(unrolled.problem, theta0.detach())
            result = unrolled.recording.forward()
        if unrolled.data_versions() != unrolled.versions:
            raise UnsupportedError(CHANGED_IN_PLACE.format("a tensor in batches or hyper"))
        tensors = result.tensors()
        unrolled.form = result.with_tensors(tuple(t.to("meta") for t in tensors))
        return tensors

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple[Tensor | None, ...]:
        unrolled: Unrolled = ctx.unrolled
        problem = unrolled.problem
        found = unrolled.go_back(bars)
        tables = [found.tables.get(name) for name in problem.update.tables]
        slots = [None if found.slots is None else found.slots[name] for name in problem.start.slots]
        gradients = (found.theta, *tables, *found.batches, *found.hypers, *slots)
        if torch.is_grad_enabled():  # backward(create_graph=True)
            inputs = ctx.saved_tensors
            gradients = tuple(None if g is None else _OnceOnly.apply(g, *inputs) for g in gradients)  # type: ignore[no-untyped-call]
        return (None, *gradients)


class _OnceOnly(torch.autograd.Function):
    """Passes a hypergradient through, and says what to do when it is differentiated in its turn.

    It hangs on everything that the hypergradient depends on: a derivative with respect to any of it comes past here.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise UnsupportedError(
            "a hypergradient of rd.unroll cannot be differentiated again with this adjoint; use adjoint=rd.Backprop(), "
            "or backward() without create_graph=True"
        )
