"""Fixtures: signals as a terminal sends them, and the stand-in device; which files are read, and in which order.

Tests on that have the marker `standin` and a process of their own (python -m pytest -m "standin and not slow"):
autograd has threads for the devices that it knew of when something first ran backward, and a process that has any
cannot be forked.

One thread in each process: what is tested is small, there are as many processes as cores, and threads that wait for
each other are slow where a core has other work.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from revdistill.engine.adjoints import fixed_point
from tests import standin

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, and of pytest's workers
torch.set_num_threads(1)

# Files that take longest, which two processes (pytest -n 2) begin with: what begins last is what one of them waits for
LONGEST = (
    "cli/test_torchrun.py",
    "cli/test_cli.py",
    "engine/test_adjoints.py",
    "engine/test_group.py",
    "distill/test_strangers.py",
    "test_packaging.py",
    "engine/test_cost.py",
    "engine/test_jacobian.py",
    "outer/test_optimizers.py",
    "test_several_processes_page.py",
)
MARKS = ("standin", "imitated", "cuda")  # which few files have


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where tests of one of these marks are asked for, files without it are not read: to read all takes 7 seconds."""
    asked = set(re.findall(r"\w+", re.sub(r"\bnot \w+", "", config.option.markexpr))) - {"and", "or"}
    if collection_path.suffix != ".py" or not asked or not asked <= set(MARKS):
        return None
    text = collection_path.read_text()
    return None if any(f"mark.{mark}" in text for mark in asked) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    texts = {path: path.read_text() for path in {item.path for item in items}}
    for item in items:
        for mark in MARKS:
            if item.get_closest_marker(mark) and f"mark.{mark}" not in texts[item.path]:
                raise pytest.UsageError(f"{item.nodeid} has the mark {mark}; write pytest.mark.{mark} in its file")
    place = {name: i for i, name in enumerate(LONGEST)}
    tests = Path(__file__).parent
    items.sort(key=lambda item: place.get(item.path.relative_to(tests).as_posix(), len(place)))


@pytest.fixture
def heard_signals() -> Iterator[None]:
    """Signals to stop are heard, whoever runs the tests: nohup ignores SIGHUP, a shell's background SIGINT.

    A process that is started meanwhile hears them too: it inherits what is ignored.
    """
    names = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
    before = {getattr(signal, name): signal.signal(getattr(signal, name), heard) for name, heard in names.items()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.fixture
def counts() -> Iterator[standin.Counts]:
    """While this lasts there is the stand-in device; what happens on it."""
    if not standin.available():
        pytest.skip("this torch cannot have a device written in Python")
    with standin.running() as found:
        yield found


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each unroll's own record of itself, as it is made."""
    seen: list[Any] = []

    class Watched(fixed_point.Unrolled):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            seen.append(self)

    monkeypatch.setattr(fixed_point, "Unrolled", Watched)
    return seen
