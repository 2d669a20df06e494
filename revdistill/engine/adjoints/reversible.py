"""The trajectory walked back bit for bit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from revdistill.engine.adjoints.adjoint import UnrollStats
from revdistill.engine.adjoints.fixed_point import FixedPointAdjoint, Recording
from revdistill.engine.adjoints.kept_data import KeptData
from revdistill.engine.adjoints.memory import free_bytes
from revdistill.engine.adjoints.repeated import NONDETERMINISTIC, Repeated
from revdistill.engine.adjoints.replayed import forward_of
from revdistill.engine.adjoints.replayed_back import back_of
from revdistill.engine.adjoints.result import Result
from revdistill.engine.adjoints.sweep import Hypergradients, Sweep
from revdistill.engine.adjoints.trajectory import Trajectory
from revdistill.engine.errors import ReversalError, UnsupportedError
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.integers.history import NoHistory, check_place, open_history
from revdistill.engine.loss.linearization import Linearization
from revdistill.engine.problem import Problem
from revdistill.engine.scalars import is_integer

Slots = dict[str, Tensor]
GRAPH_BYTES = 256 * 2**20
_SHARE = 16  # of the free memory, at most 1 / _SHARE goes to graphs that nobody asked for


@dataclass(frozen=True)
class Reversible(FixedPointAdjoint):
    """Walk the trajectory back bit for bit; what momentum destroys is kept in a bit store (Maclaurin et al. 2015).

    Cost: one gradient per step forward; one gradient and one double-backward product per step back. 24 bytes per
    parameter (theta, v, head) and log2(1/momentum) bits per parameter and step: 0.152 at 0.9. Use it for long unrolls
    with momentum. Without momentum each step loses v whole, 64 bits: use Checkpoint. After the way back the start is
    compared bit for bit, always; ReversalError where it differs.

    Args:
        history: where the bits are kept: "device", "host" (pinned when the device is CUDA) or a path (a temporary file
            in that folder, or beside that file name).
        fractional_bits: of theta and v; range |value| < 2^(62 - fractional_bits).
        graph_bytes: memory for the graphs of the last steps, as many as fit: their gradients are not evaluated again on
            the way back, so that a short unroll costs what autograd costs. None: 256 MiB, or a sixteenth of the memory
            that is free where that is less; 0: no graphs. (None are kept where `compile=True` compiles the product.)

    Raises:
        TypeError, ValueError: history or graph_bytes is none of these.
    """

    history: str | os.PathLike[str] = "device"
    fractional_bits: int = 44
    graph_bytes: int | None = None

    def __post_init__(self) -> None:
        check_place(self.history)
        if self.graph_bytes is not None:
            if not is_integer(self.graph_bytes):
                raise TypeError(f"graph_bytes must be an int or None, got {type(self.graph_bytes).__name__}")
            if self.graph_bytes < 0:
                raise ValueError(f"graph_bytes must be at least 0, got {self.graph_bytes}")
        FixedPoint(self.fractional_bits)

    def record(self, problem: Problem, theta0: Tensor) -> Recording:
        reason = problem.update.no_way_back
        if reason is not None:
            raise UnsupportedError(
                f"Reversible cannot walk back {reason}; use adjoint=rd.Checkpoint() (its default) or rd.StoreAll()"
            )
        return _Reversal(problem, theta0, self)


class _Reversal(Recording):
    """The state at the end, the words spilled on the way, and the graphs of the last steps."""

    def __init__(self, problem: Problem, theta0: Tensor, adjoint: Reversible) -> None:
        self._problem = problem
        self.history = open_history(adjoint.history, theta0.device)
        self._graph_bytes = adjoint.graph_bytes
        if problem.replays and problem.backend.interval > 1:  # no graph is evaluated step by step that could be kept
            self._graph_bytes = 0
        if self._graph_bytes is None:
            self._graph_bytes = min(GRAPH_BYTES, free_bytes(theta0.device) // _SHARE)
        if problem.ranks is not None:  # a kept graph is evaluated on no rank again, or on all
            self._graph_bytes = int(problem.ranks.agree("a number that all agree on", -1, self._graph_bytes, min))
        self._first_kept = problem.steps
        self._kept: dict[int, Linearization] = {}
        self._data = KeptData(problem.data, problem.determinism.modules, problem.backend, problem.start.taken)
        # Before the window nothing is kept: its steps are not gone back over.
        history = NoHistory() if problem.first else self.history
        self._trajectory = Trajectory(problem, theta0, adjoint.fixed, history, forward_of)

    def forward(self) -> Result:
        self._trajectory.run(self._before_step, self._after_step)
        self.stats = UnrollStats.of(self._trajectory, self._trajectory.history.nbytes)
        return self._trajectory.result()

    def _before_step(self, k: int) -> None:
        if k and k == self._problem.first:
            self._trajectory.start_here(self.history)

    def _after_step(self, k: int, linear: Linearization | None) -> None:
        if linear is None:
            return
        if k == self._problem.first and self._graph_bytes:  # all steps' graphs are alike: the first tells how many fit
            nbytes = linear.nbytes
            fitting = self._graph_bytes // nbytes if nbytes else 0
            self._first_kept = max(k, self._problem.steps - fitting)
            self._kept.clear()
        if k >= self._first_kept:
            self._kept[k] = linear
            self._data.note(k, linear.batch, linear.saved, rest=self._problem.steps - 1 - k)
            self._trajectory.give_buffer_away()  # the graph refers to it

    def backward(self, sweep: Sweep) -> Hypergradients:
        trajectory, problem, repeated = self._trajectory, sweep.problem, Repeated(sweep.problem)
        replayed = back_of(trajectory, sweep, repeated, partial(self._step_back, sweep=sweep, repeated=repeated))
        slots: Slots | None = None
        try:
            for k in reversed(range(problem.first, problem.steps)):
                if replayed is not None and replayed.makes(k):
                    slots = None
                    sweep.arrive(k, watched=True)
                else:
                    slots = self._step_back(k, sweep, repeated, slots, arrives=True)
            if replayed is not None:
                replayed.flush()
        finally:
            if replayed is not None:
                replayed.release()
        repeated.finish()
        found, back = sweep.finish(), trajectory.is_back_at_start()
        trajectory.history.clear()
        if not back:
            raise ReversalError(
                f"the way back over {problem.steps - problem.first} steps did not end bit-exactly at the start, so the "
                f"hypergradient would be wrong and is not returned. {NONDETERMINISTIC}"
            )
        return found

    def _step_back(
        self, k: int, sweep: Sweep, repeated: Repeated, slots: Slots | None = None, *, arrives: bool = False
    ) -> Slots:
        """Eagerly.

        Args:
            k: the step.
            sweep: over the steps.
            repeated: is told the gradient.
            slots: as floats, where they are known.
            arrives: whether the sweep is then at theta_k; otherwise `Sweep.arrive` is still to be called.

        Returns:
            The slots before the step, {} where they are not wanted.
        """
        trajectory, problem = self._trajectory, sweep.problem
        if slots is None:
            slots = trajectory.slots() if sweep.wants_slots else {}
        trajectory.undo_to_theta(k)
        theta = trajectory.theta()
        linear = self._kept.pop(k, None)
        if linear is None:
            linear = problem.linearize(k, theta)
        else:  # nothing is evaluated again that would tell
            self._data.check(k)
        sweep.to_theta(k, theta, linear, slots)
        gradient = linear.gradient  # asked for once: a compiled one tells itself by its fingerprint each time
        repeated.check(k, gradient if linear.own is None else linear.own)
        trajectory.undo_rest(k, gradient)
        slots = trajectory.slots() if sweep.wants_slots else {}
        sweep.to_start_of_step(k, slots, arrives=arrives)
        return slots
