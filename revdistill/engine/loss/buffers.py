"""Buffers that a module's forward changes: they must not influence what the loss is.

An unroll carries the parameters from one step to the next, and nothing else: every step sees the buffers of
from_module's call. For BatchNorm in training mode that is right, because what it writes (running statistics) it does
not read. For spectral_norm, a running mean that is subtracted, a counter that a schedule reads, it is another training.

Which it is, is found by following the data: under a dispatch mode that marks the memory of what is computed from a
buffer. Where neither the loss nor its gradient is marked by a changed buffer, and no marked number was read into
Python, the buffer did not matter there. So it is at the first step, and at the steps whose number (of all that the
module was ever evaluated at) is a power of two. At the others NaNs stand in its place, which show where they matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.checkpointing import Watched
from revdistill.engine.loss.evaluation import evaluating, flags_of
from revdistill.engine.loss.tree import leaves

Fresh = dict[str, Tensor]  # copies of the buffers, by name, that a call may write to
_TORCHS_FORWARDS: list[Any] = [
    cls.forward for cls in (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
]
_TORCHS_FORWARDS += [nn.SyncBatchNorm.forward]


class Buffers:
    """The buffers of a module: a call of it gets copies, and is refused where what it wrote would matter.

    Args:
        net: the module.
        modules: gives it and those in it, and the criterion's.
        buffers: by name, as they are at the beginning of every call.

    Attributes:
        sources: by name, what the copies of the last call were made of.
    """

    def __init__(self, net: nn.Module, modules: Callable[[], list[nn.Module]], buffers: Mapping[str, Tensor]) -> None:
        self._modules, self._buffers = modules, dict(buffers)
        # torch's own layers read it only to know how far their running statistics move, and these are not read.
        self._not_read = {
            f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked"
            for prefix, module in net.named_modules()
            if type(module).forward in _TORCHS_FORWARDS and not (module._forward_hooks or module._forward_pre_hooks)
        }
        self.sources = self._buffers
        self._harmless: dict[tuple[bool, ...], set[str]] = {}  # what was written, by the training modes
        self._evaluations: dict[tuple[bool, ...], int] = {}  # each step's first ones
        self._nans = {name: torch.full_like(b, torch.nan) for name, b in self._buffers.items() if b.is_floating_point()}

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
        if not self._buffers:
            return loss({})
        unroll = None if torch.compiler.is_compiling() else evaluating()
        if unroll is None:
            return loss(self._copies(frozenset()))
        modes = tuple(flags_of(self._modules()))
        if unroll.first_visit:
            count = self._evaluations[modes] = self._evaluations.get(modes, 0) + 1
            if modes not in self._harmless or count & (count - 1) == 0:
                return self._follow(loss, params, rebound, modes)
        harmless = self._harmless.get(modes)
        if harmless is None:
            return loss(self._copies(frozenset()))
        fresh = self._copies(harmless)
        places = {name: b.data_ptr() for name, b in fresh.items()} if unroll.first_visit else {}
        value = loss(fresh)
        if not _is_loss(value):
            return value
        if unroll.first_visit:
            self._refuse_new(self._changed(fresh, places, rebound()) - self._not_read, modes)
        if harmless and value.device.type == "cpu" and bool(value.isnan()):
            unspoilt = loss(self._copies(frozenset()))
            if not bool(unspoilt.isnan()):
                raise UnsupportedError(
                    _message(harmless, "the loss of a later step than the first depends on what it finds there")
                )
        return value

    def _copies(self, spoilt: set[str] | frozenset[str]) -> Fresh:
        """Fresh ones each time: what the module writes into them must not reach the next call. spoilt: NaN instead."""
        nans = self._nans
        self.sources = {n: nans[n] if n in spoilt and n in nans else b for n, b in self._buffers.items()}
        return {name: b.clone() for name, b in self.sources.items()}

    def _refuse_new(self, changed: set[str], modes: tuple[bool, ...]) -> None:
        """Raise the UnsupportedError of buffers that were not changed at the first step in these modes."""
        later = changed - self._harmless.get(modes, changed)
        if later:
            raise UnsupportedError(
                _message(later, "begins to at a later step than the first, where what depends on it is not known")
            )

    def _changed(self, fresh: Fresh, places: Mapping[str, int], rebound: set[str]) -> set[str]:
        changed = {name for name, b in fresh.items() if b._version or b.data_ptr() != places[name]}
        return changed | (rebound & fresh.keys())

    def _follow(
        self,
        loss: Callable[[Fresh], Tensor],
        params: Mapping[str, Tensor],
        rebound: Callable[[], set[str]],
        modes: tuple[bool, ...],
    ) -> Tensor:
        """The loss, with the data followed."""
        fresh = self._copies(frozenset())
        places = {name: b.data_ptr() for name, b in fresh.items()}
        modules = self._modules()
        numbers = [_numbers(module) for module in modules]
        # Not exact: to compare what a checkpoint computes again is to read it.
        with Watched(exact=False), _Marking(fresh) as marking, _Reads(marking):
            value = loss(fresh)
            if not _is_loss(value):
                return value
            wanted = [p for p in params.values() if p.requires_grad]
            found: tuple[Tensor | None, ...] = ()
            if value.requires_grad and wanted:
                found = torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True)
        changed = self._changed(fresh, places, rebound()) - self._not_read
        # By value, too: torch's kernels do not count what they write.
        changed |= {
            name for name, b in fresh.items() if name not in self._not_read and not torch.equal(b, self._buffers[name])
        }
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
        kept = {name for name in changed if name not in self._nans}
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
    """Whether it is a scalar; what is none is refused by whoever asked for it."""
    return isinstance(value, Tensor) and not value.ndim


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if isinstance(value, (int, float))}


def _message(names: set[str], why: str) -> str:
    named = ", ".join(map(repr, sorted(names)))
    return (
        f"the module changes its {'buffers' if len(names) > 1 else 'buffer'} {named} in forward, and {why}. A step "
        "would depend on the one before beside the parameters, which an unroll does not carry on (every step sees the "
        "buffers as from_module found them); call .eval() on that layer, or write the buffer as a parameter, or pass "
        "it in hyper="
    )


class _Marking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Marks the memory of every tensor that is computed from marked ones.

    Args:
        sources: marked from the beginning, each with its name.

    Attributes:
        was_read: the sources of what became a number of Python's.
    """

    def __init__(self, sources: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # holds on to the memory, so that no other gets its address
        self._memory: dict[int, tuple[Any, frozenset[str]]] = {}
        self.was_read: set[str] = set()
        for name, t in sources.items():
            self._mark(t, frozenset({name}))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here

    def of(self, t: Tensor) -> frozenset[str]:
        """The sources of what lies in t's memory."""
        found = self._memory.get(_memory(t)[0])
        return frozenset() if found is None else found[1]

    def _mark(self, t: Tensor, names: frozenset[str]) -> None:
        key, memory = _memory(t)
        self._memory[key] = memory, self.of(t) | names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        names = self._of_all(_read_by(given))
        found = func(*args, **kwargs)
        if names:
            for t in _tensors(found):
                self._mark(t, names)
            if isinstance(found, (bool, int, float, complex)):
                self.was_read |= names
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in _tensors(given.get(argument.name)):
                    self._written(t, names, func, given)
        return found

    def _of_all(self, values: Any) -> frozenset[str]:
        return frozenset().union(*map(self.of, _tensors(values)))

    def _written(self, t: Tensor, names: frozenset[str], func: Any, given: dict[str, Any]) -> None:
        if func._schema.name in _OVERWRITES:  # what was there before is not read
            names = self._of_all([v for key, v in given.items() if key != "self"])
            if not names and t.numel() * t.element_size() == t.untyped_storage().nbytes():
                self._memory.pop(_memory(t)[0], None)
                return
        if names:
            self._mark(t, names)


class _Reads(TorchFunctionMode):
    """Notes what is read into Python past every operator."""

    def __init__(self, marking: _Marking) -> None:
        super().__init__()
        self._marking = marking

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and args and isinstance(args[0], Tensor):
            self._marking.was_read |= self._marking.of(args[0])
        return func(*args, **(kwargs or {}))


_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr)
_OVERWRITES = {"aten::copy_", "aten::zero_", "aten::fill_"}


def _read_by(given: dict[str, Any]) -> list[Any]:
    """What an operator's result depends on: batch normalization in training mode writes its running statistics only."""
    if "running_mean" in given and given.get("training", given.get("train", True)):
        return [value for key, value in given.items() if key not in ("running_mean", "running_var")]
    return list(given.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    return (t for _, t in leaves(value, "") if isinstance(t, Tensor))


def _memory(t: Tensor) -> tuple[int, Any]:
    try:
        storage = t.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a tensor without memory of its own
        return id(t), t
    return storage._cdata, storage
