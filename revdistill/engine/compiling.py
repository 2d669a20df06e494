"""What all compiled parts share: the warning when one is dropped, and the context of the call that compiles."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class CompileWarning(UserWarning):
    """A part could not be compiled, or its compiled form gave other values, and it runs without; results are exact.

    That a compiled form is slower, and not used for that reason, is no warning.
    """


def warn(what: str, error: Exception | None = None) -> None:
    """Warn that a part runs without torch.compile.

    Args:
        what: happened, or was found.
        error: what the compiler raised, if it did.
    """
    _say(f"compile=True: {what}{_reason(error)}; running it without torch.compile")


def warn_of_replays(what: str, error: Exception | None = None) -> None:
    """Warn that steps are not replayed.

    Args:
        what: happened, or was found.
        error: what a capture raised, if it did.
    """
    _say(f'compile="graphs": {what}{_reason(error)}; making the steps eagerly')


def _reason(error: Exception | None) -> str:
    if error is None:
        return ""
    text = str(error).strip()
    return f" ({type(error).__name__}: {text.splitlines()[0] if text else ''})"


@contextmanager
def compiling() -> Iterator[None]:
    """The context of a call that compiles, in which the compiler does not advise TensorFloat-32.

    An unroll turns it off. Where the user makes errors of warnings, the advice would be one, and the compiled part
    would be dropped for it. What torch.func switches off while it is traced, and leaves off where the compiler fails,
    is on again afterwards: the hooks of saved tensors, which activation checkpointing needs.
    """
    hooks: Any = torch._C._autograd
    enabled = hooks._saved_tensors_hooks_is_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
        try:
            yield
        finally:
            if enabled and not hooks._saved_tensors_hooks_is_enabled():
                hooks._saved_tensors_hooks_enable()


def give_up(what: str, error: Exception | None = None) -> None:
    """Warn that kernels are not used: tensor operations, slower and with the same bits, take their place.

    Args:
        what: is given up.
        error: what was raised, if anything.
    """
    _say(f"{what} cannot be used{_reason(error)}; tensor operations take their place")


def _say(text: str) -> None:
    warnings.warn(text, CompileWarning, stacklevel=3)
