"""Fixtures for tests on the stand-in device.

They have the marker `standin` and a process of their own (python -m pytest -m "standin and not slow"): autograd has
threads for the devices that it knew of when something first ran backward, and a process that has any cannot be forked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from revdistill.engine.adjoints import adjoint
from tests import standin


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

    class Watched(adjoint.Unrolled):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            seen.append(self)

    monkeypatch.setattr(adjoint, "Unrolled", Watched)
    return seen
