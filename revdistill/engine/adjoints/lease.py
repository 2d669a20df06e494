"""The program that an unroll's replays are of, for as long as it has it; and what is done between them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.adjoints.program import Program
from revdistill.engine.adjoints.trajectory import Trajectory
from revdistill.engine.compiling import warn_of_replays
from revdistill.engine.errors import RevdistillError
from revdistill.engine.loss.data import like_fresh
from revdistill.engine.loss.evaluation import Modes
from revdistill.engine.loss.tree import form_of
from revdistill.engine.optimizers.moves import Decay
from revdistill.engine.problem import Problem
from revdistill.engine.static import kept
from revdistill.engine.static.replays import stream_of
from revdistill.engine.static.rows import DeviceNumbers, NoRowsError

FIRST = 2  # the first step that may be replayed: step 0 is another one, and step 1 has a state at rest behind it
FEWEST = 4  # steps that it is worth to prepare for
LOOKED_AT = frozenset(FIRST + 16**i - 1 for i in range(1, 16))  # steps that are compared again, besides the last
KEPT_BYTES = 256 * 2**20  # of a program that is kept for the loss's next unroll


class Lease:
    """What both directions share: the program, and what is done between its replays.

    Args:
        trajectory: that is replayed.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self._trajectory, self._problem = trajectory, trajectory.problem
        self._program: Program | None = None
        self._numbers: DeviceNumbers | None = None
        self._key: Hashable = None
        self._modes: Modes = ()  # of the loss's modules, in which the program evaluates it
        self._at = -1  # the step that the device's counter is at
        self._noted = 0  # steps in the ring
        self._decays = [move for move in self._problem.update.moves if isinstance(move, Decay)]
        self.off = False

    def give_up(self, why: str, error: Exception | None = None) -> None:
        """No more replays in this direction, nor for the next unroll like this one."""
        self.refuse()
        warn_of_replays(why, error)

    def refuse(self) -> None:
        """`give_up` without the warning."""
        self.off = True
        if self._key is not None:
            kept.refuse(self._problem.gradient.loss, self._key)

    def _batch(self, k: int) -> Any:
        data = self._problem.data
        if data.function is None:
            return data.rows(k)
        with self._problem.determinism.outside():
            return data.from_function(k)

    def _lease(self, k: int, batch: Any) -> Program | None:
        """A program that holds the trajectory's state from now on; None where there can be none, which was said.

        Args:
            k: a step like those that are to be replayed.
            batch: its.
        """
        try:
            program = self._found(k, batch)
        except NoRowsError as error:
            self.give_up(str(error))
            return None
        if program is None:
            self.off = True
        return program

    def _failure(self, what: str, capture: Callable[[], None]) -> tuple[str, Exception] | None:
        """Why a capture of what is named so fails; None where it does not. Raises: errors of the library's own."""
        try:
            capture()
        except RevdistillError:
            raise
        except Exception as error:  # whatever torch says of a capture, eager is right
            return f"{what} could not be captured", error
        finally:
            self._at = -1
        return None

    def _found(self, k: int, batch: Any) -> Program | None:
        """A program for `_lease`, kept or new; None where it is refused. Raises: NoRowsError."""
        problem, trajectory = self._problem, self._trajectory
        if self._numbers is None:
            self._numbers = DeviceNumbers(problem.update, problem.steps, problem.update.layout.device)
            self._modes = problem.determinism.modules.modes_at(k)
            self._key = _key_of(problem, trajectory, self._numbers, batch, self._modes)
        if kept.is_refused(problem.gradient.loss, self._key):
            return None
        # Else copies of hyper would lie elsewhere than eager steps find them, and bits depend on that.
        fresh = all(like_fresh(t) is t for t in problem.data.hypers)
        program: Program | None = kept.take(problem.gradient.loss, self._key) if fresh else None
        if program is None:
            nbytes = 2 * trajectory.state.nbytes + sum(t.nbytes for t in problem.data.hypers)
            program = Program(trajectory, batch, self._numbers, kept=fresh and nbytes <= KEPT_BYTES)
        self._program, self._at = program, -1
        program.take(trajectory, self._numbers)
        return program

    def _go_to(self, k: int, batch: Any) -> None:
        """The program's next step is k."""
        program = self._program
        assert program is not None
        if self._at != k:  # another step was made eagerly, or none yet
            program.numbers.go_to(k)
            self._trajectory.theta_in(program.buffer)
            self._at = k
        program.refresh()
        program.batch.copy_(batch)
        self._problem.determinism.seed_for(k)

    def release(self) -> None:
        """The trajectory's state is its own again."""
        program, self._program = self._program, None
        if program is None:
            return
        program.give(self._trajectory)
        if program.kept and program.is_known and program.nbytes <= KEPT_BYTES and not self.off:
            kept.give_back(self._problem.gradient.loss, self._key, program)

    def _stores(self, k: int) -> list[tuple[Any, Tensor, int]]:
        """(store, its part of the target, n) of every decay of step k, in order."""
        state = self._trajectory.state
        return [(store, v, n) for decay in self._decays for v, store, n in decay.parts(k, state)]


def _key_of(problem: Problem, trajectory: Trajectory, numbers: DeviceNumbers, batch: Any, modes: Modes) -> Hashable:
    """What a program depends on, beside the loss."""
    data, determinism = problem.data, problem.determinism
    return (
        problem.update.layout,
        trajectory.fixed,
        numbers.capacity,
        data.form,
        form_of(batch),
        form_of(data.hypers),
        tuple(t.requires_grad for t in (*data.tensors, *data.hypers)),
        tuple((t.values.requires_grad, t.values.shape[1], len(t.values) == 1) for t in problem.update.tables.values()),
        numbers.signature,
        (determinism.autocast, determinism.autocast_dtype, determinism.threads),
        modes,
        torch.get_default_dtype(),
        type(problem.backend),
        stream_of(determinism.device),
    )


def recorded(problem: Problem, k: int) -> int:
    """Of step k's gradient, as the way forward kept it."""
    return problem.gradient.fingerprints.recorded(k, k + 1)[0]
