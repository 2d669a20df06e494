"""The three arithmetics of a decay, against Python's integers; and numbers in two words."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.fixedpoint import LOW_BITS, LOW_MASK, Wide
from revdistill.engine.integers.history import DeviceHistory
from revdistill.engine.integers.loops import LOOPS
from revdistill.engine.integers.passes import Passes
from revdistill.engine.integers.radix import COARSE, FINE, WIDE, Radix

CPU = torch.device("cpu")
RADICES = {"coarse": COARSE, "fine": FINE, "wide": WIDE}
FINE_RATES = st.one_of(
    st.sampled_from([1, 2, 2**29, 2**30 - 1, FINE.quantise(0.9), FINE.quantise(0.999)]), st.integers(1, 2**30 - 1)
)


def tensor(radix: Radix, numbers: list[int]) -> Tensor:
    """The integers as this arithmetic holds them."""
    if radix is not WIDE:
        return torch.tensor(numbers)
    return torch.tensor([[x >> LOW_BITS for x in numbers], [x & LOW_MASK for x in numbers]])


def integers(v: Tensor) -> list[int]:
    if v.ndim == 1:
        return v.tolist()
    return [(high << LOW_BITS) + low for high, low in zip(*v.tolist(), strict=True)]


def largest(radix: Radix) -> int:
    return 2**62 - 1 if radix is not WIDE else 2**122 - 1


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([FINE, WIDE]), st.lists(st.floats(-1, 1), min_size=1, max_size=6), FINE_RATES, st.integers(0, 2**52)
)
def test_multiply_and_divide_are_pythons(radix: Radix, shares: list[float], n: int, entropy: int) -> None:
    numbers = [int(Fraction(share) * largest(radix)) for share in shares]
    start = min(entropy, (n << 52 - radix.bits) - 1)  # what multiply promises for
    for backend in (LOOPS, Passes()):
        v, head = tensor(radix, numbers), torch.full((len(numbers),), start)
        backend.multiply(v, head, n, radix)
        w = [x * n + start % n for x in numbers]
        assert integers(v) == [x >> radix.bits for x in w]
        assert head.tolist() == [(start // n << radix.bits) + x % radix.base for x in w]
        backend.divide(v, head, n, radix)
        assert integers(v) == numbers
        assert head.tolist() == [start] * len(numbers)


@pytest.mark.parametrize("name", RADICES)
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), rate=st.floats(0, 1), length=st.integers(1, 300))
def test_any_schedule_comes_back(name: str, seed: int, rate: float, length: int) -> None:
    """Rates that change at every step, whole losses and none among them; several words may be spilled at once."""
    radix, draw = RADICES[name], random.Random(seed)
    v = tensor(radix, [draw.randint(-largest(radix) // 8, largest(radix) // 8) for _ in range(4)])
    store, start = BitStore(4, CPU, DeviceHistory(), radix), v.clone()
    schedule = [radix.quantise(draw.choice([rate, rate, 0.9, 0.0, 1.0, 1 / radix.base])) for _ in range(length)]
    seen = []
    for n in schedule:
        seen.append(v.clone())
        store.decay_(v, n)
        assert (store.head >= 0).all()
        assert (store.head < 2**52).all()
    for n in reversed(schedule):
        store.undecay_(v, n)
        assert torch.equal(v, seen.pop())
    assert torch.equal(v, start)
    assert store.is_empty()


@pytest.mark.parametrize("name", ["fine", "wide"])
@pytest.mark.parametrize("factor", [0.5, 0.9, 0.999, 1 - 1e-5])
def test_bits_stay_near_the_entropy_bound(name: str, factor: float) -> None:
    radix = RADICES[name]
    n, steps = radix.quantise(factor), 10_000
    v = tensor(radix, [0] * 8)
    store = BitStore(8, CPU, DeviceHistory(), radix)
    noise = torch.Generator().manual_seed(0)
    for _ in range(steps):
        store.decay_(v, n)
        v[..., :] += torch.randint(0, 2**44, (8,), generator=noise)
        if radix is WIDE:
            v[0] += v[1] >> LOW_BITS
            v[1] &= LOW_MASK
    ideal = math.log2(radix.base / n)
    kept = 8 * store.history.nbytes / (8 * steps)
    assert kept <= 1.05 * ideal + 16 / steps  # the grain of one word: at 0.999 there is but one in 10,000 steps
    assert kept + 64 / steps >= 0.999 * ideal


AMOUNTS = st.floats(-1e8, 1e8).filter(lambda x: x == 0 or abs(x) > 1e-300)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.floats(0, 1), AMOUNTS), min_size=1, max_size=6), st.booleans(), st.sampled_from([1, -1]))
def test_wide_adds_are_exact(pairs: list[tuple[float, float]], each: bool, sign: int) -> None:
    """As Python's integers, undone by the other sign, and the same bits by loops and by passes."""
    numbers = [int(Fraction(share) * 2**120) for share, _ in pairs]
    source = torch.tensor([amount for _, amount in pairs], dtype=torch.float64)
    factor = torch.full((len(pairs),), Wide.scale / 4) if each else Wide.scale / 4
    if isinstance(factor, Tensor):
        factor = factor.double()
    mine, theirs, start = (tensor(WIDE, numbers) for _ in range(3))
    LOOPS.add(mine, source, factor, sign)
    Passes().add(theirs, source, factor, sign)
    assert torch.equal(mine, theirs)
    assert (mine[1] >= 0).all()
    assert (mine[1] <= LOW_MASK).all()
    for before, after, (_, amount) in zip(numbers, integers(mine), pairs, strict=True):
        exact = Fraction(amount) * 2 ** (Wide.fractional_bits - 2)
        assert abs(sign * (after - before) - exact) <= Fraction(1, 2)
    LOOPS.add(mine, source, factor, -sign)
    assert torch.equal(mine, start)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 121)), min_size=1, max_size=6))
def test_wide_numbers_are_read_to_float64s_precision(drawn: list[tuple[float, int]]) -> None:
    """Of any size and sign, by loops and by passes."""
    numbers = [int(Fraction(share) * largest(WIDE)) >> shift for share, shift in drawn]
    q = tensor(WIDE, numbers)
    found, theirs = (b.to_float(q, torch.empty(len(numbers), dtype=torch.float64), Wide()) for b in (LOOPS, Passes()))
    assert torch.equal(found, theirs)
    for number, x in zip(numbers, found.tolist(), strict=True):
        exact = Fraction(number, 2**Wide.fractional_bits)
        assert abs(Fraction(x) - exact) <= abs(exact) * Fraction(2) ** -51
