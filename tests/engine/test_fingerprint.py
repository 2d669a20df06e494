"""The largest entry and the fingerprint: right for every float there is, and the same on every device."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revdistill.engine.integers.fingerprint import Fingerprints
from revdistill.engine.integers.loops import LOOPS
from revdistill.engine.integers.passes import Passes

floats = st.lists(st.floats(width=32), min_size=1, max_size=20)


@settings(deadline=None)
@given(floats, st.sampled_from([torch.float32, torch.float64]))
def test_largest(entries: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(entries, dtype=dtype)
    expected = math.nan if any(map(math.isnan, entries)) else max(map(abs, entries))
    for found in (LOOPS.largest(x), float(Passes().largest(x))):
        assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_largest_of_other_layouts() -> None:
    for backend in (LOOPS, Passes()):
        assert float(backend.largest(torch.zeros(0))) == 0.0
        assert float(backend.largest(-torch.arange(6.0).reshape(2, 3).t())) == 5.0
        assert float(backend.largest(torch.tensor([-3.0, 2.0]))) == 3.0


@settings(deadline=None)
@given(floats, st.data())
def test_fingerprint_sees_one_bit(entries: list[float], data: st.DataObject) -> None:
    x = torch.tensor(entries)
    changed = x.clone()
    changed.view(torch.int32)[data.draw(st.integers(0, len(x) - 1))] ^= 1 << data.draw(st.integers(0, 30))
    assert LOOPS.fingerprint(x) == LOOPS.fingerprint(x.clone())
    assert LOOPS.fingerprint(x) != LOOPS.fingerprint(changed)


@pytest.mark.parametrize("pattern", [(1, -1), (1, -2, 1), (1, -3, 3, -1), (1, -1, -1, 1)])
def test_last_bits_that_cancel_in_a_sum_do_not_cancel_here(pattern: tuple[int, ...]) -> None:
    x = torch.linspace(1.0, 2.0, 1001)
    for start in range(0, 900, 7):
        changed = x.clone()
        changed.view(torch.int32)[start : start + len(pattern)] += torch.tensor(pattern, dtype=torch.int32)
        assert LOOPS.fingerprint(x) != LOOPS.fingerprint(changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loop_and_the_tensor_operations_agree(dtype: torch.dtype) -> None:
    x = torch.randn(1001, dtype=dtype, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    assert LOOPS.fingerprint(x) == int(Passes().fingerprint(x))
    assert torch.equal(x, before)


def test_fingerprints_on_a_device_do_not_wait_for_it() -> None:
    kept = Fingerprints(3, torch.device("meta"))
    kept._kept = torch.zeros(3, dtype=torch.int64)
    x = torch.randn(5)
    kept.record(1, x)
    same, other = kept.matches(1, x), kept.matches(1, x + 1)
    assert isinstance(same, Tensor)
    assert bool(same)
    assert not bool(other)
