"""Training in fixed point: a state that steps forward, and steps back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from revdistill.engine.adjoints.guard import GPU_INTERVAL, Guard, SuspicionError
from revdistill.engine.adjoints.snapshot import Snapshot
from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.integers.history import History
from revdistill.engine.integers.wide import Wide, add_
from revdistill.engine.loss.data import Data
from revdistill.engine.loss.determinism import Determinism
from revdistill.engine.loss.gradient import Gradient, Linearization
from revdistill.engine.optimizers.moves import GRADIENT, THETA, Add, Decay, Derived, Stage, Update

# (bit store, slot, n) for each decay; (target, source, factor) for each kick or drift, a target [2, numel] being a wide
# one.
Pushes = Sequence[tuple[BitStore, Tensor, int]]
Adds = Sequence[tuple[Tensor, Tensor, float | Tensor]]

OnStep = Callable[[int, dict[str, Tensor], Tensor], object]
OnStepBack = Callable[[int, float], object]
BeforeStep = Callable[[int], None]
AfterStep = Callable[[int, Linearization], None]


def _nothing(*_: object) -> None:
    return


class Kernels:
    """The integer work of a step, in place; `compile=True` replaces it by a compiled one with the same bits."""

    def forward(self, pushes: Pushes, adds: Adds) -> None:
        for store, slot, n in pushes:
            store.multiply_(slot, n)
        for target, source, factor in adds:
            add_(target, source, factor, sign=1)

    def inverse(self, pushes: Pushes, adds: Adds) -> None:
        for target, source, factor in reversed(adds):
            add_(target, source, factor, sign=-1)
        for store, slot, n in reversed(pushes):
            store.divide_(slot, n)


@dataclass(frozen=True)
class Problem:
    """Everything that defines one unroll, whatever its adjoint: gradient of the loss, optimizer, data, number
    of steps.
    """

    gradient: Gradient
    update: Update
    data: Data
    ambient: Determinism
    steps: int
    kernels: Kernels
    on_step: OnStep | None = None
    first: int = 0  # the way back goes no further: dL/d(...) of the steps before it is left out
    clip_back: float | None = None  # the largest norm of dL/d(theta_k) that is carried on
    on_step_back: OnStepBack | None = None
    save_at: tuple[int, ...] | None = None  # the result is theta at these steps, stacked; None: theta_T alone

    @cached_property
    def saved_steps(self) -> frozenset[int]:
        """`save_at`, to be looked into at each step."""
        return frozenset(self.save_at or ())

    @property
    def looks_back(self) -> bool:
        """Whether something is done with dL/d(theta_k) on the way back."""
        return self.clip_back is not None or self.on_step_back is not None

    def look_back(self, k: int, theta_bar: Tensor) -> Tensor:
        """dL/d(theta_k) [numel] as it is carried on: its norm told, and scaled down to `clip_back`."""
        norm = float(torch.linalg.vector_norm(theta_bar.detach(), dtype=torch.float64))
        if self.on_step_back is not None:
            self.on_step_back(k, norm)
        if self.clip_back is None or not norm > self.clip_back:
            return theta_bar
        return theta_bar * (self.clip_back / norm)

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
        return {slot: self._floats(slot, torch.empty_like(self._buffer)) for slot in self.problem.update.slots}

    def step(self, k: int, *, again: bool = False) -> Linearization:
        """theta_k -> theta_{k+1}. again: this step was made before; the values are known to be finite and in range."""
        at = self.problem.gradient.linearize(k, self.theta())
        gradient = at.gradient
        if not again:
            self.problem.gradient.fingerprints.record(k, gradient)
        proved = again or self.guard.before_step(k, at.loss, gradient, self.state)
        for stage in self.problem.update.stages:
            values = self._derive(k, stage.derived, {GRADIENT: gradient})
            if proved:
                self.problem.kernels.forward(
                    self._make_room(k, stage), [self._operands(k, add, values) for add in stage.adds]
                )
            else:
                self.problem.kernels.forward(self._make_room(k, stage), [])
                for add in stage.adds:
                    self.guard.before_add(k, add, self.state, values)
                    self.problem.kernels.forward([], [self._operands(k, add, values)])
            for peak in stage.peaks:
                peak.forward(self.state)
        return at

    def undo_drifts(self, k: int) -> None:
        """theta_{k+1} -> theta_k; the slots stay those of after step k."""
        self._undo(k, self.problem.update.stages[1], {})

    def undo_kicks_and_decays(self, k: int, gradient: Tensor) -> None:
        """The slots go back to those of before step k. gradient: bit-identical to the one of the way forward."""
        self._undo(k, self.problem.update.stages[0], {GRADIENT: gradient})

    def _undo(self, k: int, stage: Stage, known: dict[str, Tensor]) -> None:
        values = self._derive(k, stage.derived, known)
        parts = self._parts(k, stage.decays)
        pushes = [(store, slot, n) for slot, store, n in parts if store.pushes(n)]
        self.problem.kernels.inverse(pushes, [self._operands(k, add, values) for add in stage.adds])
        for slot, store, n in reversed(parts):
            store.after_undecay(slot, n)

    def _derive(self, k: int, derived: Sequence[Derived], known: dict[str, Tensor]) -> dict[str, Tensor]:
        """`known`, and what is derived from it and from the state, in float64: the same bits in both directions."""
        values = dict(known)
        for function in derived:
            inputs = {
                name: values[name].double() if name in values else self._float64(name) for name in function.inputs
            }
            values[function.name] = function.value(inputs, lambda table: table.at(k))
        return values

    def _float64(self, name: str) -> Tensor:
        return self._floats(name, torch.empty_like(self._buffer, dtype=torch.float64))

    def _floats(self, name: str, out: Tensor) -> Tensor:
        return self._format(name).to_float(self.state.fixed[name], out=out)

    def _format(self, name: str) -> FixedPoint | Wide:
        return self.problem.update.format_of(name, self.fixed)

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

    def _parts(self, k: int, decays: Sequence[Decay]) -> list[tuple[Tensor, BitStore, int]]:
        return [part for decay in decays for part in decay.parts(k, self.state)]

    def _make_room(self, k: int, stage: Stage) -> Pushes:
        parts = self._parts(k, stage.decays)
        return [(store, slot, n) for slot, store, n in parts if store.before_decay(slot, n)]

    def _operands(self, k: int, add: Add, values: dict[str, Tensor]) -> tuple[Tensor, Tensor, float | Tensor]:
        target, scale = self.state.fixed[add.target], self._format(add.target).scale
        if add.source in values:
            source = values[add.source]
        else:
            source, scale = self.state.fixed[add.source], scale / self._format(add.source).scale
        # One multiplication: the scale is a power of two, so factor * scale is exact.
        return target, source, add.factor.at(k) * scale
