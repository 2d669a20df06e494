"""Following what is computed from some tensors: a dispatch mode marks the memory of all that depends on them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from revdistill.engine.loss.tree import leaves

TORCHS_FORWARDS: list[Any] = [
    cls.forward for cls in (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
]
TORCHS_FORWARDS += [nn.SyncBatchNorm.forward]
_TORCHS_CODES = {forward.__code__ for forward in TORCHS_FORWARDS}


class CannotFollowError(Exception):
    """An operator has no kernel for autograd, and would lose its graph under a dispatch mode; or it takes functions
    (torch.cond).
    """


class Marking(TorchDispatchMode):  # type: ignore[no-untyped-call]
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

    supports_higher_order_operators = True  # to be told of them

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here

    def of(self, t: Tensor) -> frozenset[str]:
        """The sources of what lies in t's memory."""
        found = self._memory.get(memory_in(t)[0])
        return frozenset() if found is None else found[1]

    def read(self, names: frozenset[str]) -> None:
        """What is computed from these is read into Python. torch's own normalization does so for momentum=None, to know
        how far its running statistics move.
        """
        frame = sys._getframe(1) if names else None
        while frame is not None:
            if frame.f_code in _TORCHS_CODES:
                return
            frame = frame.f_back
        self.was_read |= names

    def exchanged(self, func: Any, tensors: Sequence[Tensor]) -> None:
        """A collective of torch.distributed is about to be called with these."""

    def _mark(self, t: Tensor, names: frozenset[str]) -> None:
        key, memory = memory_in(t)
        self._memory[key] = memory, self.of(t) | names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and "c10d" in func.namespace:
            self.exchanged(func, list(_tensors([*args, *kwargs.values()])))
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload) or (func.namespace not in _TORCHS and _loses_the_graph(func)):
            raise CannotFollowError
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        names = frozenset() if _takes_no_number(func) else self._of_all(_read_by(given))
        found = func(*args, **kwargs)
        if names:
            for t in _tensors(found):
                self._mark(t, names)
            if isinstance(found, (bool, int, float, complex)):
                self.read(names)
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
                self._memory.pop(memory_in(t)[0], None)
                return
        if names:
            self._mark(t, names)


class Reads(TorchFunctionMode):
    """Notes what is read into Python past every operator.

    Args:
        marking: takes the notes.
        addresses: whether to ask for an address is to read what is there; it may be given to other code.
    """

    def __init__(self, marking: Marking, *, addresses: bool = True) -> None:
        super().__init__()
        self._marking = marking
        self._reads = (*_READS, Tensor.data_ptr) if addresses else _READS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._reads and args and isinstance(args[0], Tensor):
            self._marking.read(self._marking.of(args[0]))
        return func(*args, **(kwargs or {}))


_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
_TORCHS = {"aten", "prim", "prims"}
_OVERWRITES = {"aten::copy_", "aten::zero_", "aten::fill_"}


def _takes_no_number(func: Any) -> bool:
    """Whether an operator makes a tensor of its argument's shape or dtype only."""
    name: str = func._schema.name.removeprefix("aten::")
    return name.startswith(("new_", "empty")) or name.endswith("_like")


def _loses_the_graph(func: Any) -> bool:
    keys = ("Autograd", "AutogradCPU", "AutogradCUDA", "CompositeImplicitAutograd")
    return not any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in keys)


def _read_by(given: dict[str, Any]) -> list[Any]:
    """What an operator's result depends on: batch normalization in training mode writes its running statistics only."""
    if "running_mean" in given and given.get("training", given.get("train", True)):
        return [value for key, value in given.items() if key not in ("running_mean", "running_var")]
    return list(given.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    return (t for _, t in leaves(value, "") if isinstance(t, Tensor))


def memory_in(t: Tensor) -> tuple[int, Any]:
    """What a tensor's memory is known by, and what keeps it: two tensors over the same numbers have the same."""
    try:
        storage = t.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a tensor without memory of its own
        return id(t), t
    return storage._cdata, storage
