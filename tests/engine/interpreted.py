"""Triton's kernels on the CPU: Triton's interpreter runs them in numpy, an operation at a time."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from types import ModuleType
from unittest import mock

import pytest

from revdistill.engine.integers.fused import Fused

BLOCK = 8  # elements of a program: few, so that small tensors have several


def needs_triton() -> None:
    """Skip where there is none to be had; on Linux it is there."""
    if sys.platform != "linux":
        pytest.skip("Triton is for Linux")


@cache
def kernels() -> ModuleType:
    """The module of that name, once more: what is interpreted is decided when it is imported."""
    needs_triton()
    importlib.import_module("triton.language")  # itself as it is otherwise
    spec = importlib.util.find_spec("revdistill.engine.integers.kernels")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        spec.loader.exec_module(module)
    return module


def fused() -> Fused:
    """The backend on tensors of the CPU."""
    return Fused(kernels(), BLOCK, BLOCK)
