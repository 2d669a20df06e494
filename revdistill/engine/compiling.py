"""What every compiled part shares: the warning where one is dropped, and the first call, which compiles."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class CompileWarning(UserWarning):
    """A part was not compiled, or its compiled form was dropped; the result is exact all the same."""


def warn(what: str, error: Exception | None = None) -> None:
    """Say which part runs without torch.compile, and why."""
    reason = (
        f" ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''})"
        if error
        else ""
    )
    warnings.warn(f"compile=True: {what}{reason}; running it without torch.compile", CompileWarning, stacklevel=2)


@contextmanager
def compiling() -> Iterator[None]:
    """Around a call that compiles: the compiler's advice to use TensorFloat-32 is not for us, who turn it off.

    Where warnings are errors it would be one, and the compiled part would be dropped for it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
        yield
