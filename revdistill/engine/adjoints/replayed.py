"""Steps that are replayed: admitted where they were proved to be what eager steps are, to the bit.

The first steps are eager. At one of them the step is made twice, eagerly and by the program, and theta, slots, heads,
loss and the gradient's fingerprint must be the same; so again at later steps, and at the last. On the way back, where
dL/d(...) must be the same too, likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from revdistill.engine.adjoints.lease import Lease
from revdistill.engine.adjoints.repeated import Repeated
from revdistill.engine.adjoints.sweep import Sweep
from revdistill.engine.adjoints.trajectory import OtherBitsError, Trajectory
from revdistill.engine.errors import RevdistillError, ReversalError, UnsupportedError
from revdistill.engine.integers.fingerprint import same_bits
from revdistill.engine.integers.history import NoHistory
from revdistill.engine.integers.snapshot import Snapshot
from revdistill.engine.loss.randomness import generators_of
from revdistill.engine.optimizers.sources import THETA
from revdistill.engine.problem import Problem
from revdistill.engine.static.notes import as_floats
from revdistill.engine.static.rows import NoRowsError

FIRST = 2  # the first step that may be replayed: step 0 is another one, and step 1 has a state at rest behind it
FEWEST = 4  # steps that it is worth to prepare for
LOOKED_AT = frozenset(FIRST + 16**i - 1 for i in range(1, 16))  # steps that are compared again, besides the last
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
        try:
            program = self._lease(k, batch)
        except NoRowsError as error:
            self.give_up(str(error))
            return False
        if program is None:
            self.off = True
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
        if same and _recorded(self._problem, k) == fingerprint:
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
        try:
            program.capture_forward(k, self.loss.dtype)
        except RevdistillError:
            raise
        except Exception as error:  # whatever torch says of a capture, eager is right
            return "the step could not be captured", error
        finally:
            self._at = -1
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


class Back(Lease):
    """The way back.

    Args:
        trajectory: that was made.
        sweep: over it.
        repeated: told the gradients that were evaluated again.
        eager: goes back over one step.
    """

    def __init__(self, trajectory: Trajectory, sweep: Sweep, repeated: Repeated, eager: Callable[[int], Any]) -> None:
        super().__init__(trajectory)
        self._sweep, self._repeated, self._eager = sweep, repeated, eager
        self._lowest = max(FIRST, self._problem.first)
        # What is lost whole is back only after the step's kernels, some of which want it.
        self.off = self.off or any(
            0 in decay.numerators(k) for decay in self._decays for k in range(self._problem.steps)
        )

    def makes(self, k: int) -> bool:
        """Go back over step k, but for what enters there. False: it is to be done eagerly."""
        if self.off or k < self._lowest or k == self._problem.steps - 1:
            self.flush()  # eager steps are looked at in order, after these
            return False
        if self._program is None and k - self._lowest < FEWEST:
            return False
        batch = self._batch(k)
        is_in_its_modes = self._modes == self._problem.determinism.modules.modes_at(k)
        if self._program is not None and not (is_in_its_modes and self._program.batch.fits(batch)):
            self.flush()
            return False
        if self._program is None:
            return self._begin(k, batch)
        if (k in LOOKED_AT or k == self._lowest) and not self._takes_words(k):
            if not self._is_proved(k, batch):
                self.refuse()
                raise ReversalError(
                    f'a step back that compile="graphs" replayed, step {self._problem.number(k)}, was not the eager '
                    "one to the bit, so the hypergradient is not returned. The loss does another thing at some steps "
                    "than at others, which a replay cannot: leave compile out"
                )
        else:
            self._replay(k, batch)
            if self._noted == self._problem.backend.interval:
                self.flush()
        return True

    def _takes_words(self, k: int) -> bool:
        return any(store.words_to_take_back(n) for store, _, n in self._stores(k))

    def _begin(self, k: int, batch: Any) -> bool:
        if self._takes_words(k):
            return False  # to be made twice a step must leave the history alone: the next one will
        try:
            program = self._lease(k, batch)
        except NoRowsError as error:
            self.give_up(str(error))
            return False
        if program is None:
            self.off = True
            return False
        program.take_bars(self._sweep)
        if not self._is_proved(k, batch, first=True) and not self.off:
            self.give_up("a replayed step back had other bits than an eager one")
        if self.off:
            self._program = None
        return True

    def _is_proved(self, k: int, batch: Any, *, first: bool = False) -> bool:
        """Go back over step k, both ways. The eager one counts where they differ."""
        self.flush()
        same = self._is_same(k, batch, first=first)
        self._sweep.watch.look(k, self._sweep.bars.flat[THETA])
        return same

    def _is_same(self, k: int, batch: Any, *, first: bool) -> bool:
        sweep, trajectory, program = self._sweep, self._trajectory, self._program
        assert program is not None
        assert program.bars is not None
        state = trajectory.state
        before, bars = Snapshot(state, with_slots=True), sweep.copies()
        self._eager(k)
        after, found = Snapshot(state, with_slots=True), sweep.copies()
        before.restore(state)
        sweep.restore(bars)
        error = self._not_ready(k, batch) if first else None
        before.restore(state)  # as on the way forward
        sweep.restore(bars)
        if error is None:
            self._replay(k, batch)
            self._noted = 0
            fingerprint = int(program.back_notes.last(1)[0, 2])
            if (
                not bool(after.differs(state))
                and all(map(same_bits, found, sweep.copies()))
                and fingerprint == _recorded(self._problem, k)
            ):
                return True
        after.restore(state)
        sweep.restore(found)
        if error is not None:
            self.give_up(*error)
        return False

    def _not_ready(self, k: int, batch: Any) -> tuple[str, Exception] | None:
        program = self._program
        assert program is not None
        self._go_to(k, batch)
        try:
            program.capture_back(k)
        except RevdistillError:
            raise
        except Exception as error:  # as on the way forward
            return "the step back could not be captured", error
        finally:
            self._at = -1
        return None

    def _replay(self, k: int, batch: Any) -> None:
        program, sweep = self._program, self._sweep
        assert program is not None
        self._go_to(k, batch)
        program.replay_back(k)
        for store, v, n in reversed(self._stores(k)):
            store.take_back(v, n)
        program.give_rows(sweep, k)
        self._at, self._noted, self._last = k - 1, self._noted + 1, k

    def flush(self) -> None:
        """Read what was noted. Raises: as the sweep does, and `Repeated`."""
        count, self._noted = self._noted, 0
        if not count:
            return
        assert self._program is not None
        rows = self._program.back_notes.last(count).flip(0)  # by step, the first at the beginning
        self._repeated.compare(self._last, rows[:, 2].tolist())
        self._sweep.watch.flush()  # of the steps before them on the way back
        bad, where = as_floats(rows[:, 1:2])[:, 0].tolist(), rows[:, 0].tolist()
        for k in reversed(range(self._last, self._last + count)):
            i = k - self._last
            self._sweep.watch.judge(k + 1, bad[i], where[i], 0.0)
        self._sweep.watch.look(self._last, self._sweep.bars.flat[THETA])

    def release(self) -> None:
        """The sweep's too."""
        if self._program is not None and self._program.bars is not None:
            self._program.give_bars(self._sweep)
        super().release()


def _are_wanted(problem: Problem) -> bool:
    """On a CPU there is nothing to capture, and nothing to wait for."""
    return problem.replays and problem.backend.interval > 1 and problem.update.layout.numel > 0


def forward_of(trajectory: Trajectory) -> Forward | None:
    """What replays the trajectory's steps; None where that was not asked for, or cannot pay."""
    wanted = _are_wanted(trajectory.problem) and trajectory.state.nbytes <= LARGEST
    return Forward(trajectory) if wanted else None


def back_of(trajectory: Trajectory, sweep: Sweep, repeated: Repeated, eager: Callable[[int], Any]) -> Back | None:
    """What replays the way back of one loss; None where no step forward was, or it is of several at once."""
    wanted = trajectory.was_replayed and not sweep.is_of_many
    return Back(trajectory, sweep, repeated, eager) if wanted else None


def _recorded(problem: Problem, k: int) -> int:
    """Of step k's gradient, as the way forward kept it."""
    return problem.gradient.fingerprints.recorded(k, k + 1)[0]
