"""The modules that an unroll's loss calls: on the way back in the training mode of the way forward.

A loss made of a module reads the module as it is when it is called, and everybody calls net.eval() between an unroll
and the validation loss. So an unroll notes, step by step, in which mode its loss found each module, and evaluates the
step again in that mode; the module has its own back afterwards. It also notes what else a module is made of, to name
what changed where an evaluation does not repeat itself.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from revdistill.engine.integers.fingerprint import fingerprint_of
from revdistill.engine.loss.checkpointing import Watched
from revdistill.engine.loss.modules import HOOKS, OWN
from revdistill.engine.loss.operators import name_error

Flags = list[bool]
Modes = tuple[tuple[bool, ...], ...]


class _Local(threading.local):
    """The unroll whose loss this thread is evaluating; of unrolls within one another the outermost."""

    unroll: Modules | None = None


_LOCAL = _Local()


def evaluating() -> Modules | None:
    """The modules of the unroll whose loss is being evaluated in this thread, None outside."""
    return _LOCAL.unroll


def flags_of(modules: list[nn.Module]) -> Flags:
    """Which of the modules are in training mode."""
    return [module.training for module in modules]


def set_flags(modules: list[nn.Module], flags: Flags) -> None:
    """Put the modules into these modes; train() is not called, which a module may have of its own."""
    for module, training in zip(modules, flags, strict=True):
        module.training = training


class HoldsBuffers(Protocol):
    """Whoever gives a module its buffers."""

    def begin(self, buffers: dict[str, Tensor]) -> None:
        """An evaluation begins, of an unroll at whose beginning they were these."""


class Modules:
    """The modules that one unroll's loss calls.

    Args:
        steps: of the unroll.

    Attributes:
        first_visit: whether the step is evaluated for the first time.
        at_last_step: whether it is the last one.
        watching: whether the evaluation is compared: see `watch`.
        step: that is evaluated.
        uncompiled: the steps that were evaluated under a dispatch mode, and are to be evaluated again alike.
        buffers: of modules, as they were when the unroll began; by who asks for them.
        grouped: whether the unroll is made on the ranks of a group.
        check_exchanges: checks the graph of a loss that was seen to exchange tensors: value, theta, the batch's leaves,
            hyper's; None where it was not.
    """

    def __init__(self, steps: int = 0) -> None:
        self._records: dict[int, _Record] = {}
        self._steps = steps
        self._last = self.step = -1  # the last step that was evaluated
        self.uncompiled: set[int] = set()
        self.first_visit = self.watching = self.at_last_step = False
        self._noted: dict[int, dict[str, int]] = {}
        self.buffers: dict[HoldsBuffers, dict[str, Tensor]] = {}
        self.grouped = False
        self.check_exchanges: Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]], None] | None = None

    def calls(self, net: nn.Module, modules: list[nn.Module], replaced: Collection[str]) -> None:
        """The loss is about to call `net`. modules: it and those in it; replaced: the names of what is replaced."""
        if not self.first_visit:
            return
        record = self._records.get(id(net))
        if record is None:
            record = self._records[id(net)] = _Record(net, modules, replaced)
        if self.watching and id(net) not in self._noted:
            self._noted[id(net)] = record.fingerprints()

    def watch(self) -> None:
        """The evaluation that has begun is compared: see `changed_frozen`."""
        self.watching, self._noted = True, {}

    def changed_frozen(self) -> list[str]:
        """The frozen parameters that are no longer what they were when the loss began to call their modules."""
        self.watching, noted = False, self._noted
        now = {key: self._records[key].fingerprints() for key in noted}
        return [name for key, before in noted.items() for name in before if before[name] != now[key].get(name)]

    @property
    def replaced(self) -> list[tuple[str, Tensor]]:
        """The parameters of the modules in whose place calls put others."""
        return [named for record in self._records.values() for named in record.replaced]

    @property
    def frozen(self) -> list[tuple[str, Tensor]]:
        """The parameters of the modules that no call replaced, as they were at the first calls."""
        return [named for record in self._records.values() for named in record.frozen]

    @property
    def modes(self) -> Modes:
        """The training modes of each module, as they are now."""
        return tuple(tuple(flags_of(record.modules)) for record in self._records.values())

    def modes_at(self, k: int) -> Modes:
        """Those in which step k, which was made, is evaluated again."""
        return tuple(tuple(record.flags_at(k)) for record in self._records.values())

    def begin(self, k: int) -> None:
        """Step k is evaluated: for the first time, or again and in the same modes."""
        self.first_visit, self.watching = k > self._last, False
        self.step, self.at_last_step = k, k == self._steps - 1
        for owner, found in self.buffers.items():
            owner.begin(found)
        for record in self._records.values():
            record.begin(None if self.first_visit else k)

    def end(self, k: int) -> None:
        """Step k has been evaluated."""
        for record in self._records.values():
            record.end(k, first=self.first_visit)
        self._last, self.first_visit = max(k, self._last), False

    def changed_numbers(self) -> list[str]:
        """The numbers among the modules' attributes that are not what they were at the first call: counters."""
        return [name for record in self._records.values() for name in record.changed_numbers()]

    def what_changed(self) -> list[str]:
        """What a module is made of and was not made of at its first call, in words; the mode is no part of it."""
        return [change for record in self._records.values() for change in record.what_changed()]


class Evaluation(Watched):
    """The context of one evaluation of the loss or its derivatives: gradients on, the modules that the loss calls in
    the modes of the way forward, activation checkpointing watched, and torch's errors about what cannot be had named.

    A class and not a generator, because every gradient and every product enters one.

    Args:
        modules: those that the loss calls.
        k: the step.

    Raises:
        UnsupportedError: within the context, see `name_error`.
    """

    _exact = True

    def __init__(self, modules: Modules, k: int) -> None:
        self._modules, self._k, self._grad = modules, k, torch.enable_grad()

    def __enter__(self) -> None:
        super().__enter__()
        self._grad.__enter__()
        # torch switches it off within the forward of an autograd.Function, in which the way forward is made.
        self._dual = torch._C._is_fwd_grad_enabled()
        torch._C._set_fwd_grad_enabled(True)
        self._outermost = _LOCAL.unroll is None
        if self._outermost:
            _LOCAL.unroll = self._modules
            self._modules.begin(self._k)

    def __exit__(self, kind: object = None, error: BaseException | None = None, traceback: object = None) -> None:
        if self._outermost:
            _LOCAL.unroll = None
            self._modules.end(self._k)
        torch._C._set_fwd_grad_enabled(self._dual)
        self._grad.__exit__(kind, error, traceback)
        super().__exit__()
        if isinstance(error, RuntimeError):
            name_error(error)


class _Record:
    """One module of an unroll: its modes at the steps, and what it was made of at its first call."""

    def __init__(self, net: nn.Module, modules: list[nn.Module], replaced: Collection[str]) -> None:
        self.net, self.modules = net, modules
        parameters = list(net.named_parameters())
        self.replaced = [(name, p) for name, p in parameters if name in replaced]
        frozen = [(name, p) for name, p in parameters if name not in replaced]
        self.frozen = [(name, p) for name, p in frozen if p.layout == torch.strided and not p.is_meta]
        self._parts = dict(_parts(net))
        self._from: list[int] = []  # the steps from which on the modes were ...
        self._flags: list[Flags] = []  # ... these
        self._own: Flags | None = None

    def begin(self, k: int | None) -> None:
        """An evaluation begins; k: a step that was evaluated before, in whose modes it is to be."""
        self._own = None
        if k is None or k < self._from[0]:
            return
        wanted, found = self.flags_at(k), flags_of(self.modules)
        if wanted != found:
            self._own = found
            set_flags(self.modules, wanted)

    def flags_at(self, k: int) -> Flags:
        """The modes that were noted last, up to step k."""
        return self._flags[max(0, bisect_right(self._from, k) - 1)]

    def end(self, k: int, *, first: bool) -> None:
        """An evaluation ends. A loss that switches modes is taken to put back what it found."""
        if self._own is not None:
            set_flags(self.modules, self._own)
        elif first:
            flags = flags_of(self.modules)
            if not self._flags or self._flags[-1] != flags:
                self._from.append(k)
                self._flags.append(flags)

    def fingerprints(self) -> dict[str, int]:
        """Of the frozen parameters, as they are now."""
        if not self.frozen:
            return {}
        now = dict(self.net.named_parameters())
        return {name: fingerprint_of(now[name]) for name, _ in self.frozen if name in now}

    def changed_numbers(self) -> Iterator[str]:
        now = dict(_parts(self.net))
        for name, before in self._parts.items():
            if isinstance(before[0], (int, float)) and before != now.get(name, _ABSENT):
                yield name

    def what_changed(self) -> Iterator[str]:
        now = dict(_parts(self.net))
        for name in {**self._parts, **now}:
            before, after = self._parts.get(name, _ABSENT), now.get(name, _ABSENT)
            if before != after:
                yield f"{name} ({_words(before)}, now {_words(after)})"


_ABSENT = ("absent",)


def _parts(net: nn.Module) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What a module is made of: in words where, and something to compare."""
    for prefix, module in net.named_modules():
        of = f" of {prefix}" if prefix else ""
        yield f"the module {prefix or 'itself'}", (type(module).__name__, id(module))
        for key, value in vars(module).items():
            if key not in OWN:
                yield f"the attribute {key!r}{of}", _summary(value)
        for kind, holder in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key, tensor in holder.items():
                if tensor is not None:
                    described = f"{tensor.dtype} on {tensor.device}, requires_grad={tensor.requires_grad}"
                    yield f"the {kind} {key!r}{of}", (described, tuple(tensor.shape))
        if any(getattr(module, key, None) for key in HOOKS):
            yield f"the hooks{of}", (sum(len(getattr(module, key, ()) or ()) for key in HOOKS),)


def _summary(value: Any) -> tuple[Any, ...]:
    if value is None or isinstance(value, (bool, int, float, str)):
        return (value,)
    if isinstance(value, Tensor):
        return ("a tensor", id(value), value._version)
    if isinstance(value, (list, tuple, dict, set)):
        return (f"a {type(value).__name__} of {len(value)}", id(value))
    return (f"a {type(value).__name__}", id(value))


def _words(summary: tuple[Any, ...]) -> str:
    return str(summary[0]) if isinstance(summary[0], str) else repr(summary[0])
