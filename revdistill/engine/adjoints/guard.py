"""Nothing wraps around, saturates or turns NaN in silence (invariant 4 of the engine).

The guard keeps a proved upper bound on |theta| and on each slot, advanced by the largest gradient entry of each step.
Only where a bound reaches the limit is the data itself looked at, move by move, before the integers are touched.

On the CPU every step is checked before it is made. On a GPU that would wait for the device at each step, so the largest
entries are noted there and read every `interval` steps; what was wrong is then found by running again with interval 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NoReturn

import torch
from torch import Tensor

from revdistill.engine.errors import NonFiniteError, RangeError
from revdistill.engine.integers.backend import Backend
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.integers.state import State
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.moves import Add, Move
from revdistill.engine.optimizers.sources import GRADIENT, SLACK, THETA
from revdistill.engine.optimizers.update import Update

_SLOT_NAMES = {
    "v": "the velocity",
    "m": "the first moment",
    "s": "the second moment",
    "s_max": "the largest second moment",
    "a": "the mean gradient",
    "b": "the velocity",
}
_SLACK = 1.0 + 1e-9  # the bounds are floats themselves
_COARSEST = 2.0**-24  # of the steps that a rate makes of the velocity's: float32's for parameters between 1/2 and 1


class SuspicionError(Exception):
    """Something in the last interval may have gone wrong: run again, checking each step."""


class Guard:
    """interval: steps between looks at the device; taken: steps of the training before these, for messages."""

    def __init__(self, update: Update, fixed: FixedPoint, backend: Backend, interval: int, taken: int = 0) -> None:
        self._update, self._fixed, self._backend, self._interval = update, fixed, backend, interval
        self._taken = taken
        self._formats = update.formats_with(fixed)
        self._moves = [
            (move, move.target, self._formats[move.target].resolution, self._formats[move.target].limit)
            for move in update.moves
        ]
        self._bounds: dict[str, float] = {}
        self._notes: list[Tensor] = []
        self._first_note = 0

    def start(self, theta: Tensor, slots: Mapping[str, Tensor]) -> None:
        """Check the parameters and the running averages at the start (float, [numel]; no averages where all are 0)."""
        layout = self._update.layout
        start = float(self._backend.largest(theta))
        if not math.isfinite(start):
            name = layout.first_nonfinite(theta)
            raise NonFiniteError(f"params[{name!r}] is not finite at the start", parameter=name, step=0)
        if not start < self._fixed.limit:
            self._raise_range(theta.double(), -1, THETA)
        self._check_resolution(start)
        # A state's integers are finer than the floats that stand for them.
        slack = SLACK if slots else 1.0
        self._bounds = {THETA: start * slack} | dict.fromkeys(self._update.slots, 0.0)
        for slot, values in slots.items():
            largest = float(self._backend.largest(values.detach()))
            if not largest < self._formats[slot].limit:
                self._raise_range(values.detach().double(), -1, slot)
            self._bounds[slot] = largest * slack + self._formats[slot].resolution
        self._notes, self._first_note = [], 0

    def _check_resolution(self, largest: float) -> None:
        """Raise the RangeError of a rate that makes coarse steps of a velocity's last digits. largest: parameter."""
        velocities = set(self._update.slots) - self._update.formats.keys()
        for move in self._update.moves:
            if move.target != THETA or velocities.isdisjoint(move.reads) or not isinstance(move, Add):
                continue
            rate, k, position = move.factor.tables["lr"].largest()
            if rate * self._fixed.resolution > _COARSEST * max(1.0, largest):
                bits = self._fixed.fractional_bits
                raise RangeError(
                    f"lr is {rate:g} at step {k + self._taken}: the velocity is kept in steps of 2^-{bits}, which this "
                    f"rate makes steps of {rate * self._fixed.resolution:.1e} of params; multiply the loss by a factor "
                    f"and divide lr by it, or give the adjoint more fractional_bits than {bits}",
                    parameter=self._update.layout.name_at(position),
                    step=k + self._taken,
                    value=rate,
                )

    def before_step(self, k: int, loss: Tensor, gradient: Tensor, state: State) -> bool:
        """Look at step k's loss and gradient before any integer changes. False: call `before_move` before each move."""
        entry = self._backend.largest(gradient)
        if self._interval > 1:
            if len(self._notes) == self._interval:
                self.flush(state)
            self._notes.append(torch.stack([torch.as_tensor(entry).double(), loss.double()]))
            return True
        entry, value = float(entry), float(loss)
        if not (math.isfinite(entry) and math.isfinite(value)):
            self._raise_nonfinite(k, value, gradient)
        if self._advance(k, entry):
            return True
        self._tighten(state, self._largest(state).tolist())
        return self._advance(k, entry)

    def flush(self, state: State) -> None:
        """Read the notes, all of steps that `state` has behind it. Raises SuspicionError."""
        if not self._notes:
            return
        notes, self._notes = torch.stack(self._notes), []
        self.read(notes, state)

    def read(self, notes: Tensor, state: State) -> None:
        """As `flush`, of steps that others have noted. notes: float64 [steps, 2], the gradient's largest entry and the
        loss of each.
        """
        *rows, reached = _read([*notes.unbind(0), self._largest(state)])
        for offset, (entry, value) in enumerate(rows):
            finite = math.isfinite(entry) and math.isfinite(value)
            if not finite or not self._advance(self._first_note + offset, entry):
                raise SuspicionError
        self._first_note += len(rows)
        self._tighten(state, reached)

    def before_move(self, k: int, move: Move, state: State, gradient: Tensor) -> None:
        """Raise RangeError if this move would leave the range."""
        after = move.reached(k, state, gradient)
        if after is None:
            return
        reached = float(self._backend.largest(after))
        if not reached < self._formats[move.target].limit:
            self._raise_range(after, k, move.target)
        self._bounds[move.target] = reached

    def _advance(self, k: int, largest_gradient: float) -> bool:
        """Advance the bounds over step k; False, and no change, if one would reach the limit."""
        bounds = {**self._bounds, GRADIENT: largest_gradient}
        for move, target, resolution, limit in self._moves:
            bounds[target] = bound = move.bound(k, bounds, resolution)
            if not bound < limit:
                return False
        del bounds[GRADIENT]
        self._bounds = bounds
        return True

    def _largest(self, state: State) -> Tensor:
        """Of theta and of each slot, float64."""
        return torch.stack([torch.as_tensor(self._backend.largest(state.floats(name))) for name in state.numbers])

    def _tighten(self, state: State, reached: list[float]) -> None:
        self._bounds = {name: value * _SLACK for name, value in zip(state.numbers, reached, strict=True)}

    def _raise_nonfinite(self, k: int, loss: float, gradient: Tensor) -> None:
        raise not_finite(self._update.layout, k + self._taken, loss, gradient)

    def _raise_range(self, values: Tensor, k: int, target: str) -> None:
        position = int(values.abs().argmax())
        name, value = self._update.layout.name_at(position), float(values[position])
        what = f"params[{name!r}]" if target == THETA else f"{_SLOT_NAMES.get(target, target)} of params[{name!r}]"
        step = k if k < 0 else k + self._taken
        when = "at the start" if k < 0 else f"at step {step}"
        limit = f"|value| < {self._formats[target].limit:g}"
        if target in self._update.formats:
            limit += "; a loss on a smaller scale avoids it"
        else:
            bits = self._fixed.fractional_bits
            limit += f" with fractional_bits={bits}; a smaller lr or fewer fractional_bits in the adjoint avoids it"
        raise RangeError(
            f"{what} left the fixed-point range {when}: {value:.6g}, where {limit}",
            parameter=name,
            step=step,
            value=value,
        )


def not_finite(layout: Layout, step: int, loss: float, gradient: Tensor) -> NonFiniteError:
    """The error of a loss, or of a gradient [numel], that is not finite at this step of the training."""
    name = layout.first_nonfinite(gradient)
    what = f"the gradient of params[{name!r}] is not finite" if name else "the loss is not finite"
    return NonFiniteError(
        f"{what} at step {step} (loss {loss:g}); a smaller lr, or a loss that stays finite there, avoids it",
        parameter=name,
        step=step,
    )


def _read(vectors: list[Tensor]) -> list[list[float]]:
    """Float64 vectors as lists, in one wait for the device."""
    numbers = iter(torch.cat(vectors).tolist())
    return [[next(numbers) for _ in v] for v in vectors]


def worst_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """0 where all of x is finite, else NaN; and the position of the first that is not, or any."""
    bad, where = torch.max((x - x).view(-1), 0)  # NaN is the largest, and of these the first
    return bad, where


class FiniteWatch:
    """Notices a vector, or a loss, that is no longer finite, without waiting for a GPU at each step.

    fail: raises, called with the first such step and the name of the first parameter with an entry that is not finite
    there (None where only the loss is not).
    """

    def __init__(self, layout: Layout, backend: Backend, fail: Callable[[int, str | None], NoReturn]) -> None:
        self._layout, self._backend, self._fail = layout, backend, fail
        self._notes: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def look(self, k: int, x: Tensor, loss: Tensor | None = None) -> None:
        """x: float [numel] or [K, numel], not empty; loss: 0-dim. Neither requires grad."""
        if self._backend.interval == 1:
            # A sum reads many rows at a third of the cost, and is finite where all of them are, or it overflows.
            fine = (x.ndim > 1 and math.isfinite(x.sum())) or math.isfinite(self._backend.largest(x))
            if not fine or not (loss is None or math.isfinite(float(loss))):
                self._fail(k, None if fine else self._layout.first_nonfinite(x))
            return
        bad, where = worst_of(x)
        self._notes.append((k, bad, where, bad if loss is None else loss))
        if len(self._notes) >= self._backend.interval:
            self.flush()

    def flush(self) -> None:
        """Read the notes."""
        if not self._notes:
            return
        steps, *columns = zip(*self._notes, strict=True)
        self._notes = []
        rows = torch.stack(
            [torch.stack(column).double() for column in columns], dim=1
        ).tolist()  # float64 holds the positions
        for k, (bad, where, loss) in zip(steps, rows, strict=True):
            self.judge(k, bad, int(where), loss)

    def judge(self, k: int, bad: float, where: int, loss: float) -> None:
        """What `worst_of` found at step k, and the loss. Fails where one is not finite."""
        if not (math.isfinite(bad) and math.isfinite(loss)):
            self._fail(k, None if math.isfinite(bad) else self._layout.name_at(where % self._layout.numel))
