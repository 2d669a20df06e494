"""Steps that are replayed: admitted where they were proved to be what eager steps are, to the bit.

The first steps are eager. At one of them the step is made twice, eagerly and by the program, and theta, slots, heads,
loss and the gradient's fingerprint must be the same; so again at later steps, and at the last. On the way back, where
dL/d(...) must be the same too, likewise.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from revdistill.engine.adjoints.lease import FEWEST, FIRST, LOOKED_AT, Lease, recorded
from revdistill.engine.adjoints.trajectory import OtherBitsError, Trajectory
from revdistill.engine.errors import UnsupportedError
from revdistill.engine.integers.fingerprint import same_bits
from revdistill.engine.integers.history import NoHistory
from revdistill.engine.integers.snapshot import Snapshot
from revdistill.engine.loss.randomness import generators_of
from revdistill.engine.problem import Problem
from revdistill.engine.static.notes import as_floats

MOST_MISSES = 8  # batches of another form, one after the other, before no more are looked at
LARGEST = 2**30  # bytes of a state: a larger network's steps are long, and copies of it, to compare, are large too


class Forward(Lease):
    """The way forward. loss: of the last step that it made, 0-dim."""

    loss: Tensor
    _misses = 0  # steps since the last whose batch had the program's form

    def makes(self, k: int) -> bool:
        """Make step k. False: it is to be made eagerly."""
        problem = self._problem
        if self.off or k < FIRST or k < problem.first or (problem.steps - k < FEWEST and self._program is None):
            return False
        batch = self._batch(k)
        if self._program is None:
            return self._begin(k, batch)
        modules = problem.determinism.modules
        fits = self._program.batch.fits(batch)
        self._misses = 0 if fits else self._misses + 1
        if not fits or not self._modes == modules.modes == modules.modes_at(k):
            self.flush()
            if self._misses == MOST_MISSES:
                self.give_up(f"the last {MOST_MISSES} batches had other shapes, or hold another number each")
            return False
        self._trajectory.guard.flush(self._trajectory.state)
        if k in LOOKED_AT or k == problem.steps - 1:
            if not self._is_proved(k, batch):
                self._refused(f"step {problem.number(k)}, replayed, had other bits than an eager one")
        else:
            self._replay(k, batch)
            if self._noted == problem.backend.interval:
                self.flush()
        return True

    def _refused(self, why: str) -> NoReturn:
        """The steps that were replayed are not to be trusted."""
        self.refuse()
        if self._problem.on_step is not None:
            raise UnsupportedError(
                f'compile="graphs": {why}: the loss does another thing at some steps than at others, which a replay '
                "cannot, and what on_step was shown is not what training is. Leave compile out, or let on_step, and "
                "the loss itself, change nothing that the loss is computed from"
            )
        raise OtherBitsError(why)

    def _begin(self, k: int, batch: Any) -> bool:
        modules = self._problem.determinism.modules
        if modules.modes != modules.modes_at(k):
            return False  # an eager step notes them
        if self._lease(k, batch) is None:
            return False
        if not self._is_proved(k, batch, first=True) and not self.off:
            self.give_up("a replayed step had other bits than an eager one")
        if self.off:
            self._program = None  # it is of no use to anybody
        self._trajectory.was_replayed = not self.off
        return True

    def _is_proved(self, k: int, batch: Any, *, first: bool = False) -> bool:
        """Make step k, both ways. The eager one counts where they differ."""
        self.flush()
        trajectory, program = self._trajectory, self._program
        assert program is not None
        state, history = trajectory.state, trajectory.history
        before, nbytes = Snapshot(state, with_slots=True), history.nbytes
        linear = trajectory.step(k)
        self.loss, draws = linear.loss, self._draws_on_the_host()
        trajectory.guard.flush(state)
        after, spilled = Snapshot(state, with_slots=True), history.nbytes
        words = []
        if isinstance(history, NoHistory):
            history.nbytes = nbytes
        else:
            count = sum(store.words_to_take_back(n) for store, _, n in self._stores(k))
            words = [history.pop() for _ in range(count)]
        before.restore(state)
        self._at = -1
        error = self._not_ready(k, batch, draws) if first else None
        before.restore(state)  # a capture leaves all as it was; if not, a graph is not to be taken for what it did
        if error is not None:
            after.restore(state)
            for word in reversed(words):
                history.push(word)
            if isinstance(history, NoHistory):
                history.nbytes = spilled
            self.give_up(*error)
            return False
        self._replay(k, batch)
        self._noted = 0
        fingerprint = int(program.forward_notes.last(1)[0, 2])
        same = same_bits(linear.loss, program.loss) and not bool(after.differs(state))
        if same and recorded(self._problem, k) == fingerprint:
            return True
        after.restore(state)
        return False

    def _draws_on_the_host(self) -> bool:
        """Whether the evaluation before moved the CPU's generator, whose numbers a graph would repeat."""
        host = generators_of(self._problem.determinism.device)[0]
        state = host.get_state()
        moved = not torch.equal(state, host.manual_seed(host.initial_seed()).get_state())
        host.set_state(state)
        return moved

    def _not_ready(self, k: int, batch: Any, draws: bool) -> tuple[str, Exception | None] | None:
        """Capture; why there are no replays, where it fails."""
        program = self._program
        assert program is not None
        self._go_to(k, batch)
        failure = self._failure("the step", lambda: program.capture_forward(k, self.loss.dtype))
        if failure is not None:
            return failure
        if draws and program.captured:
            return "the loss draws from the CPU's random numbers, which a graph would repeat", None
        return None

    def _replay(self, k: int, batch: Any) -> None:
        program = self._program
        assert program is not None
        self._go_to(k, batch)
        for store, v, n in self._stores(k):
            store.make_room(v, n)
        program.replay_forward(k)
        self.loss, self._at, self._noted = program.loss, k + 1, self._noted + 1
        self._last = k

    def flush(self) -> None:
        """Read what was noted. Raises: as `Guard.read`."""
        count, self._noted = self._noted, 0
        if not count:
            return
        assert self._program is not None
        rows, trajectory = self._program.forward_notes.last(count), self._trajectory
        self._problem.gradient.fingerprints.record_many(self._last + 1 - count, rows[:, 2])
        trajectory.guard.read(as_floats(rows[:, :2]), trajectory.state)


def _are_wanted(problem: Problem) -> bool:
    """On a CPU there is nothing to capture, and nothing to wait for."""
    return problem.replays and problem.backend.interval > 1 and problem.update.layout.numel > 0


def forward_of(trajectory: Trajectory) -> Forward | None:
    """What replays the trajectory's steps; None where that was not asked for, or cannot pay."""
    wanted = _are_wanted(trajectory.problem) and trajectory.state.nbytes <= LARGEST
    return Forward(trajectory) if wanted else None
