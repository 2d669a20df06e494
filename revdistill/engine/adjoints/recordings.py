"""What a forward pass leaves for the way back: the state at its end, snapshots, or every theta_k."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.engine.adjoints.snapshot import Snapshot
from revdistill.engine.adjoints.sweep import Hypergradients, Sweep, wants_slots
from revdistill.engine.adjoints.trajectory import Problem, Trajectory
from revdistill.engine.errors import ReversalError
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.integers.history import History, NoHistory
from revdistill.engine.loss.gradient import Linearization
from revdistill.engine.optimizers.moves import THETA

_NONDETERMINISTIC = (
    "The loss must be deterministic: no random numbers but torch's (the engine seeds those, and torch has one "
    "generator for "
    "all threads: a thread outside an unroll may not draw from it meanwhile), no counters or other state "
    "that changes between calls, the module in the same training mode, batches given as a function must return the "
    "same "
    "tensors for the same k. adjoint=rd.Backprop() needs no second evaluation"
)


@dataclass(frozen=True)
class UnrollStats:
    """What one forward pass kept.

    state_bytes: theta, the running averages and the bit store's heads. history_bytes: the words spilled so far
    (Reversible), or the snapshots (Checkpoint, StoreAll); None for Backprop, whose graphs are not counted.
    """

    steps: int
    parameters: int
    state_bytes: int
    history_bytes: int | None

    @property
    def history_bits_per_parameter_step(self) -> float | None:
        """8 history_bytes / (parameters steps); None for Backprop."""
        if self.history_bytes is None:
            return None
        return 8 * self.history_bytes / max(1, self.parameters * self.steps)


def _nothing(*_: object) -> None:
    return


class Recording(ABC):
    """A forward pass that can be gone back over once."""

    theta: Tensor  # theta_T, float [numel], or theta at save_at [n, numel]
    stats: UnrollStats

    @abstractmethod
    def backward(self, sweep: Sweep) -> Hypergradients:
        """Carry the sweep from the last step to the first."""


class Reversal(Recording):
    """The state at the end, the words spilled on the way, and the graphs of the last steps, as many as fit in
    `graph_bytes`.

    Each step is undone; the gradient of a step whose graph was kept is not evaluated again.
    """

    def __init__(
        self, problem: Problem, theta0: Tensor, fixed: FixedPoint, history: History, graph_bytes: int = 0
    ) -> None:
        self._graph_bytes, self._first_kept = graph_bytes, problem.steps
        self._problem, self._history = problem, history
        self._kept: dict[int, Linearization] = {}
        # Before the window nothing is kept: its steps are not gone back over.
        self._trajectory = Trajectory(problem, theta0, fixed, NoHistory() if problem.first else history)
        self._trajectory.run(self._before_step, self._keep if graph_bytes else _nothing)
        self.theta = self._trajectory.result()
        self.stats = stats_of(self._trajectory, self._trajectory.history.nbytes)

    def _before_step(self, k: int) -> None:
        if k and k == self._problem.first:
            self._trajectory.start_here(self._history)

    def _keep(self, k: int, at: Linearization) -> None:
        if k == self._problem.first:  # all steps' graphs are alike: the first tells how many fit
            nbytes = at.nbytes
            fitting = self._graph_bytes // nbytes if nbytes else 0
            self._first_kept = max(k, self._problem.steps - fitting)
            self._kept.clear()
        if k >= self._first_kept:
            self._kept[k] = at
            self._trajectory.give_buffer_away()  # the graph refers to it

    def backward(self, sweep: Sweep) -> Hypergradients:
        trajectory, problem = self._trajectory, sweep.problem
        keep = wants_slots(problem)
        slots = trajectory.slots() if keep else {}
        same = _Same(problem)
        for k in reversed(range(problem.first, problem.steps)):
            trajectory.undo_drifts(k)
            theta = trajectory.theta()
            at = self._kept.pop(k, None) or problem.gradient.linearize(k, theta)

            def undo(k: int = k, at: Linearization = at) -> dict[str, Tensor]:
                gradient = (
                    at.gradient
                )  # once: a compiled one is told apart by its fingerprint each time it is asked for
                same.check(k, gradient)
                trajectory.undo_kicks_and_decays(k, gradient)
                return trajectory.slots() if keep else {}

            slots = sweep.step(k, theta, at, after=slots, before=undo)
        same.finish()
        result = sweep.finish()
        back = trajectory.is_back_at_start()
        trajectory.history.clear()
        if not back:
            raise ReversalError(
                f"the way back over {problem.steps - problem.first} steps did not end bit-exactly at the start, so the "
                f"hypergradient would be wrong and is not returned. {_NONDETERMINISTIC}"
            )
        return result


class Checkpoints(Recording):
    """Snapshots of the integers; each stretch between two of them is run again."""

    def __init__(self, problem: Problem, theta0: Tensor, fixed: FixedPoint, every: int | None) -> None:
        self._every, self._first = every or max(1, math.isqrt(problem.steps - problem.first)), problem.first
        self._trajectory = Trajectory(problem, theta0, fixed, NoHistory())
        # Without momentum each v is overwritten before it is read: theta alone is a snapshot.
        self._with_slots = problem.update.keeps_memory(problem.steps)
        self._snapshots: dict[int, Snapshot] = {}
        self._trajectory.run(self._before_step)
        self.theta = self._trajectory.result()
        self._end = self._trajectory.state.fixed[THETA].clone()
        self.stats = stats_of(self._trajectory, sum(s.nbytes for s in self._snapshots.values()))

    def _before_step(self, k: int) -> None:
        if k >= self._first and (k - self._first) % self._every == 0:
            self._snapshots[k] = Snapshot(self._trajectory.state, with_slots=self._with_slots)

    def backward(self, sweep: Sweep) -> Hypergradients:
        problem, end = sweep.problem, self._end
        for start in reversed(range(problem.first, problem.steps, self._every)):
            snapshot = self._snapshots.pop(start)
            snapshot.restore(self._trajectory.state)
            stretch, same = _Stretch(self._trajectory), _Same(problem)
            for k in range(start, min(start + self._every, problem.steps)):
                stretch.before_step(k)
                at = self._trajectory.step(k, again=True)
                same.check(k, at.gradient)
                stretch.after_step(k, at)
            same.finish()
            if not torch.equal(self._trajectory.state.fixed[THETA], end):
                raise ReversalError(
                    f"running steps {start} to {k} again did not end bit-exactly where the forward pass ended, so the "
                    f"hypergradient would be wrong and is not returned. {_NONDETERMINISTIC}"
                )
            stretch.sweep_back(sweep)
            end = snapshot.theta
        return sweep.finish()


class Stored(Recording):
    """Every theta_k as floats."""

    def __init__(self, problem: Problem, theta0: Tensor, fixed: FixedPoint) -> None:
        trajectory = Trajectory(problem, theta0, fixed, NoHistory())
        self._stretch = _Stretch(trajectory)
        trajectory.run(self._stretch.before_step, self._stretch.after_step)
        self.theta = trajectory.result()
        self.stats = stats_of(trajectory, self._stretch.nbytes)

    def backward(self, sweep: Sweep) -> Hypergradients:
        self._stretch.sweep_back(sweep)
        return sweep.finish()


class _Stretch:
    """theta_k, and the slots where they are needed, as floats over some steps; and the sweep back over them."""

    def __init__(self, trajectory: Trajectory) -> None:
        self._trajectory = trajectory
        self._keep, self._first = wants_slots(trajectory.problem), trajectory.problem.first
        self._thetas: dict[int, Tensor] = {}
        self._slots: dict[int, dict[str, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        tensors = [*self._thetas.values(), *(t for slots in self._slots.values() for t in slots.values())]
        return sum(t.nbytes for t in tensors)

    def before_step(self, k: int) -> None:
        if k < self._first:
            return
        self._thetas[k] = self._trajectory.theta().clone()
        if self._keep and k not in self._slots:
            self._slots[k] = self._trajectory.slots()

    def after_step(self, k: int, _: Linearization) -> None:
        if self._keep and k >= self._first:
            self._slots[k + 1] = self._trajectory.slots()

    def sweep_back(self, sweep: Sweep) -> None:
        """Go back over the steps that were kept, letting go of each."""
        same = _Same(sweep.problem)
        for k in sorted(self._thetas, reverse=True):
            theta = self._thetas.pop(k)
            at = sweep.problem.gradient.linearize(k, theta)

            def before(k: int = k, at: Linearization = at) -> dict[str, Tensor]:
                same.check(k, at.gradient)
                return self._slots.get(k, {})

            sweep.step(k, theta, at, after=self._slots.pop(k + 1, {}), before=before)
        same.finish()


class _Same:
    """Raises ReversalError where a gradient evaluated again is not the one of the forward pass, to the bit."""

    def __init__(self, problem: Problem) -> None:
        self._fingerprints = problem.gradient.fingerprints
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

    def finish(self) -> None:
        """Read what was noted."""
        if self._first is not None and int(self._first) >= 0:
            self._raise(int(self._first))

    def _raise(self, k: int) -> None:
        raise ReversalError(
            f"the gradient at step {k} was not the same bit for bit when it was evaluated again, so the way back "
            "cannot end "
            f"bit-exactly at the start and no hypergradient is returned. {_NONDETERMINISTIC}"
        )


def stats_of(trajectory: Trajectory, history_bytes: int) -> UnrollStats:
    """The figures of a forward pass."""
    problem = trajectory.problem
    return UnrollStats(problem.steps, problem.update.layout.numel, trajectory.state.nbytes, history_bytes)
