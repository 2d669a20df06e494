"""One step forward and one step back over static memory, as work that can be replayed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.adjoints.guard import worst_of
from revdistill.engine.adjoints.sweep import Derivatives, Sweep
from revdistill.engine.adjoints.trajectory import Trajectory
from revdistill.engine.integers.history import NoHistory
from revdistill.engine.integers.snapshot import Snapshot
from revdistill.engine.integers.state import State
from revdistill.engine.loss.evaluation import HoldsBuffers
from revdistill.engine.loss.linearization import EagerLinearization
from revdistill.engine.loss.tree import form_of
from revdistill.engine.loss.uncompiled import uncompiled
from revdistill.engine.optimizers.sources import GRADIENT, THETA, Bars
from revdistill.engine.optimizers.update import Update
from revdistill.engine.problem import Problem
from revdistill.engine.static.batch import StaticBatch
from revdistill.engine.static.fusing import moves_of
from revdistill.engine.static.notes import Notes
from revdistill.engine.static.replays import Body, Replay, pool_of, replay_of
from revdistill.engine.static.rows import DeviceNumbers
from revdistill.engine.static.trace import Trace, is_like


class Program:
    """The memory of one form of unroll, the step forward and the step back.

    Everything that a step reads or writes lies in tensors that stay: the state, theta as floats, the batch, hyper, the
    row of hyperparameters, dL/d(...) of all of these. What no kernel does is done between replays: words that leave the
    heads, batches that come in, losses along the way.

    Args:
        trajectory: of an unroll, which is to be replayed first; its state becomes the program's.
        batch: one of its batches.
        numbers: of its optimizer.
        kept: whether other unrolls are to have it too.

    Attributes:
        state, buffer: theta and the slots as integers, and theta as floats [numel].
        loss: of the last step, 0-dim.
        forward_notes, back_notes: by step the gradient's largest entry, or the position of dL/dtheta's first entry that
            is no number; the loss, or whether there is one; and the gradient's fingerprint.
        problem: the unroll that has it for now.
    """

    def __init__(self, trajectory: Trajectory, batch: Any, numbers: DeviceNumbers, *, kept: bool) -> None:
        problem, self.kept = trajectory.problem, kept
        layout, backend = problem.update.layout, problem.backend
        device, numel = layout.device, layout.numel
        self.problem: Problem | None = problem
        self.numbers = numbers
        theirs = trajectory.state
        self.state: State = problem.update.initial_state(theirs.numbers[THETA], trajectory.fixed, NoHistory(), backend)
        self.state.numbers.update(theirs.numbers)
        for mine, store in zip(self.state.all_stores(), theirs.all_stores(), strict=True):
            mine.head = store.head
        self.buffer = torch.zeros(numel, dtype=layout.dtype, device=device)
        self.batch = StaticBatch(batch, device)
        # The caller's own, but for a program that will get another's.
        self.hypers = [t.detach().clone() if kept else t.detach() for t in problem.data.hypers]
        self.loss = torch.zeros((), dtype=layout.dtype, device=device)
        self.forward_notes, self.back_notes = (Notes(backend.interval, 3, device) for _ in range(2))
        self._k = 0
        self._pool = pool_of(device)
        moves: Update = numbers.update
        self._forward_moves = moves_of(moves.moves, self.state, back=False)
        self._blind = moves_of(moves.blind[::-1], self.state, back=True)
        self._seeing = moves_of(moves.seeing[::-1], self.state, back=True)
        self._clips = moves.clipping is not None
        self._found = (
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
        )
        self._derivatives = Derivatives(moves)
        self._forward: Replay | None = None
        self._back: Replay | None = None
        self._trace_forward: Trace | None = None
        self._trace_back: Trace | None = None
        # By whose they are, which holds the loss perhaps.
        self._buffers: weakref.WeakKeyDictionary[HoldsBuffers, dict[str, Tensor]] = weakref.WeakKeyDictionary()
        self._versions: list[int] = []
        self._wants_slots = self._wants_gradient = False
        self.bars: Bars | None = None
        self.batch_bars: list[Tensor | None] = []
        self.hyper_bars: list[Tensor | None] = []

    # What each unroll that has the program brings, and takes away.

    def take(self, trajectory: Trajectory, numbers: DeviceNumbers) -> None:
        """The trajectory's state goes on here, with its unroll's hyper and hyperparameters."""
        self.problem = problem = trajectory.problem
        if numbers is not self.numbers:
            self.numbers.load(numbers)
        self._versions = []
        self.refresh()
        self._take_buffers(problem.determinism.modules.buffers)
        for name, q in trajectory.state.numbers.items():
            if q is not self.state.numbers[name]:
                trajectory.state.numbers[name] = self.state.numbers[name].copy_(q)
        for store, own in zip(trajectory.state.all_stores(), self.state.all_stores(), strict=True):
            if store.head is not own.head:
                store.head = own.head.copy_(store.head)

    def refresh(self) -> None:
        """Take the unroll's hyper, where it was changed."""
        assert self.problem is not None
        hypers = self.problem.data.hypers
        versions = [-1 if t.is_inference() else t._version for t in hypers]
        if not self.kept or (versions == self._versions and -1 not in versions):
            return
        self._versions = versions
        for mine, other in zip(self.hypers, hypers, strict=True):
            mine.copy_(other.detach())

    def _take_buffers(self, theirs: dict[HoldsBuffers, dict[str, Tensor]]) -> None:
        """Every step sees the modules' buffers as they were when its unroll began: here they lie where others' lay."""
        for owner, found in theirs.items() if self.kept else ():
            mine = self._buffers.get(owner)
            if mine is None or form_of(mine) != form_of(found):
                self._buffers[owner] = mine = {name: b.clone() for name, b in found.items()}
            for name, b in found.items():
                mine[name].copy_(b)
            theirs[owner] = mine

    def give(self, trajectory: Trajectory) -> None:
        """The trajectory goes on without the program, which holds nothing of its unroll any more."""
        problem, self.problem = self.problem, None
        if not self.kept:
            return
        assert problem is not None
        buffers = problem.determinism.modules.buffers
        for owner, found in buffers.items():
            buffers[owner] = {name: b.clone() for name, b in found.items()}
        state = trajectory.state
        for name, q in state.numbers.items():
            state.numbers[name] = q.clone()
        for stores in state.stores.values():  # of one target they lie in a row
            heads = torch.cat([store.head for store in stores])
            for store, head in zip(stores, torch.split(heads, [len(s.head) for s in stores]), strict=True):
                store.head = head

    # The step forward.

    def replay_forward(self, k: int) -> None:
        """Make step k, for which there is room in the stores, and whose batch is there."""
        assert self._forward is not None
        self._k = k
        self._forward()

    @property
    def captured(self) -> bool:
        """Whether replays call no function of Python any more."""
        return any(replay is not None and replay.captured for replay in (self._forward, self._back))

    def capture_forward(self, k: int, loss: torch.dtype) -> None:
        """See `replay_of`; nothing is changed.

        Args:
            k: the step whose batch is there.
            loss: its dtype.
        """
        self._k = k
        trace = self._traced(back=False)
        if self._forward is not None and is_like(trace, self._trace_forward) and self.loss.dtype == loss:
            return
        self._forward = None
        if self.loss.dtype != loss:
            self.loss = torch.zeros((), dtype=loss, device=self.buffer.device)
        self._forward = replay_of(self._step_forward, self._undone, self.buffer.device, self._pool)
        self._trace_forward = trace

    def _traced(self, *, back: bool) -> Trace | None:
        """What the loss and its derivatives do here, called once more; None where that cannot be seen."""
        trace = Trace(self.buffer.device)
        try:
            with uncompiled(), trace:
                linear = self._linear()
                if back:
                    assert self.bars is not None
                    linear.product(self.bars.flat[GRADIENT])
        except Exception:  # an operator that loses its graph, a function of torch's that no mode is told of
            return None
        return trace

    @property
    def nbytes(self) -> int:
        """Bytes that its graphs keep for what is made within them."""
        return sum(replay.nbytes for replay in (self._forward, self._back) if replay is not None)

    @property
    def is_known(self) -> bool:
        """Whether it can be told if another unroll's steps are these."""
        captured = ((self._forward, self._trace_forward), (self._back, self._trace_back))
        return all(replay is None or trace is not None for replay, trace in captured)

    def _step_forward(self) -> None:
        k = self.numbers.begin()
        linear = self._linear()
        gradient = linear.gradient
        if self._clips:  # the moves see another gradient than is noted
            fingerprint, entry = self._noted(gradient)
            self._forward_moves.run(self._derivatives.as_moves_saw_it(k, gradient), self.buffer)
        else:
            fingerprint, entry = self._found
            self._forward_moves.run(gradient, self.buffer, self._found)
        self.forward_notes.write(entry, linear.loss, fingerprint)
        self.loss.copy_(linear.loss)
        self.numbers.counter.add_(1)

    def _noted(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient's fingerprint, and its largest entry."""
        found = self.state.backend.fingerprint(gradient), self.state.backend.largest(gradient)
        fingerprint, entry = (torch.as_tensor(n, device=gradient.device) for n in found)
        return fingerprint, entry

    def _linear(self) -> EagerLinearization:
        """The loss and its gradient at the theta that is in the buffer."""
        problem, k = self.problem, self._k
        assert problem is not None
        gradient = problem.gradient
        leaf = self.buffer.detach().requires_grad_()
        batch_leaves, hyper_leaves = gradient.leaves_of(
            self.batch.value if problem.data.function is None else (), self.hypers
        )
        batch = self.batch.value if problem.data.function is not None else batch_leaves
        with problem.determinism.evaluation(k):
            return gradient.bare(k, leaf, batch, batch_leaves, hyper_leaves)

    # The step back.

    def take_bars(self, sweep: Sweep) -> None:
        """The sweep's dL/d(...) go on here. Of a table of a row per step there is that of one step."""
        if self.bars is None:
            self._wants_slots, self._wants_gradient = sweep.wants_slots, sweep.wants_gradient
            tables = {
                name: bar if len(bar) == 1 else torch.zeros_like(bar[:1]) for name, bar in sweep.bars.tables.items()
            }
            self.bars = Bars(dict(sweep.bars.flat), tables)
            self.hyper_bars = list(sweep.hypers)
            like = self.batch.value if sweep.batches else ()
            self.batch_bars = [
                None if bar is None else torch.zeros_like(t) for bar, t in zip(sweep.batches, like, strict=True)
            ]
        for name, flat in sweep.bars.flat.items():
            if flat is not self.bars.flat[name]:
                sweep.bars.flat[name] = self.bars.flat[name].copy_(flat)
        for name, table in sweep.bars.tables.items():
            if len(table) == 1 and table is not self.bars.tables[name]:
                sweep.bars.tables[name] = self.bars.tables[name].copy_(table)
        for i, (mine, bar) in enumerate(zip(self.hyper_bars, sweep.hypers, strict=True)):
            if mine is not None and bar is not None and mine is not bar:
                sweep.hypers[i] = mine.copy_(bar)

    def give_bars(self, sweep: Sweep) -> None:
        """The sweep goes on without the program."""
        if self.kept:
            for of in (sweep.bars.flat, sweep.bars.tables):
                of.update({name: t.clone() for name, t in of.items()})
            sweep.hypers[:] = [None if bar is None else bar.clone() for bar in sweep.hypers]

    def give_rows(self, sweep: Sweep, k: int) -> None:
        """What step k adds to one row of something goes there."""
        assert self.bars is not None
        for name, table in sweep.bars.tables.items():
            if len(table) > 1:
                sweep.problem.update.tables[name].row_of(k, table).add_(self.bars.tables[name][0])
        for bar, mine in zip(sweep.batches, self.batch_bars, strict=True):
            if bar is not None and mine is not None:
                sweep.problem.data.add_to(bar, k, mine)

    def replay_back(self, k: int) -> None:
        """Go back over step k, whose batch is there."""
        assert self._back is not None
        self._k = k
        self._back()

    def capture_back(self, k: int) -> None:
        """See `capture_forward`. k: the step whose batch is there."""
        self._k = k
        trace = self._traced(back=True)
        if self._back is not None and is_like(trace, self._trace_back):
            return
        self._back = None
        self._back = replay_of(self._step_back, self._undone, self.buffer.device, self._pool)
        self._trace_back = trace

    def _step_back(self) -> None:
        assert self.bars is not None
        k, bars = self.numbers.begin(), self.bars
        bad, where = worst_of(bars.flat[THETA])
        values = self._slots()
        for name, row in bars.tables.items():
            if self._is_stepwise(name):
                row.zero_()
        self._blind.run(None, self.buffer)
        linear = self._linear()
        gradient = linear.gradient
        fingerprint = torch.as_tensor(self.state.backend.fingerprint(gradient), device=gradient.device)
        self.back_notes.write(where, bad, fingerprint)
        seen = self._derivatives.as_moves_saw_it(k, gradient)
        values[THETA] = self.buffer
        if self._wants_gradient:
            values[GRADIENT] = seen
        self._derivatives.to_gradient(k, values, linear, bars)
        products = linear.product(bars.flat[GRADIENT])
        if products.theta is not None:
            bars.flat[THETA].add_(products.theta)
        for out, product in zip(self.batch_bars, products.batch, strict=False):
            if out is not None:
                out.zero_() if product is None else out.copy_(product)
        for total, product in zip(self.hyper_bars, products.hyper, strict=True):
            if total is not None and product is not None:
                total.add_(product)
        self._seeing.run(seen)
        self._derivatives.to_start_of_step(k, self._slots(), bars)
        self.numbers.counter.sub_(1)

    def _slots(self) -> dict[str, Tensor]:
        if not self._wants_slots:
            return {}
        return {name: self.state.floats(name, self.buffer.dtype) for name in self.numbers.update.slots}

    def _is_stepwise(self, name: str) -> bool:
        assert self.problem is not None
        return len(self.problem.update.tables[name].values) > 1

    def _undone(self, body: Body) -> None:
        """body, and everything that it changes as it was."""
        before = Snapshot(self.state, with_slots=True)
        tensors = [self.buffer, self.loss, self.forward_notes.ring, self.back_notes.ring]
        tensors.append(self.numbers.counter)
        if self.bars is not None:
            tensors += [*self.bars.flat.values(), *self.bars.tables.values()]
            tensors += [t for t in (*self.hyper_bars, *self.batch_bars) if t is not None]
        kept = [t.clone() for t in tensors]
        try:
            body()
        finally:
            before.restore(self.state)
            for t, values in zip(tensors, kept, strict=True):
                t.copy_(values)
