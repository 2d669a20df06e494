"""What an evaluation of the loss is made of, as far as a capture fixes it: its operators, their numbers, and the memory
that they find there.

A graph repeats the addresses that it was captured with. What the loss refers to beside params, batch and hyper (frozen
parameters, class weights) may be another tensor when the next unroll has the program, and its old memory somebody
else's; and a number of Python's may be another one. Neither needs to show in the bits of the steps that are compared.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from revdistill.engine.integers.fingerprint import fingerprint_of
from revdistill.engine.loss.marking import memory_in

_SETTINGS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators of what is evaluated inside. device: of the training.

    Attributes:
        work: each operator with its arguments, to be compared with another trace's.
        held: the memory that was there before: as long as the trace is there, nobody else gets it.
    """

    supports_higher_order_operators = True  # to be told of them

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self.work: list[Hashable] = []
        self.held: dict[int, Any] = {}
        # By their numbers: a reference that does not keep memory keeps its number from being another's.
        self._made: dict[int, tuple[int, StorageWeakRef]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(func) == "aten.lift_fresh.default":  # numbers of Python's that became a tensor
            self.work.append((str(func), fingerprint_of(args[0])))
            self._make(args[0])
        else:
            self.work.append((str(func), self._noted(args), self._noted(tuple(sorted(kwargs.items())))))
        found = func(*args, **kwargs)
        for t in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(t, Tensor) and memory_in(t)[0] not in self.held:
                self._make(t)
        return found

    def _make(self, t: Tensor) -> None:
        key, storage = memory_in(t)
        if key not in self._made and storage is not t:
            self._made[key] = len(self._made), StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def _noted(self, a: Any) -> Hashable:
        if isinstance(a, (tuple, list)):
            return tuple(map(self._noted, a))
        if isinstance(a, Tensor):
            return self._memory(a), a.dtype, tuple(a.shape), *((a.stride(), a.storage_offset()) if _lies(a) else ())
        # -0.0 is 0.0 where they are compared, and no NaN is any NaN
        return f"{type(a)} {a!r}" if isinstance(a, _SETTINGS) else str(type(a))

    def _memory(self, t: Tensor) -> Hashable:
        key, storage = memory_in(t)
        if key in self._made:
            return self._made[key][0]
        if t.device != self._device and not t.ndim:  # a number, which a kernel is given
            return "number", fingerprint_of(t)
        self.held[key] = storage
        return "there", key


def is_like(a: Trace | None, b: Trace | None) -> bool:
    """Whether a graph of the one does what the other does; not where one is not known."""
    return a is not None and b is not None and a.work == b.work


def _lies(t: Tensor) -> bool:
    return t.layout == torch.strided
