"""Steps back that are replayed: admitted as those forward are, where dL/d(...) too is what an eager step makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from revdistill.engine.adjoints.lease import FEWEST, FIRST, LOOKED_AT, Lease, recorded
from revdistill.engine.adjoints.repeated import Repeated
from revdistill.engine.adjoints.sweep import Sweep
from revdistill.engine.adjoints.trajectory import Trajectory
from revdistill.engine.errors import ReversalError
from revdistill.engine.integers.fingerprint import same_bits
from revdistill.engine.integers.snapshot import Snapshot
from revdistill.engine.optimizers.sources import THETA
from revdistill.engine.static.notes import as_floats


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
        program = self._lease(k, batch)
        if program is None:
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
                and fingerprint == recorded(self._problem, k)
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
        return self._failure("the step back", lambda: program.capture_back(k))

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


def back_of(trajectory: Trajectory, sweep: Sweep, repeated: Repeated, eager: Callable[[int], Any]) -> Back | None:
    """What replays the way back of one loss; None where no step forward was, or it is of several at once."""
    wanted = trajectory.was_replayed and not sweep.is_of_many
    return Back(trajectory, sweep, repeated, eager) if wanted else None
