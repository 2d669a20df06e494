"""A measurement in a process of its own under its own time limit: what hangs, is killed or spoils its device ends
alone.

The process is a copy of this one, so that it imports nothing again; nothing may have been computed here before, as
neither CUDA's nor autograd's threads are copied. Where CUDA will not start in a copy, it is a fresh process after all.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu.lines import attempt, in_words, write

UNTIL = "REVDISTILL_UNTIL"  # the environment variable that says when the part will be ended, in seconds since 1970
RESERVE = 3.0  # seconds, to say what happened before then
UNLIMITED = 3_600.0
_FAILED, _SPOILT = 3, 4  # exit codes: a line says why; CUDA did not start
_ways = ["fork", "spawn"]  # those that may still do


def left() -> float:
    """Seconds for what this part still has to do."""
    until = os.environ.get(UNTIL)
    return UNLIMITED if until is None else float(until) - time.time() - RESERVE


def shared(count: int) -> Any:
    """So many numbers, 0 at first, that a process of `apart` can set."""
    return multiprocessing.Array("d", count, lock=False)


def apart(part: str, run: Callable[..., None], *arguments: Any, limit: float = UNLIMITED, **what: Any) -> bool:
    """Run it there, with at most `limit` seconds of what is left; whether it came to its end without an error.

    An error, and an end before the end, is a line {"part": part, **what, "error": ...}. arguments: the name of the
    device among them.
    """
    seconds = min(limit, left())
    if seconds <= 0:
        write(part, **what, error="TimeoutError: no time was left")
        return False
    copies = _ways[0] == "fork"
    target = (part, run, arguments, what, copies and "cuda" in arguments)
    process: Any = multiprocessing.get_context(_ways[0]).Process(target=_inside, args=target)  # type: ignore[attr-defined]
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        write(part, **what, error=f"TimeoutError: not done within {seconds:.0f} s")
        return False
    if process.exitcode == _SPOILT and copies:
        del _ways[0]
        return apart(part, run, *arguments, limit=limit, **what)
    if process.exitcode not in (0, _FAILED):
        write(part, **what, error=f"ChildProcessError: the process ended with exit code {process.exitcode}")
    return bool(process.exitcode == 0)


def _inside(part: str, run: Callable[..., None], arguments: tuple[Any, ...], what: dict[str, Any], first: bool) -> None:
    """first: see whether CUDA starts."""
    if first:
        try:
            torch.zeros(1, device="cuda")
        except Exception as error:  # whatever it says, a fresh process is the way to know
            print(f"CUDA does not start in a copy of a process: {in_words(error)}", flush=True)
            os._exit(_SPOILT)
    done = False
    with attempt(part, **what):
        run(*arguments)
        done = True
    if not done:
        os._exit(_FAILED)
