"""The integers: exact decay and back, for any value, rate, length and schedule."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.fixedpoint import INTEGER_BITS, FixedPoint
from revdistill.engine.integers.history import DeviceHistory, FileHistory, HostHistory, NoHistory, open_history
from revdistill.engine.integers.loops import LOOPS
from revdistill.engine.integers.passes import Passes
from revdistill.engine.integers.radix import COARSE

BASE, quantise = COARSE.base, COARSE.quantise
CPU = torch.device("cpu")
LARGEST = 2**INTEGER_BITS - 1
values = st.lists(st.integers(-LARGEST, LARGEST), min_size=1, max_size=8)
# every kind of rate: none left, one bit, almost none, the usual, all kept
rates = st.one_of(st.sampled_from([0, 1, 2, 32768, 58982, 65535, BASE]), st.integers(0, BASE))


def store_for(v: Tensor) -> BitStore:
    return BitStore(len(v), CPU, DeviceHistory())


def there_and_back(v: Tensor, schedule: list[int], kicks: list[int]) -> BitStore:
    """Decay and kick along the schedule, then back; every state on the way must return."""
    store, start = store_for(v), v.clone()
    seen = []
    for n, kick in zip(schedule, kicks, strict=True):
        seen.append(v.clone())
        store.decay_(v, n)
        assert (store.head >= 0).all()
        v += kick
    for n, kick in zip(reversed(schedule), reversed(kicks), strict=True):
        v -= kick
        store.undecay_(v, n)
        assert torch.equal(v, seen.pop())
    assert torch.equal(v, start)
    assert store.is_empty()
    return store


@settings(deadline=None, max_examples=150)
@given(values, st.lists(st.tuples(rates, st.integers(-(2**40), 2**40)), min_size=1, max_size=60))
def test_any_schedule_comes_back(start: list[int], moves: list[tuple[int, int]]) -> None:
    # room for the kicks: what leaves the range is the guard's business
    v = torch.tensor([x // 4 for x in start])
    there_and_back(v, [n for n, _ in moves], [kick for _, kick in moves])


@settings(deadline=None, max_examples=40)
@given(values, st.integers(1, BASE - 1), st.integers(100, 700), st.integers(0, 2**32))
def test_long_constant_rates_come_back(start: list[int], n: int, length: int, seed: int) -> None:
    draw = random.Random(seed)
    v = torch.tensor([x // 1024 for x in start])
    there_and_back(v, [n] * length, [draw.randint(-(2**50), 2**50) for _ in range(length)])


@settings(deadline=None)
@given(values, rates)
def test_decay_multiplies(start: list[int], n: int) -> None:
    v = torch.tensor(start)
    store_for(v).decay_(v, n)
    for before, after in zip(start, v.tolist(), strict=True):
        assert after == before * n // BASE  # an empty store has the digit 0: exactly the floor of the product


@settings(deadline=None)
@given(values, rates, st.integers(0, 2**32))
def test_decay_is_within_one_unit_of_the_product(start: list[int], n: int, seed: int) -> None:
    """The paper's order of push and pop leaves the low 16 bits of the product to chance."""
    v = torch.tensor(start)
    store = store_for(v)
    noise = torch.Generator().manual_seed(seed)
    for _ in range(20):  # fill the store with something
        store.decay_(torch.randint(-(2**50), 2**50, v.shape, generator=noise), 30_000)
    store.decay_(v, n)
    for before, after in zip(start, v.tolist(), strict=True):
        assert after in (before * n // BASE, before * n // BASE + 1)


def test_no_overflow_at_400_steps_of_0_9() -> None:
    """Regression of another port: one int64 buffer overflowed near T = 300 at momentum 0.9, in silence."""
    v = torch.randint(-(2**45), 2**45, (100,), generator=torch.Generator().manual_seed(0))
    there_and_back(v, [quantise(0.9)] * 450, [3**20] * 450)


def test_negative_velocities_come_back() -> None:
    """Regression of another port: floor-modulo with truncating division lost half of all negative velocities."""
    v = -torch.arange(1, 200_001)
    there_and_back(v, [quantise(0.9)], [0])


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.98, 0.999])
def test_bits_stay_near_the_entropy_bound(momentum: float) -> None:
    n, steps = quantise(momentum), 10_000
    v = torch.zeros(16, dtype=torch.int64)
    store = store_for(v)
    noise = torch.Generator().manual_seed(0)
    for _ in range(steps):
        store.decay_(v, n)
        v += torch.randint(-(2**44), 2**44, v.shape, generator=noise)
    ideal = math.log2(BASE / n)
    kept = 8 * store.history.nbytes / (len(v) * steps)
    print(
        f"momentum {momentum}: ideal {ideal:.4f} bits per parameter and step, kept {kept:.4f}, ratio {kept / ideal:.3f}"
    )
    assert kept <= 1.05 * ideal
    assert kept + 64 / steps >= 0.999 * ideal  # the head holds the rest: nothing can do with less


@pytest.mark.slow
def test_a_hundred_thousand_steps_come_back() -> None:
    draw = random.Random(1)
    steps = 100_000
    schedule = [draw.choice([0, 1, 300, 32768, 58982, 64000, 65535, BASE]) for _ in range(steps)]
    v = torch.randint(-(2**50), 2**50, (20,), generator=torch.Generator().manual_seed(0))
    store, start = store_for(v), v.clone()
    kicks = [draw.randint(-(2**40), 2**40) for _ in range(steps)]
    for n, kick in zip(schedule, kicks, strict=True):
        store.decay_(v, n)
        v += kick
    for n, kick in zip(reversed(schedule), reversed(kicks), strict=True):
        v -= kick
        store.undecay_(v, n)
    assert torch.equal(v, start)
    assert store.is_empty()


@settings(deadline=None)
@given(values, st.integers(1, BASE - 1), st.integers(0, 2**32))
def test_loops_and_passes_have_the_same_bits(start: list[int], n: int, seed: int) -> None:
    """The loops of the CPU and the tensor operations of other devices are one function."""
    draw = torch.Generator().manual_seed(seed)
    v = torch.tensor(start)
    head = torch.randint(0, min(n << 36, 2**52), v.shape, generator=draw)
    mine, theirs = (v.clone(), head.clone()), (v.clone(), head.clone())
    passes = Passes()
    LOOPS.multiply(*mine, n, COARSE)
    passes.multiply(*theirs, n, COARSE)
    assert all(map(torch.equal, mine, theirs))
    LOOPS.divide(*mine, n, COARSE)
    passes.divide(*theirs, n, COARSE)
    assert all(map(torch.equal, mine, theirs))
    assert torch.equal(mine[0], v)
    assert torch.equal(mine[1], head)


@settings(deadline=None)
@given(st.integers(1, BASE - 1), st.integers(0, 2**52 - 1))
def test_the_digit_is_exact_where_float_division_is_tightest(n: int, head: int) -> None:
    """head / n within one part in 2^52 of an integer, from below and from above."""
    for near in (head // n * n - 1, head // n * n, head // n * n + 1, 2**52 - 1):
        if not 0 <= near < min(n << 36, 2**52):
            continue
        v, store = torch.tensor([5]), torch.tensor([near])
        LOOPS.multiply(v, store, n, COARSE)
        w = 5 * n + near % n
        assert v.tolist() == [w >> 16]
        assert store.tolist() == [(near // n << 16) + w % BASE]


@settings(deadline=None)
@given(
    st.lists(st.integers(-(2**50), 2**50), min_size=1, max_size=6),
    st.floats(-1e3, 1e3, allow_nan=False),
    st.sampled_from([torch.float32, torch.float64, torch.int64]),
    st.booleans(),
)
def test_adds_by_loops_and_by_passes_have_the_same_bits(
    start: list[int], factor: float, dtype: torch.dtype, each: bool
) -> None:
    source = (torch.tensor(start) // 3).to(dtype)
    scale = torch.linspace(factor, 1.0, len(start), dtype=torch.float64) if each else factor
    for sign in (1, -1):
        mine, theirs = torch.tensor(start), torch.tensor(start)
        LOOPS.add(mine, source, scale, sign)
        Passes().add(theirs, source, scale, sign)
        assert torch.equal(mine, theirs)


def test_a_store_that_is_not_empty_says_so() -> None:
    v = torch.arange(5) + 7
    store = store_for(v)
    store.decay_(v, 58982)
    assert not store.is_empty()
    store.undecay_(v, 58982)
    assert store.is_empty()
    store.head[3] = 1
    assert not store.is_empty()


def test_histories_are_stacks(tmp_path: Path) -> None:
    words = [
        torch.randint(-(2**31), 2**31 - 1, (7,), dtype=torch.int32),
        torch.tensor([2**62, -1]),
        torch.zeros(0, dtype=torch.int32),
    ]
    for history in (
        DeviceHistory(),
        HostHistory(CPU),
        FileHistory(tmp_path, CPU),
        open_history(tmp_path / "bits.bin", CPU),
    ):
        for w in words:
            history.push(w.clone())
        assert history.nbytes == sum(w.nbytes for w in words)
        for w in reversed(words):
            assert torch.equal(history.pop(), w)
        assert history.nbytes == 0
    assert not list(tmp_path.iterdir())  # the file has no name: nothing is left behind
    nothing = NoHistory()
    nothing.push(words[0])
    with pytest.raises(LookupError):
        nothing.pop()


@settings(deadline=None)
@given(
    st.lists(st.integers(-(2**50), 2**50), min_size=1, max_size=6),
    st.floats(-1e3, 1e3, allow_nan=False),
    st.floats(-10, 10, allow_nan=False, width=32),
    st.sampled_from([torch.float32, torch.float64, torch.int64]),
)
def test_add_is_undone_by_its_negative(start: list[int], factor: float, source: float, dtype: torch.dtype) -> None:
    target = torch.tensor(start)
    amounts = torch.full_like(target, 1).to(dtype) * (int(source) if dtype == torch.int64 else source)
    kept = amounts.clone()
    LOOPS.add(target, amounts, factor * 2.0**30, 1)
    LOOPS.add(target, amounts, factor * 2.0**30, -1)
    assert target.tolist() == start
    assert torch.equal(amounts, kept)  # the source is never changed in place


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(-1, 1, allow_nan=False))
def test_fixed_point_rounds_to_the_nearest(bits: int, fraction: float) -> None:
    fixed = FixedPoint(bits)
    x = torch.tensor([fraction * fixed.limit * 0.999], dtype=torch.float64)
    q = fixed.from_float(x)
    back = LOOPS.to_float(q, torch.empty_like(x), fixed)
    # half a unit, and float64's own 53 bits
    assert float((back - x).abs()) <= max(fixed.resolution / 2, float(x.abs()) * 2.0**-52)


@pytest.mark.parametrize("bits", [0, 61, -3])
def test_fixed_point_refuses_formats_without_room(bits: int) -> None:
    with pytest.raises(ValueError, match="fractional_bits"):
        FixedPoint(bits)
