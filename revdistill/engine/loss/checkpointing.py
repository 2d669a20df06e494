"""Activation checkpointing inside a loss: what is computed again for a backward pass is what was computed.

torch.utils.checkpoint runs a part of a module's forward again in the backward pass. By then a module that was called
with other tensors in the place of its own has its own back, and would compute with those. So each frame of
checkpointing that is made inside a call of a module gets the context of that call (`Held`), and enters it before it
computes again, whichever step's tensors the module holds meanwhile. Frames made while the engine evaluates a loss also
compare every tensor that they compute again with the first one, bit for bit.

torch has no public way to do this: the class of its frames is replaced while a module or a loss is being called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Protocol

import torch
import torch.utils.checkpoint as torchs
from torch import Tensor

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.integers.fingerprint import fingerprint_of

_REMEDY = "switch checkpointing off: the engine keeps the graphs of few steps, or of none (graph_bytes=0)"
NOT_THE_SAME = (
    "the loss uses activation checkpointing (torch.utils.checkpoint), and what was computed again for the backward "
    "pass was not what had been computed: a module that torch.func.functional_call called has its own parameters back "
    "by then, and random numbers need preserve_rng_state=True. Give the module to rd.from_module, whose loss holds the "
    f"unroll's parameters for as long as they are needed, or {_REMEDY}"
)
REENTRANT = (
    "the loss uses activation checkpointing with use_reentrant=True, which torch.autograd.grad cannot go through; "
    f"checkpoint with use_reentrant=False, or {_REMEDY}"
)
STACKED = (
    "the loss uses activation checkpointing under torch.func.vmap (rd.stack_modules), where torch cannot compute a "
    f"part again; train each network by rd.from_module, or {_REMEDY}"
)
_Again = Callable[[], AbstractContextManager[None]]
if not hasattr(torchs, "_CheckpointFrame"):
    raise ImportError(
        f"revdistill does not know how torch {torch.__version__} checkpoints activations, and would be wrong in "
        "silence where a module does; install a torch that constraints.txt names"
    )
_Frame: Any = torchs._CheckpointFrame
_Reentrant: Any = torchs.CheckpointFunction


class Held(Protocol):
    """A call of a module with other tensors in the place of its own."""

    def again(self) -> _Again:
        """The context of the call, as it is now, to be entered later."""


class _Local(threading.local):
    """What the frames that this thread makes are to do: enter `held` again, and compare what they compute."""

    held: tuple[Held, ...] = ()
    exact = False
    depth = 0


_LOCAL, _LOCK, _USERS = _Local(), threading.Lock(), [0]


class Watched:
    """The context of a call that may checkpoint; a class and not a generator, because every evaluation enters two.

    Args:
        held: the call of a module that it is, if it is one.
        exact: whether what is computed again is compared, bit for bit; None: as without this context.
    """

    _held: Held | None = None
    _exact: bool | None = None

    def __init__(self, held: Held | None = None, *, exact: bool | None = None) -> None:
        self._held, self._exact = held, exact

    def __enter__(self) -> None:
        self._before = _LOCAL.held, _LOCAL.exact
        if self._held is not None:
            _LOCAL.held = (*_LOCAL.held, self._held)
        if self._exact is not None:
            _LOCAL.exact = self._exact
        _LOCAL.depth += 1
        if _LOCAL.depth > 1:
            return
        with _LOCK:
            _USERS[0] += 1
            if _USERS[0] == 1:
                torchs._CheckpointFrame, torchs.CheckpointFunction = _frame, _ReentrantFunction  # type: ignore

    def __exit__(self, kind: object = None, error: BaseException | None = None, traceback: object = None) -> None:
        _LOCAL.held, _LOCAL.exact = self._before
        _LOCAL.depth -= 1
        if _LOCAL.depth:
            return
        with _LOCK:
            _USERS[0] -= 1
            if not _USERS[0]:
                torchs._CheckpointFrame, torchs.CheckpointFunction = _Frame, _Reentrant  # type: ignore


def _frame(*args: Any) -> Any:
    """What torch calls to make a frame, in any thread."""
    if not _LOCAL.depth or not torch.is_grad_enabled():
        return _Frame(*args)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(STACKED)
    return _WatchedFrame(*args)


class _ReentrantFunction:
    """Stands for torch's CheckpointFunction, which is `use_reentrant=True`."""

    @staticmethod
    def apply(*args: Any) -> Any:
        if _LOCAL.depth and torch.is_grad_enabled():
            raise UnsupportedError(REENTRANT)
        return _Reentrant.apply(*args)


class _WatchedFrame(_Frame):  # type: ignore[misc]
    """A frame that computes again in the context in which it was made."""

    def __init__(self, recompute: Callable[..., None], early: bool, on_error: Any, describe: Any) -> None:
        contexts = [held.again() for held in _LOCAL.held]

        def again(*args: Any) -> None:
            with ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context())
                recompute(*args)

        self._exact, self._packed = _LOCAL.exact, list[Tensor]()
        super().__init__(again, early, on_error, partial(self._describe, describe) if self._exact else describe)

    def _describe(self, describe: Callable[[Tensor], Any], x: Tensor) -> Any:
        if not self.forward_completed:
            self._packed.append(x)
        return describe(x), _bits(x)

    @property
    def forward_completed(self) -> bool:
        """Whether the part that is checkpointed has been computed; torch's frame sets it."""
        return self._completed

    @forward_completed.setter
    def forward_completed(self, completed: bool) -> None:
        self._completed = completed
        if not completed:
            return
        # What was written to later (running statistics) is so too when it is computed again, before it is compared.
        for i, x in enumerate(self._packed):
            described, bits = self.x_metadatas[i]
            if _bits(x) != bits:
                self.x_metadatas[i] = described, _Anything()
        self._packed.clear()

    def check_recomputed_tensors_match(self, gid: Any) -> None:
        try:
            super().check_recomputed_tensors_match(gid)
        except torchs.CheckpointError as error:
            if self._exact:
                raise UnsupportedError(NOT_THE_SAME) from error
            raise


class _Anything:
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def _bits(x: Tensor) -> int | None:
    """A number that tells one tensor's bits from another's; None of what may hold bits that nobody wrote."""
    if x.dtype == torch.uint8 or x.layout != torch.strided:  # cuDNN's scratch space
        return None
    return fingerprint_of(x)
