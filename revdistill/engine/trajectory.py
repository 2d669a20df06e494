"""Training in fixed point: a state that steps forward, and steps back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from revdistill.engine.ambient import Ambient
from revdistill.engine.bitstore import divide_, multiply_
from revdistill.engine.fixedpoint import FixedPoint, add_rounded_
from revdistill.engine.gradient import Data, Gradient, Linearization
from revdistill.engine.guard import GPU_INTERVAL, Guard, SuspicionError
from revdistill.engine.history import History
from revdistill.engine.moves import GRADIENT, THETA, Add, Update
from revdistill.engine.snapshot import Snapshot

# (slot, head, n) for each decay of a step; (target, source, factor) for each kick or drift.
Pushes = Sequence[tuple[Tensor, Tensor, int]]
Adds = Sequence[tuple[Tensor, Tensor, float | Tensor]]

OnStep = Callable[[int, dict[str, Tensor], Tensor], object]
BeforeStep = Callable[[int], None]
AfterStep = Callable[[int, Linearization], None]


def _nothing(*_: object) -> None:
    return


class Kernels:
    """The integer work of a step, in place; `compile=True` replaces it by a compiled one with the same bits."""

    def forward(self, pushes: Pushes, adds: Adds) -> None:
        for slot, head, n in pushes:
            multiply_(slot, head, n)
        for target, source, factor in adds:
            add_rounded_(target, source, factor, sign=1)

    def inverse(self, pushes: Pushes, adds: Adds) -> None:
        for target, source, factor in reversed(adds):
            add_rounded_(target, source, factor, sign=-1)
        for slot, head, n in reversed(pushes):
            divide_(slot, head, n)


@dataclass(frozen=True)
class Problem:
    """Everything that defines one unroll, whatever its adjoint: gradient of the loss, optimizer, data, number of steps."""

    gradient: Gradient
    update: Update
    data: Data
    ambient: Ambient
    steps: int
    kernels: Kernels
    on_step: OnStep | None = None
    first: int = 0  # the way back goes no further: dL/d(...) of the steps before it is left out
    save_at: tuple[int, ...] | None = None  # the result is theta at these steps, stacked; None: theta_T alone

    @cached_property
    def saved_steps(self) -> frozenset[int]:
        """`save_at`, to be looked into at each step."""
        return frozenset(self.save_at or ())

    @property
    def check_interval(self) -> int:
        return 1 if self.update.layout.device.type == "cpu" else GPU_INTERVAL


class Trajectory:
    """The state of one unroll. theta0: float [numel], the parameters at the start; history: where spilled words go."""

    def __init__(self, problem: Problem, theta0: Tensor, fixed: FixedPoint, history: History) -> None:
        self.problem, self.fixed, self.history = problem, fixed, history
        self._theta0 = theta0
        self._buffer = torch.empty_like(theta0)
        self._reset(problem.check_interval)

    def _reset(self, interval: int) -> None:
        self._start: Snapshot | None = None
        self.guard = Guard(self.problem.update, self.fixed, interval)
        self.guard.start(self._theta0)
        self.history.clear()
        self._saved: dict[int, Tensor] = {}
        self.state = self.problem.update.initial_state(self.fixed.from_float(self._theta0), self.history)

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
            self._run(before_step, after_step, self.problem.on_step)
        except SuspicionError:
            # The same steps again, looked at one by one: raises the named error, or shows that nothing was wrong.
            self._reset(interval=1)
            self._run(before_step, after_step, on_step=None)

    def _run(self, before_step: BeforeStep, after_step: AfterStep, on_step: OnStep | None) -> None:
        for k in range(self.problem.steps):
            before_step(k)
            self._save(k)
            if on_step is None:
                at = self.step(k)
            else:
                theta = self.theta().clone()
                at = self.step(k)
                with self.problem.ambient.watching():
                    on_step(k, self.problem.update.layout.views(theta), at.loss)
            after_step(k, at)
        self._save(self.problem.steps)
        self.guard.flush(self.state)

    def _save(self, k: int) -> None:
        if k in self.problem.saved_steps:
            self._saved[k] = self.theta().clone()

    def result(self) -> Tensor:
        """After all steps, in a new tensor: theta_T as floats [numel], or theta at `save_at` [n, numel]."""
        if self.problem.save_at is None:
            return self.theta().clone()
        return torch.stack([self._saved[k] for k in self.problem.save_at])

    def theta(self) -> Tensor:
        """theta as floats, in a buffer that the next call overwrites."""
        return self.fixed.to_float(self.state.fixed[THETA], out=self._buffer)

    def give_buffer_away(self) -> None:
        """The tensor that `theta` returned last stays as it is."""
        self._buffer = torch.empty_like(self._buffer)

    def slots(self) -> dict[str, Tensor]:
        """The running averages as floats, in new tensors."""
        return {
            slot: self.fixed.to_float(self.state.fixed[slot], out=torch.empty_like(self._buffer))
            for slot in self.problem.update.slots
        }

    def step(self, k: int, *, again: bool = False) -> Linearization:
        """theta_k -> theta_{k+1}. again: this step was made before; the values are known to be finite and in range."""
        update, state = self.problem.update, self.state
        at = self.problem.gradient.linearize(k, self.theta())
        gradient = at.gradient
        moves = (*update.kicks, *update.drifts)
        if not again:
            self.problem.gradient.fingerprints.record(k, gradient)
        if again or self.guard.before_step(k, at.loss, gradient, state):
            self.problem.kernels.forward(self._make_room(k), [self._operands(k, add, gradient) for add in moves])
        else:
            self.problem.kernels.forward(self._make_room(k), [])
            for add in moves:
                self.guard.before_add(k, add, state, gradient)
                self.problem.kernels.forward([], [self._operands(k, add, gradient)])
        return at

    def undo_drifts(self, k: int) -> None:
        """theta_{k+1} -> theta_k; the slots stay those of after step k."""
        self.problem.kernels.inverse([], [self._operands(k, add, None) for add in self.problem.update.drifts])

    def undo_kicks_and_decays(self, k: int, gradient: Tensor) -> None:
        """The slots go back to those of before step k. gradient: bit-identical to the one of the way forward."""
        update, state = self.problem.update, self.state
        parts = [part for decay in update.decays for part in decay.parts(k, state)]
        pushes = [(slot, store.head, n) for slot, store, n in parts if store.pushes(n)]
        self.problem.kernels.inverse(pushes, [self._operands(k, add, gradient) for add in update.kicks])
        for slot, store, n in reversed(parts):
            store.after_undecay(slot, n)

    def is_back_at_start(self) -> bool:
        """theta and the slots equal the start bit for bit, and the bit stores are as they were (invariant 3)."""
        if self._start is not None:
            return not (self.history.nbytes or bool(self._start.differs(self.state)))
        differs = (self.state.fixed[THETA] != self.fixed.from_float(self._theta0)).any()
        for slot in self.problem.update.slots:
            differs = differs | self.state.fixed[slot].any()
        for store in self.state.all_stores():
            differs = differs | ~store.is_empty()
        return not bool(differs)

    def _make_room(self, k: int) -> Pushes:
        parts = [part for decay in self.problem.update.decays for part in decay.parts(k, self.state)]
        return [(slot, store.head, n) for slot, store, n in parts if store.before_decay(slot, n)]

    def _operands(self, k: int, add: Add, gradient: Tensor | None) -> tuple[Tensor, Tensor, float | Tensor]:
        factor = add.factor.at(k)
        if add.source != GRADIENT:
            return self.state.fixed[add.target], self.state.fixed[add.source], factor
        assert gradient is not None
        # One multiplication: the scale is a power of two, so factor * scale is exact.
        return self.state.fixed[add.target], gradient, factor * self.fixed.scale
