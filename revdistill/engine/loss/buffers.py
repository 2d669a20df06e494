"""Buffers that a module's forward changes: they must not influence what the loss is.

An unroll carries the parameters from one step to the next, and nothing else: every step sees the buffers of
from_module's call. For BatchNorm in training mode that is right, because what it writes (running statistics) it does
not read. For spectral_norm, a running mean that is subtracted, a counter that a schedule reads, it is another training.

Which it is, is found by following the data once: an evaluation under a dispatch mode that marks the memory of what was
computed from a changed buffer. Where neither the loss nor its gradient is marked, and no marked number was read into
Python, the buffer cannot matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.checkpointing import Watched
from revdistill.engine.loss.evaluation import evaluating, flags_of
from revdistill.engine.loss.randomness import generators_of
from revdistill.engine.loss.tree import leaves

# evaluate(buffers) -> loss
Evaluate = Callable[[dict[str, Tensor]], Tensor]


class BufferCheck:
    """Refuses a module whose loss depends on buffers that its forward changes, at the first step that changes them.

    Args:
        nets: the module; and the criterion, where it is one.
        buffers: by name, as they are at the beginning of every call.
    """

    def __init__(self, nets: Sequence[nn.Module], buffers: Mapping[str, Tensor]) -> None:
        self._nets, self.buffers = nets, buffers
        # Of torch's own layers: it says how far the running statistics move, and they are not read.
        self._read = {
            f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked"
            for prefix, module in nets[0].named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
        }
        # Of those layers it is known by their code, whatever else the module counts.
        self._torchs = {
            f"{prefix}.{key}" if prefix else key
            for prefix, module in nets[0].named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for key in module._buffers
        }
        self._harmless: dict[tuple[bool, ...], set[str]] = {}  # by the training modes

    def look(
        self, fresh: Mapping[str, Tensor], rebound: set[str], params: Mapping[str, Tensor], evaluate: Evaluate
    ) -> None:
        """Check one evaluation of an unroll; others are not looked at.

        Args:
            fresh: the copies of the buffers that the evaluation was made with.
            rebound: the names in whose places forward left other tensors.
            params: what the gradient is taken of.
            evaluate: the loss with other copies of the buffers.

        Raises:
            UnsupportedError: the loss or its gradient depends on a buffer that forward changed.
        """
        unroll = evaluating()
        if unroll is None or not unroll.first_visit or not self.buffers or torch.compiler.is_compiling():
            return
        modules = [module for net in self._nets for module in net.modules()]
        modes = tuple(flags_of(modules))
        changed = {name for name, b in fresh.items() if b._version} | (rebound & fresh.keys())
        if modes not in self._harmless:  # by value, once: torch's kernels do not count what they write
            changed |= {name for name, b in fresh.items() if not torch.equal(b, self.buffers[name])}
        harmless = self._harmless.setdefault(modes, set())
        unknown = changed - harmless - self._read
        if unknown:
            with _Undone(modules, next(iter(fresh.values())).device) as undone:
                if self._influence(unknown, params, evaluate):
                    guilty = [name for name in fresh if name in unknown and self._influence({name}, params, evaluate)]
                    raise UnsupportedError(_message(guilty or sorted(unknown)))
                counted, written = undone.counted(), sorted(unknown - self._torchs)
                if counted and written:  # a later call may read what this one only wrote
                    raise UnsupportedError(_message(written, counted))
        harmless |= unknown

    def _influence(self, names: set[str], params: Mapping[str, Tensor], evaluate: Evaluate) -> bool:
        fresh = {name: b.clone() for name, b in self.buffers.items()}
        # Not exact: to compare what a checkpoint computes again is to read it.
        with Watched(exact=False), _Marking([fresh[name] for name in names]) as marking:
            value = evaluate(fresh)
            wanted = [p for p in params.values() if p.requires_grad]
            found = torch.autograd.grad(value, wanted, allow_unused=True) if value.requires_grad and wanted else ()
        return marking.was_read or any(marking.marks(t) for t in (value, *found) if t is not None)


def _message(names: list[str], counted: str | None = None) -> str:
    named = ", ".join(map(repr, names))
    depends = "the loss depends on what it finds there"
    if counted is not None:
        depends = f"counts its calls in {counted!r}, so that the loss of a later step may depend on what it finds there"
    return (
        f"the module changes its {'buffers' if len(names) > 1 else 'buffer'} {named} in forward, and {depends}: a step "
        "would depend on the one before beside the parameters, which an unroll does not carry on (every step sees the "
        "buffers as from_module found them); call .eval() on that layer, or write the buffer as a parameter, or pass "
        "it in hyper="
    )


class _Undone:
    """The context of evaluations that leave no trace in the modules' own attributes and in torch's random numbers."""

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self._modules, self._generators = modules, generators_of(device)

    def __enter__(self) -> _Undone:
        self._attributes = [dict(vars(module)) for module in self._modules]
        self._states = [generator.get_state() for generator in self._generators]
        return self

    def counted(self) -> str | None:
        """The name of an attribute that holds another number than before, if there is one."""
        for module, before in zip(self._modules, self._attributes, strict=True):
            for key, value in vars(module).items():
                if isinstance(value, (int, float)) and before.get(key) != value:
                    return key
        return None

    def __exit__(self, *_: object) -> None:
        for module, attributes in zip(self._modules, self._attributes, strict=True):
            vars(module).clear()
            vars(module).update(attributes)
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)


class _Marking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Marks the memory of every tensor that is computed from marked ones.

    Args:
        sources: marked from the beginning.

    Attributes:
        was_read: whether a number of marked memory became a number of Python's.
    """

    def __init__(self, sources: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory: dict[int, Any] = {}  # holds on to it, so that no other memory gets its address
        self.was_read = False
        for t in sources:
            self._mark(t)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here

    def marks(self, t: Tensor) -> bool:
        """Whether t lies in marked memory."""
        return _memory(t)[0] in self._memory

    def _mark(self, t: Tensor) -> None:
        key, memory = _memory(t)
        self._memory[key] = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        touched = any(map(self.marks, _tensors(_read_by(given))))
        found = func(*args, **kwargs)
        if touched:
            for t in _tensors(found):
                self._mark(t)
            self.was_read |= isinstance(found, (bool, int, float, complex))
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in _tensors(given.get(argument.name)):
                    self._written(t, touched, func, given)
        return found

    def _written(self, t: Tensor, touched: bool, func: Any, given: dict[str, Any]) -> None:
        name = func._schema.name
        if name in _OVERWRITES:  # what was there before is not read
            touched = any(map(self.marks, _tensors([v for key, v in given.items() if key != "self"])))
            if not touched and t.numel() * t.element_size() == t.untyped_storage().nbytes():
                self._memory.pop(_memory(t)[0], None)
                return
        if touched:
            self._mark(t)


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
