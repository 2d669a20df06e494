"""Buffers that a module's forward changes: they must not influence what the loss is.

An unroll carries the parameters from one step to the next, and nothing else: every step sees the buffers as they are
when the unroll begins. For BatchNorm in training mode that is right, because what it writes (running statistics) it
does not read. For spectral_norm, a running mean that is subtracted, a counter that a schedule reads, it is another
training.

Which it is, is found by following the data: under a dispatch mode that marks the memory of what is computed from a
buffer. Where neither the loss nor its gradient is marked by a changed buffer, and no marked number was read into
Python, the buffer did not matter there. So it is at the steps whose number, of all that the module was ever evaluated
at, is a power of two, and at the last step of each unroll whose number is one. At the others NaNs stand in its place,
which show where they matter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.checkpointing import Watched
from revdistill.engine.loss.evaluation import evaluating, flags_of
from revdistill.engine.loss.looks import is_due
from revdistill.engine.loss.marking import TORCHS_FORWARDS, CannotFollowError, Marking, Reads, memory_in
from revdistill.engine.loss.turn import turn
from revdistill.engine.loss.uncompiled import uncompiled

Fresh = dict[str, Tensor]  # copies of the buffers, by name, that a call may write to


def check_buffers(buffers: Mapping[str, Tensor], owner: str = "the module") -> None:
    """Check that no derivative by a buffer is asked for.

    Args:
        buffers: by name.
        owner: of them, for the message.

    Raises:
        ValueError: one requires grad.
    """
    for name, b in buffers.items():
        if b.requires_grad:
            raise ValueError(
                f"{owner}'s buffer {name!r} requires grad, and would silently get no gradient: a loss gets copies of "
                "buffers. Make it a parameter (torch.nn.Parameter) if it is to be trained, pass it in hyper= if its "
                "hypergradient is wanted, or detach it"
            )


class Buffers:
    """The buffers of a module: a call of it gets copies, and is refused where what it wrote would matter.

    Args:
        net: the module.
        modules: gives it and those in it, and the criterion's.
        buffers: gives them by name, as they are now.

    Attributes:
        sources: by name, what the copies of the last call were made of.

    Raises:
        ValueError: a buffer requires grad.
    """

    def __init__(
        self, net: nn.Module, modules: Callable[[], list[nn.Module]], buffers: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        self._modules, self._now = modules, buffers
        # torch's own layers read it only to know how far their running statistics move, and these are not read.
        self._not_read = {
            f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked"
            for prefix, module in net.named_modules()
            if type(module).forward in TORCHS_FORWARDS and not (module._forward_hooks or module._forward_pre_hooks)
        }
        self.sources = self._current()
        self._compiled = self.sources
        self._harmless: dict[tuple[bool, ...], set[str]] = {}  # what was written, by the training modes
        self._evaluations: dict[tuple[bool, ...], int] = {}  # each step's first ones
        self._unrolls = 0

    def evaluate(
        self, loss: Callable[[Fresh], Tensor], params: Mapping[str, Tensor], rebound: Callable[[], set[str]]
    ) -> Tensor:
        """The loss.

        Args:
            loss: called with the copies.
            params: what the gradient is taken of.
            rebound: the names in whose places the call left other tensors.

        Returns:
            What `loss` returned.

        Raises:
            UnsupportedError: the loss, or its gradient, depends on a buffer that forward changes.
        """
        if torch.compiler.is_compiling():
            return loss({name: b.clone() for name, b in self._compiled.items()})
        with turn():  # another thread must not find these tensors in the module, and put them back as its own
            return self._evaluate(loss, params, rebound)

    def _evaluate(
        self, loss: Callable[[Fresh], Tensor], params: Mapping[str, Tensor], rebound: Callable[[], set[str]]
    ) -> Tensor:
        unroll = evaluating()
        if unroll is None:
            return loss(self._copies(self._current()))
        buffers = unroll.buffers.get(self)
        if buffers is None:
            buffers = unroll.buffers[self] = self._current()
            self.begin(buffers)
            self._unrolls += 1
        if not buffers:
            return loss(buffers)
        modes = tuple(flags_of(self._modules()))
        if unroll.first_visit:
            count = self._evaluations[modes] = self._evaluations.get(modes, 0) + 1
            harmless = self._harmless.get(modes)
            if harmless is None or (harmless and self._is_due(count, last=unroll.at_last_step)):
                try:
                    return self._follow(loss, buffers, params, rebound, modes)
                except CannotFollowError:  # NaNs are to show it
                    unroll.uncompiled.discard(unroll.step)
                    self._harmless[modes] = set(buffers)
        harmless = self._harmless.get(modes)
        if harmless is None:
            return loss(self._copies(buffers))
        fresh = self._copies(buffers, harmless)
        places = {name: memory_in(b)[0] for name, b in fresh.items()} if unroll.first_visit else {}
        value = loss(fresh)
        if not _is_loss(value):
            return value
        if unroll.first_visit:
            self._refuse_new(self._changed(fresh, places, rebound()) - self._not_read, modes)
        if harmless and value.device.type == "cpu" and bool(value.isnan().any()):
            unspoilt = loss(self._copies(buffers))
            if not torch.equal(unspoilt.isnan(), value.isnan()):
                raise UnsupportedError(
                    _message(harmless, "the loss of a later step than the first depends on what it finds there")
                )
        return value

    def begin(self, buffers: Fresh) -> None:
        """See `HoldsBuffers`: what is compiled takes them from here."""
        self._compiled = buffers

    def _current(self) -> Fresh:
        """As they are now, in new tensors."""
        buffers = self._now()
        check_buffers(buffers)
        return {name: b.clone() for name, b in buffers.items()}

    def _copies(self, buffers: Fresh, spoilt: Collection[str] = ()) -> Fresh:
        """Fresh ones each time: what the module writes into them must not reach the next call. spoilt: NaN instead."""
        self.sources = {
            n: torch.full_like(b, torch.nan) if n in spoilt and b.is_floating_point() else b for n, b in buffers.items()
        }
        return {name: b.clone() for name, b in self.sources.items()}

    def _is_due(self, count: int, *, last: bool) -> bool:
        """Whether an evaluation is followed again. last: of its unroll; short unrolls are not to pay for it each."""
        return is_due(count) or (last and is_due(self._unrolls))

    def _refuse_new(self, changed: set[str], modes: tuple[bool, ...]) -> None:
        """Raise the UnsupportedError of buffers that were not changed at the first step in these modes."""
        later = changed - self._harmless.get(modes, changed)
        if later:
            raise UnsupportedError(
                _message(later, "begins to at a later step than the first, where what depends on it is not known")
            )

    def _changed(self, fresh: Fresh, places: Mapping[str, int], rebound: set[str]) -> set[str]:
        changed = {name for name, b in fresh.items() if b._version or memory_in(b)[0] != places[name]}
        return changed | (rebound & fresh.keys())

    def _follow(
        self,
        loss: Callable[[Fresh], Tensor],
        buffers: Fresh,
        params: Mapping[str, Tensor],
        rebound: Callable[[], set[str]],
        modes: tuple[bool, ...],
    ) -> Tensor:
        """The loss, with the data followed."""
        fresh = self._copies(buffers)
        places = {name: memory_in(b)[0] for name, b in fresh.items()}
        modules = self._modules()
        numbers = [_numbers(module) for module in modules]
        unroll = evaluating()
        assert unroll is not None
        unroll.uncompiled.add(unroll.step)
        # Not exact: to compare what a checkpoint computes again is to read it.
        with uncompiled(), Watched(exact=False), Marking(fresh) as marking, Reads(marking):
            value = loss(fresh)
            if not _is_loss(value):
                return value
            wanted = [p for p in params.values() if p.requires_grad]
            found: tuple[Tensor | None, ...] = ()
            if value.requires_grad and wanted:
                found = torch.autograd.grad(value.sum(), wanted, retain_graph=True, allow_unused=True)
        changed = self._changed(fresh, places, rebound())
        # By value, too: torch's kernels do not count what they write.
        changed |= {name for name, b in fresh.items() if not torch.equal(b, buffers[name])}
        influence = set().union(*(marking.of(t) for t in (value, *found) if t is not None))
        if changed & influence:
            raise UnsupportedError(_message(changed & influence, "the loss depends on what it finds there"))
        if changed & marking.was_read:
            raise UnsupportedError(
                _message(
                    changed & marking.was_read,
                    "reads it into Python (.item(), float(), if ...), where what depends on it cannot be followed: if "
                    "it is read to be shown, read it outside of forward",
                )
            )
        counts = [
            name
            for before, module in zip(numbers, modules, strict=True)
            for name, n in _numbers(module).items()
            if before.get(name) != n
        ]
        changed -= self._not_read
        kept = {name for name in changed if not buffers[name].is_floating_point()}
        if counts and kept:  # integers cannot be NaN
            raise UnsupportedError(
                _message(
                    kept,
                    f"counts its calls in {counts[0]!r}, so that the loss of a later step may depend on what it finds "
                    "there",
                )
            )
        self._refuse_new(changed, modes)
        self._harmless[modes] = changed | self._harmless.get(modes, set())
        return value


def _is_loss(value: object) -> bool:
    """Whether it is a number, or one for each example; what is none is refused by whoever asked for it."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if isinstance(value, (int, float))}


def _message(names: set[str], why: str) -> str:
    named = ", ".join(map(repr, sorted(names)))
    return (
        f"the module changes its {'buffers' if len(names) > 1 else 'buffer'} {named} in forward, and {why}. A step "
        "would depend on the one before beside the parameters, which an unroll does not carry on (every step sees the "
        "buffers as they were when it began); call .eval() on that layer, or write the buffer as a parameter, or pass "
        "it in hyper="
    )
