"""Functions that torch.compile made, in evaluations that are watched: they run as they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uncompiled() -> Iterator[None]:
    """The context of an evaluation under a dispatch mode, and of the same evaluation made again without it.

    Under a mode the compiler would trace the mode's own functions, compile anew each time, and give the user's up for
    good. Where it was never imported nothing is compiled.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
