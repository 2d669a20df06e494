"""Training in fixed point: a state that steps forward, and steps back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from revdistill.engine.adjoints.guard import Guard, SuspicionError
from revdistill.engine.adjoints.result import Result
from revdistill.engine.compiling import warn_of_replays
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.integers.history import History
from revdistill.engine.integers.snapshot import Snapshot
from revdistill.engine.loss.linearization import Linearization
from revdistill.engine.optimizers.sources import THETA
from revdistill.engine.problem import Problem
from revdistill.engine.progress import Bar
from revdistill.engine.ranks.same import STEPS, compare_theta

BeforeStep = Callable[[int], None]
AfterStep = Callable[[int, Linearization | None], None]  # None: of a step that was replayed


class OtherBitsError(Exception):
    """A replayed step was not the eager one, at a later step: all steps are to be made again, eagerly. Says why."""


class Replays(Protocol):
    """What may make a step in the place of `Trajectory.step`. loss: of the last step that it made, 0-dim."""

    loss: Tensor

    def makes(self, k: int) -> bool:
        """Make step k; False where it is to be made eagerly. Raises: SuspicionError, OtherBitsError."""

    def flush(self) -> None:
        """Read what was noted. Raises: SuspicionError."""

    def release(self) -> None:
        """The state is the trajectory's own again."""


def _nothing(*_: object) -> None:
    return


class Trajectory:
    """The state of one unroll.

    Args:
        problem: what is unrolled.
        theta0: float [numel], the parameters at the start.
        fixed: the number format of theta and of most slots.
        history: where spilled words go.
        replays: makes what replays some of the steps, where the problem says that they are to be.

    Attributes:
        was_replayed: whether some of the steps were.
    """

    def __init__(
        self,
        problem: Problem,
        theta0: Tensor,
        fixed: FixedPoint,
        history: History,
        replays: Callable[[Trajectory], Replays | None] | None = None,
    ) -> None:
        self.problem, self.fixed, self.history = problem, fixed, history
        self._theta0 = theta0
        self._buffer = torch.empty_like(theta0)
        self._forward = problem.update.moves
        self._blind, self._seeing = problem.update.blind[::-1], problem.update.seeing[::-1]
        self._clipping = problem.update.clipping
        self._reset(problem.interval)
        self._shown = 0  # steps that `on_step` has seen: where steps are made again, it does not see them again
        self.was_replayed = False
        self._replayed: Replays | None = replays(self) if replays is not None and problem.replays else None

    def _reset(self, interval: int) -> None:
        self._start: Snapshot | None = None
        problem = self.problem
        self.guard = Guard(problem.update, self.fixed, problem.backend, interval, problem.start.taken)
        self.guard.start(self._theta0, problem.begin.slots)
        self.history.clear()
        self._saved: dict[int, Tensor] = {}
        self._sum = None if problem.average is None else torch.zeros_like(self._theta0, dtype=torch.float64)
        theta = self.fixed.from_float(self._theta0)
        self.state = problem.update.initial_state(theta, self.fixed, self.history, problem.backend)
        if problem.start.slots:
            self._resume()

    def _resume(self) -> None:
        """Where an earlier training ended: at its very integers, where the floats that came in are theirs."""
        state, start, integers = self.state, self.problem.begin, self.problem.resumed
        floats = {THETA: self._theta0} | {name: values.detach() for name, values in start.slots.items()}
        theirs = integers is not None and integers.fits(state) and integers.stands_for(floats, state.backend)
        if self.problem.on_all_ranks(theirs):
            assert integers is not None
            integers.restore(state)
        else:
            for name in start.slots:
                state.backend.add(state.numbers[name], floats[name], state.formats[name].scale, 1)
            state.backend.settle()
        self._start = Snapshot(state, with_slots=True)

    def start_here(self, history: History) -> None:
        """The way back is to end at this very state. history: takes the words spilled from here on."""
        history.clear()
        self.history = history
        for store in self.state.all_stores():
            store.history = history
        self._start = Snapshot(self.state, with_slots=True)

    def run(self, before_step: BeforeStep = _nothing, after_step: AfterStep = _nothing) -> None:
        """All steps forward, with a call before and after each; then the checks that are still open."""
        try:
            self._run(before_step, after_step)
        except SuspicionError:
            # The same steps again, looked at one by one: raises the named error, or shows that nothing was wrong.
            self.was_replayed = False
            self._reset(interval=1)
            self._run(before_step, after_step)
        except OtherBitsError as error:
            warn_of_replays(str(error))
            self.was_replayed = False
            self.problem.gradient.look_at_all()
            self._reset(self.problem.interval)
            self.run(before_step, after_step)

    def _run(self, before_step: BeforeStep, after_step: AfterStep) -> None:
        bar = Bar(self.problem.progress, self.problem.steps, "forward", "loss")
        try:
            self._steps(before_step, after_step, bar)
            if self._replayed is not None:
                self._replayed.flush()
        finally:
            bar.close()
            if self._replayed is not None:
                self._replayed.release()
            self._replayed = None
        self.guard.flush(self.state)
        self.problem.gradient.flush()

    def _steps(self, before_step: BeforeStep, after_step: AfterStep, bar: Bar) -> None:
        for k in range(self.problem.steps):
            before_step(k)
            self._compare(k)
            self._save(k)
            on_step = self.problem.on_step if k >= self._shown else None
            theta = None if on_step is None else self.theta().clone()
            linear = None if self._replayed is not None and self._replayed.makes(k) else self.step(k)
            if on_step is not None:
                assert theta is not None
                self._shown = k + 1
                with self.problem.determinism.watching():
                    on_step(self.problem.number(k), self.problem.views(k, theta), self._loss(linear).clone())
            after_step(k, linear)
            if self.problem.progress:
                bar.step(lambda linear=linear: self._loss(linear))  # type: ignore[misc]
        self._save(self.problem.steps)
        self._compare(self.problem.steps)

    def _compare(self, k: int) -> None:
        """Theta with that of other ranks, where each keeps all of it: once in a while and at the end."""
        problem = self.problem
        if problem.ranks is not None and problem.shards is None and (k == problem.steps or (k and k % STEPS == 0)):
            compare_theta(problem.ranks, k, self.state.numbers[THETA], problem.number(k))

    def _loss(self, linear: Linearization | None) -> Tensor:
        """Of the last step."""
        if linear is not None:
            return linear.loss
        assert self._replayed is not None
        return self._replayed.loss

    def _save(self, k: int) -> None:
        if k in self.problem.saved_steps:
            self._saved[k] = self.theta().clone()
        if self._sum is not None:
            assert self.problem.average is not None
            self._sum.add_(self.theta(), alpha=self.problem.average[k])

    def result(self) -> Result:
        """After all steps, in new tensors."""
        problem = self.problem
        if problem.save_at is None:
            theta = self.theta().clone()
        else:
            theta = torch.stack([self._saved[k] for k in problem.save_at])
        average = None if self._sum is None else self._sum.to(theta.dtype)
        if not problem.returns_state:
            return Result(theta, average)
        return Result(theta, average, self.slots(), Snapshot(self.state, with_slots=True))

    def theta(self) -> Tensor:
        """theta as floats, in a buffer that the next call overwrites."""
        return self.problem.backend.to_float(self.state.numbers[THETA], self._buffer, self.fixed)

    def theta_in(self, out: Tensor) -> None:
        """theta as floats, in `out`."""
        self.problem.backend.to_float(self.state.numbers[THETA], out, self.fixed)

    def give_buffer_away(self) -> None:
        """The tensor that `theta` returned last stays as it is."""
        self._buffer = torch.empty_like(self._buffer)

    def slots(self) -> dict[str, Tensor]:
        """The running averages as floats, in new tensors."""
        return {slot: self.state.floats(slot, self._buffer.dtype) for slot in self.problem.update.slots}

    def step(self, k: int, *, again: bool = False) -> Linearization:
        """theta_k -> theta_{k+1}. again: this step was made before; the values are known to be finite and in range."""
        state = self.state
        linear = self.problem.linearize(k, self.theta())
        gradient = linear.gradient
        if not again:
            self.problem.gradient.fingerprints.record(k, gradient if linear.own is None else linear.own)
        if self._clipping is not None:
            gradient = self._clipping.clipped(k, gradient)
        proved = again or self.guard.before_step(k, linear.loss, gradient, state)
        for move in self._forward:
            if not proved:
                self.guard.before_move(k, move, state, gradient)
            move.forward(k, state, gradient)
        self.problem.backend.settle()
        return linear

    def undo_to_theta(self, k: int) -> None:
        """theta_{k+1} -> theta_k, by the moves that need neither theta nor the gradient."""
        for move in self._blind:
            move.inverse(k, self.state, None)
        self.problem.backend.settle()

    def undo_rest(self, k: int, gradient: Tensor) -> None:
        """The slots go back to those of before step k. gradient: bit-identical to the one of the way forward."""
        if self._clipping is not None:
            gradient = self._clipping.clipped(k, gradient)
        for move in self._seeing:
            move.inverse(k, self.state, gradient)
        self.problem.backend.settle()

    def is_back_at_start(self) -> bool:
        """theta and the slots equal the start bit for bit, and the bit stores are as they were (invariant 3)."""
        if self._start is not None:
            return not (self.history.nbytes or bool(self._start.differs(self.state)))
        differs = (self.state.numbers[THETA] != self.fixed.from_float(self._theta0)).any()
        for slot in self.problem.update.slots:
            differs = differs | self.state.numbers[slot].any()
        for store in self.state.all_stores():
            differs = differs | ~store.is_empty()
        return not bool(differs)
