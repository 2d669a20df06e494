"""Whose turn it is: torch keeps settings for the whole process, and a module has one place for each parameter, so the
passes of unrolls, and calls of modules with other parameters, are one thread's at a time.
"""

from __future__ import annotations

import os
import threading

# Re-entrant: a loss may hold an unroll of its own.
_LOCK = threading.RLock()


def turn() -> threading.RLock:
    """The lock: held in `with turn():`, let go and taken again around a user's function."""
    return _LOCK


def _forked() -> None:
    """A child process has none of the other threads, and must not wait for them."""
    global _LOCK
    if _LOCK.acquire(blocking=False):
        _LOCK.release()  # nobody's, or that of the very thread that lives on here
    else:
        _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
