"""The device that these tests run on, and a JSON line for each outcome as soon as it is known.

REVDISTILL_DEVICE   cuda (the default; skipped where there is none), cpu, or standin (tests/standin.py)
REVDISTILL_STEPS    the length of an unroll, where it is not to be the device's own
REVDISTILL_RESULTS  a file that outcomes are appended to
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu.place import here, missing

from tests import standin
from tests.cuda.cases import DEVICE

if DEVICE == "standin" and missing(DEVICE) is None:
    standin.device()  # before any test's backward: autograd has a queue for each device that was known at the first one

LAST_LINES = 12  # of an error


@pytest.fixture
def device() -> Iterator[torch.device]:
    reason = missing(DEVICE)
    if reason:
        pytest.skip(reason)
    with here(DEVICE) as found:
        yield found


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get("REVDISTILL_RESULTS")
    if "PYTEST_XDIST_WORKER" in os.environ:  # the process that started it hears of it too
        return
    if not path or not report.nodeid.startswith("tests/cuda/") or (report.when != "call" and report.passed):
        return
    line = {"part": "tests", "test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.skipped and isinstance(report.longrepr, tuple):
        line["reason"] = report.longrepr[2].removeprefix("Skipped: ")
    elif not report.passed:
        line["error"] = "\n".join(report.longreprtext.splitlines()[-LAST_LINES:])
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")
