"""What the adjoints in fixed-point arithmetic share: a recorded forward pass, as one autograd.Function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from revdistill.engine.adjoints.adjoint import Adjoint, UnrollStats
from revdistill.engine.adjoints.memory import keep_freed_memory
from revdistill.engine.adjoints.replayed import forward_of
from revdistill.engine.adjoints.result import Result
from revdistill.engine.adjoints.sweep import Hypergradients, Sweep
from revdistill.engine.adjoints.trajectory import Trajectory
from revdistill.engine.cotangents import CHUNK_SIZE, Batching
from revdistill.engine.errors import ReversalError, UnsupportedError
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.integers.history import NoHistory
from revdistill.engine.loss.operators import CHANGED_IN_PLACE
from revdistill.engine.problem import Problem
from revdistill.engine.ranks.group import together
from revdistill.engine.ranks.same import of_first

USED_UP = (
    "this unroll was already gone back through, which used it up; add the losses before one backward(), ask "
    "rd.jacobian for several outputs at once, call rd.unroll again, or use adjoint=rd.Backprop() with retain_graph=True"
)
NOT_AGAIN = (
    "a hypergradient of rd.unroll cannot be differentiated again with this adjoint; use adjoint=rd.Backprop(), or "
    "backward() without create_graph=True"
)


class Recording(ABC):
    """A forward pass that can be gone back over once.

    It does not hold the results themselves: these hold it, through their graph, and would never be let go of.
    """

    stats: UnrollStats

    @abstractmethod
    def forward(self) -> Result:
        """All steps, with what the way back needs kept; to be called once, and first."""

    @abstractmethod
    def backward(self, sweep: Sweep) -> Hypergradients:
        """Carry the sweep from the last step to the first."""


class FixedPointAdjoint(Adjoint):
    """What the adjoints in fixed-point arithmetic share: their forward passes agree bit for bit."""

    fractional_bits: int

    @property
    def fixed(self) -> FixedPoint:
        """The number format of theta and v."""
        return FixedPoint(self.fractional_bits)

    @abstractmethod
    def record(self, problem: Problem, theta0: Tensor) -> Recording:
        """A forward pass from theta_0, float [numel], yet to be made."""

    def run(self, problem: Problem, theta0: Tensor) -> tuple[Result, UnrollStats]:
        tables = [table.values for table in problem.update.tables.values()]
        inputs = (*tables, *problem.data.tensors, *problem.data.hypers, *problem.start.slots.values())
        if torch.is_grad_enabled() and any(t.requires_grad for t in (theta0, *inputs)):
            unrolled = Unrolled(problem, self)
            unrolled.wants_start = any(t.requires_grad for t in (theta0, *problem.start.slots.values()))
            tensors = _Unroll.apply(unrolled, theta0, *inputs)  # type: ignore[no-untyped-call]
            assert unrolled.recording is not None
            assert unrolled.form is not None
            return unrolled.form.with_tensors(tensors), unrolled.recording.stats
        with torch.no_grad(), problem.determinism.passage():
            trajectory = Trajectory(problem, problem.cut(theta0), self.fixed, NoHistory(), forward_of)
            trajectory.run()
            return problem.joined(trajectory.result()), UnrollStats.of(trajectory, trajectory.history.nbytes)


@dataclass
class Unrolled:
    """One unroll between its forward and its backward pass.

    form: its results, in shape only: tensors on the meta device stand for them; chunk_size: of how many losses the
    products are evaluated at once; held: whether what comes to the way back goes no further for now; found: which of
    the things that went in the way back found a gradient for; wants_start: whether a gradient is wanted of theta_0 or a
    slot at the start.
    """

    problem: Problem
    adjoint: FixedPointAdjoint
    recording: Recording | None = None
    form: Result | None = None
    versions: tuple[int, ...] = ()
    chunk_size: int = CHUNK_SIZE
    held: bool = False
    found: tuple[bool, ...] = ()
    wants_start: bool = True
    _are_taken: bool = False

    def data_versions(self) -> tuple[int, ...]:
        """torch counts the in-place changes of each tensor."""
        return tuple(t._version for t in (*self.problem.data.tensors, *self.problem.data.hypers))

    @property
    def results(self) -> int:
        """How many tensors the unroll returned."""
        return 0 if self.form is None else len(self.form.tensors())

    def rows_back(self, bars: Sequence[Tensor | None], count: int) -> list[Tensor | None]:
        """The way back of K = `count` losses; once.

        Args:
            bars: dL/d(each of the results), [K, *shape], as `taken` has it; None where it is 0.
            count: K.

        Returns:
            Of each tensor that went in, in the order of the node's `next_functions`, [K, *shape]; None where there is
            no gradient.
        """
        if self.form is None:
            raise UnsupportedError(USED_UP)
        device, meta, own = self.problem.determinism.device, self.form.tensors(), self.problem.update.layout.numel
        full = [
            torch.zeros(count, *t.shape[:-1], own, dtype=t.dtype, device=device) if bar is None else bar
            for bar, t in zip(bars, meta, strict=True)
        ]
        if self.problem.shards is not None:  # those that were asked for themselves are whole
            full = [bar if bar.shape[-1] == own else self.problem.shards.cut(bar) for bar in full]
        self._are_taken = True
        values = iter(_WayBack.apply(self, 1, *full))  # type: ignore[no-untyped-call]
        return [next(values) if there else None for there in self.found]

    def taken(self, bars: Sequence[Tensor], *, cut: bool = True) -> list[Tensor]:
        """dL/d(results) as the way back takes it: the same on all ranks, and where they keep parts, this one's.

        cut: whether of parts, or still whole.
        """
        ranks, shards = self.problem.ranks, self.problem.shards
        if ranks is None:
            return list(bars)
        with ranks.together():
            same = of_first(ranks, bars)
            return [shards.cut(bar) for bar in same] if cut and shards is not None else same

    def go_back(self, bars: tuple[Tensor, ...], *, many: bool = False) -> Hypergradients:
        """The way back; once. bars: dL/d(each of the results); many: whether of K losses, on a first dimension."""
        recording, self.recording = self.recording, None  # used up, even if the way back fails
        if recording is None or self.form is None:
            raise UnsupportedError(USED_UP)
        with torch.no_grad(), together(self.problem.ranks), self.problem.determinism.passage():
            if self.data_versions() != self.versions:
                raise ReversalError(
                    "a tensor in batches or hyper was changed in place between the forward and the backward pass, so "
                    "the way back would see other data; change it after backward(), or pass a clone"
                )
            bars = bars if self._are_taken else tuple(self.taken(bars))
            result_bars = self.form.with_tensors(tuple(bar.contiguous() for bar in bars))
            batching = Batching(self.chunk_size) if many else None
            if many:
                keep_freed_memory()
            sweep = Sweep(self.problem, result_bars, recording.stats._amplification, batching)
            try:
                found = recording.backward(sweep)
                self.problem.meet("the end of the backward pass")
            finally:
                sweep.close()
            return self._joined(found)

    def _joined(self, found: Hypergradients) -> Hypergradients:
        """Where each rank keeps a part, those of theta_0 and the slots whole, where they are wanted."""
        shards = self.problem.shards
        if shards is None or found.theta is None or found.slots is None:
            return found
        if not self.wants_start:
            return replace(found, theta=None, slots=None)
        point = "the end of the backward pass"
        slots = {name: shards.joined(found.slots[name], point) for name in self.problem.start.slots}
        return replace(found, theta=shards.joined(found.theta, point), slots=slots)


class _Unroll(torch.autograd.Function):
    """Inputs: the unroll, theta_0 and every differentiable tensor; outputs theta_T, the average and the slots, where
    they are asked for. The mathematics is the adjoint's.
    """

    @staticmethod
    def forward(ctx: Any, unrolled: Unrolled, theta0: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.unrolled = unrolled
        ctx.save_for_backward(theta0, *inputs)
        unrolled.versions = unrolled.data_versions()
        with unrolled.problem.determinism.passage():
            problem = unrolled.problem
            unrolled.recording = unrolled.adjoint.record(problem, problem.cut(theta0.detach()))
            result = problem.joined(unrolled.recording.forward())
        if unrolled.data_versions() != unrolled.versions:
            raise UnsupportedError(CHANGED_IN_PLACE.format("a tensor in batches or hyper"))
        tensors = result.tensors()
        unrolled.form = result.with_tensors(tuple(t.to("meta") for t in tensors))
        return tensors

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple[Tensor | None, ...]:
        unrolled: Unrolled = ctx.unrolled
        if unrolled.held:
            return (None,) * len(ctx.needs_input_grad)
        if any(map(torch._C._functorch.is_legacy_batchedtensor, bars)):
            raise UnsupportedError(
                "torch.autograd.grad(is_grads_batched=True) and torch.autograd.functional.jacobian(vectorize=True) go "
                "through torch's older vmap, which rd.unroll's way back cannot; call rd.jacobian(outputs, inputs), or "
                "torch.func.vmap(lambda v: torch.autograd.grad(outputs, inputs, v))(torch.eye(len(outputs)))"
            )
        found = iter(_WayBack.apply(unrolled, 0, *bars))  # type: ignore[no-untyped-call]
        gradients = tuple(next(found) if there else None for there in unrolled.found)
        if torch.is_grad_enabled():  # backward(create_graph=True)
            inputs = ctx.saved_tensors
            gradients = tuple(None if g is None else _OnceOnly.apply(g, *inputs) for g in gradients)  # type: ignore[no-untyped-call]
        return (None, *gradients)


class _WayBack(torch.autograd.Function):
    """From dL/d(the results) to dL/d(all that went in): a Function, so that torch.func.vmap hands over many at once."""

    @staticmethod
    def forward(unrolled: Unrolled, levels: int, *bars: Tensor) -> tuple[Tensor, ...]:
        """levels: how many first dimensions the bars have beside their own. What there is no gradient for is left out;
        `unrolled.found` tells.
        """
        many = bars[0].shape[:levels]
        if levels > 1:
            bars = tuple(bar.flatten(0, levels - 1) for bar in bars)
        found, problem = unrolled.go_back(bars, many=levels > 0), unrolled.problem
        tables = [found.tables.get(name) for name in problem.update.tables]
        slots = [None if found.slots is None else found.slots[name] for name in problem.start.slots]
        gradients = (found.theta, *tables, *found.batches, *found.hypers, *slots)
        unrolled.found = tuple(g is not None for g in gradients)
        return tuple(g.view(*many, *g.shape[1:]) if levels > 1 else g for g in gradients if g is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept: `_OnceOnly` stands in the way of a derivative."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise UnsupportedError(NOT_AGAIN)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], unrolled: Unrolled, levels: int, *bars: Tensor) -> Any:
        """All at once, with one more dimension in front."""
        rows = [
            bar.expand(info.batch_size, *bar.shape) if dim is None else bar.movedim(dim, 0)
            for bar, dim in zip(bars, in_dims[2:], strict=True)
        ]
        found = _WayBack.apply(unrolled, levels + 1, *rows)  # type: ignore[no-untyped-call]
        return found, (0,) * len(found)


class _OnceOnly(torch.autograd.Function):
    """Passes a hypergradient through, and says what to do when it is differentiated in its turn.

    It hangs on everything that the hypergradient depends on: a derivative with respect to any of it comes past here.
    """

    @staticmethod
    def forward(gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise UnsupportedError(NOT_AGAIN)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], gradient: Tensor, *inputs: Tensor) -> Any:
        return _OnceOnly.apply(gradient, *inputs), in_dims[0]  # type: ignore[no-untyped-call]
