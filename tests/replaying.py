"""CUDA graphs without a GPU: what one call of a function did to tensors, done again without the function.

On the CPU with the integer work as tensor operations. As in a graph, nothing of Python runs on a replay, memory is
where it was, what lies outside of the graph is not kept alive by it, and a capture may not read numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from revdistill.engine.adjoints import program, replayed
from revdistill.engine.integers import bitstore, fingerprint, select
from revdistill.engine.integers.passes import Passes
from revdistill.engine.static import replays

_READS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero")


def replaying(patch: pytest.MonkeyPatch, *, may_read: bool = False) -> list[Recorded]:
    """From now on unrolls on the CPU are made as on CUDA.

    Args:
        patch: takes it back.
        may_read: whether a capture may read numbers: a loss's own on the CPU, where looking costs nothing.

    Returns:
        All graphs, as they are captured.
    """
    backend, made = Passes(), list[Recorded]()

    def record(body: replays.Body, warm_up: Callable[[replays.Body], None], *_: Any) -> Recorded:
        made.append(Recorded(body, warm_up, may_read=may_read))
        return made[-1]

    for module in (sys.modules["revdistill.engine.unrolled"], fingerprint, bitstore, select):
        patch.setattr(module, "backend_for", lambda *_, **__: backend)
    patch.setattr(program, "replay_of", record)
    # The device's own generator is the host's here.
    patch.setattr(replayed.Forward, "_draws_on_the_host", lambda _: False)
    return made


class _Outside:
    """A tensor that was there before the capture, by its place in memory."""

    def __init__(self, t: Tensor) -> None:
        self._storage, self._dtype = StorageWeakRef(t.untyped_storage()), t.dtype
        self._form = t.storage_offset(), t.shape, t.stride()

    def __call__(self) -> Tensor:
        storage: Any = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        assert storage is not None, f"a replay reads memory {self._form} that was given back"
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._form)


class Recorded(replays.Replay):
    """See above. calls: how often it was replayed."""

    captured = True

    def __init__(self, body: replays.Body, warm_up: Callable[[replays.Body], None], *, may_read: bool = False) -> None:
        self._work: list[tuple[Any, Any, Any, Any]] = []
        self.calls = 0
        warm_up(body)
        recording = _Recording(self._work, may_read=may_read)

        def recorded() -> None:
            with recording:
                body()

        warm_up(recorded)

    def __call__(self) -> None:
        self.calls += 1
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, outs in self._work:
                found = func(*map(_there, args), **{name: _there(a) for name, a in kwargs.items()})
                again = found if isinstance(found, (tuple, list)) else (found,)
                for out, t in zip(outs, (t for t in again if isinstance(t, Tensor)), strict=False):
                    out.copy_(t)


class _Recording(TorchDispatchMode):
    def __init__(self, work: list[tuple[Any, Any, Any, Any]], *, may_read: bool) -> None:
        super().__init__()
        self._work, self._may_read, self._made = work, may_read, dict[int, Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        if schema.name == "aten::lift_fresh":  # a number of Python's, which a graph keeps
            self._made[args[0].untyped_storage()._cdata] = args[0].untyped_storage()
        if schema.name in _READS and self._may_read:
            return func(*args, **kwargs)
        if schema.name in _READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        # Before it is changed: the form of some is, in place.
        kept = [self._kept(a) for a in args], {name: self._kept(a) for name, a in kwargs.items()}
        found = func(*args, **kwargs)
        several = found if isinstance(found, (tuple, list)) else (found,)
        tensors = [t for t in several if isinstance(t, Tensor)]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if is_view:
            return found
        outs = [] if schema.is_mutable else [t.detach() for t in tensors]
        self._work.append((func, *kept, outs))
        for t in tensors if not schema.is_mutable else ():
            self._made[t.untyped_storage()._cdata] = t.untyped_storage()
        return found

    def _kept(self, a: Any) -> Any:
        """The tensor, or where it is if it was there before."""
        if isinstance(a, (list, tuple)):
            return list(map(self._kept, a))
        if not isinstance(a, Tensor):
            return a
        return a.detach() if a.untyped_storage()._cdata in self._made else _Outside(a)


def _there(a: Any) -> Any:
    if isinstance(a, list):
        return list(map(_there, a))
    return a() if isinstance(a, _Outside) else a.detach() if isinstance(a, Tensor) else a
