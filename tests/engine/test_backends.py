"""Every backend of the integers against the specification in plain Python (`reference`), bit for bit."""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import struct
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from revdistill.engine.integers import reference
from revdistill.engine.integers.backend import Backend
from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.compiled import Compiled
from revdistill.engine.integers.fixedpoint import FixedPoint, Wide
from revdistill.engine.integers.fused import Fused
from revdistill.engine.integers.history import DeviceHistory
from revdistill.engine.integers.loops import LOOPS
from revdistill.engine.integers.passes import Passes
from revdistill.engine.integers.radix import COARSE, FINE, HEAD_BITS, WIDE, Radix
from tests import standin
from tests.engine import interpreted

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.filterwarnings("error::revdistill.CompileWarning")]

SIZE = 5  # elements: one, so that torch.compile compiles each operation once
LIMIT = 2**62
RADICES = {"coarse": COARSE, "fine": FINE, "wide": WIDE}
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
CPU = torch.device("cpu")


def collected() -> Compiled:
    """What `Compiled` does itself: the compiler is the identity."""
    with mock.patch.object(torch, "compile", lambda function, **_: function):
        return Compiled()


BACKENDS: dict[str, Backend] = {"loops": LOOPS, "passes": Passes(), "collected": collected()}


@pytest.fixture(
    params=[
        *BACKENDS,
        pytest.param("fused", marks=pytest.mark.slow),  # test_fused has quick ones
        pytest.param(
            "compiled",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler"
                ),
            ],
        ),
    ],
    scope="module",
)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "fused":
        return interpreted.fused()
    return BACKENDS[request.param] if request.param in BACKENDS else Compiled()


@pytest.fixture(autouse=True)
def _nothing_is_dropped(backend: Backend) -> Any:
    """Dynamo compiles one function for a few kinds of operands only: each test has its own few."""
    torch._dynamo.reset() if isinstance(backend, Compiled) else None
    yield
    if isinstance(backend, Compiled):
        assert backend.compiled is not None
    if isinstance(backend, Fused):
        assert not backend.given_up


def drawn(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(strategy, min_size=SIZE, max_size=SIZE)


def within(low: int, high: int) -> st.SearchStrategy[int]:
    """Integers from low to high: the ends often, every magnitude, and low bits that are all 0 or all 1."""
    ends = [x for x in (low, low + 1, -1, 0, 1, high - 1, high) if low <= x <= high]
    bits = st.integers(0, max(high, -low).bit_length())
    # hypothesis alone draws small numbers mostly
    anywhere = st.integers(0, 2**32).map(lambda seed: random.Random(seed).randint(low, high))

    def shaped(x: int, b: int, shape: int) -> int:
        return min(max((x >> b, x >> b << b, x | (1 << b) - 1)[shape], low), high)

    return st.one_of(
        st.sampled_from(ends), st.integers(low, high), anywhere, st.builds(shaped, anywhere, bits, st.integers(0, 2))
    )


def numbers(radix: Radix) -> st.SearchStrategy[list[int]]:
    """Anything that one word or two can hold: |high| < 2^62."""
    return drawn(within(-LIMIT + 1, LIMIT - 1) if radix.words == 1 else within((-LIMIT + 1) << 60, (LIMIT << 60) - 1))


def tensor(values: list[int], words: int = 1) -> Tensor:
    return (
        torch.tensor(values) if words == 1 else torch.tensor([reference.words_of(x) for x in values]).t().contiguous()
    )


def integers(v: Tensor) -> list[int]:
    if v.ndim == 1:
        return v.tolist()
    assert ((v[1] >= 0) & (v[1] < 2**60)).all()
    return list(map(reference.integer_of, zip(*v.tolist(), strict=True)))


def same(found: float | Tensor, expected: float) -> bool:
    """Bit for bit, 0 and -0 apart; NaN is NaN."""
    found = float(found)
    return struct.pack("d", found) == struct.pack("d", expected) or (math.isnan(found) and math.isnan(expected))


relaxed = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("name", RADICES)
@settings(relaxed, max_examples=100)
@given(data=st.data())
def test_multiply_and_divide(backend: Backend, name: str, data: st.DataObject) -> None:
    """Any number, any numerator, heads up to their bound; and all that `multiply` leaves, back."""
    radix = RADICES[name]
    n = data.draw(st.one_of(st.sampled_from([49, 98, 103]), within(1, radix.base - 1)), "n")  # fl(49 fl(1 / 49)) < 1
    highest = (n << HEAD_BITS - radix.bits) - 1
    # digits of 0 and n - 1 make quotients that are integers, or one unit below
    multiples = st.builds(lambda q, d: q * n + d % n, within(0, highest // n), st.integers(-1, 1))
    heads = st.one_of(within(0, highest), multiples)
    start = data.draw(numbers(radix), "v"), data.draw(drawn(heads), "head")
    pairs = [reference.multiply(x, h, n, radix.bits) for x, h in zip(*start, strict=True)]
    there = [x for x, _ in pairs], [h for _, h in pairs]
    assert [reference.divide(x, h, n, radix.bits) for x, h in pairs] == list(zip(*start, strict=True))
    assert all(0 <= h < 2**HEAD_BITS for h in there[1])
    v, head = tensor(start[0], radix.words), tensor(start[1])
    backend.multiply(v, head, n, radix)
    backend.settle()
    assert (integers(v), head.tolist()) == there
    backend.divide(v, head, n, radix)
    backend.settle()
    assert (integers(v), head.tolist()) == start


SOURCES: dict[torch.dtype, st.SearchStrategy[Any]] = {
    torch.float32: st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(-(2**20), 2**20).map(lambda i: i + 0.5)
    ),
    torch.float64: st.one_of(
        st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**50), 2**50).map(lambda i: i + 0.5)
    ),
    torch.int64: within(-LIMIT + 1, LIMIT - 1),
}
# powers of two make ties of the halves among the sources
FACTORS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.01, 2.0**44, 2.0**94, 2.0**-44]),
    st.floats(allow_nan=False, allow_infinity=False),
)


def fitting(factor: float, sources: list[float], bits: int) -> float:
    """The factor, or a power of two times it, so that |factor source| < 2^bits."""
    excess = max(math.frexp(factor)[1] + math.frexp(float(x))[1] - bits for x in sources)
    return math.ldexp(factor, -max(0, excess))


@pytest.mark.parametrize("each", [False, True], ids=["one factor", "a factor each"])
@pytest.mark.parametrize("dtype", SOURCES, ids=str)
@pytest.mark.parametrize("words", [1, 2], ids=["one word", "two words"])
@relaxed
@given(data=st.data())
def test_add(backend: Backend, words: int, dtype: torch.dtype, each: bool, data: st.DataObject) -> None:
    """One product in float64, one rounding of it; of any magnitude, 2^53 and more included; -sign undoes sign."""
    bits = 61 if words == 1 else 121
    start = data.draw(drawn(within(-(2**bits), 2**bits)), "target")
    sources = data.draw(drawn(SOURCES[dtype]), "source")
    if each:
        factors = [fitting(f, [x], bits) for f, x in zip(data.draw(drawn(FACTORS), "factors"), sources, strict=True)]
    else:
        factors = [fitting(data.draw(FACTORS, "factor"), sources, bits)] * SIZE
    source, target = torch.tensor(sources, dtype=dtype), tensor(start, words)
    factor: Any = torch.tensor(factors, dtype=torch.float64) if each else factors[0]
    kept = source.clone()
    for sign in (1, -1):
        expected = [reference.add(*e, sign) for e in zip(start, sources, factors, strict=True)]
        target = tensor(start, words)
        backend.add(target, source, factor, sign)
        backend.settle()
        assert integers(target) == expected
        backend.add(target, source, factor, -sign)
        backend.settle()
        assert integers(target) == start
    assert torch.equal(source, kept)
    assert not each or factor.tolist() == factors


def test_operations_wait_for_their_turn(backend: Backend) -> None:
    """A whole step at once, in its order; whoever looks at the numbers sees all that was asked for."""
    start, n = [7, -(2**40), 2**61, 3, -1], COARSE.quantise(0.9)
    expected = [reference.add(reference.multiply(x, 0, n, 16)[0], 3.0, 2.5, 1) for x in start]
    zeros, words = torch.zeros(2, SIZE, dtype=torch.int64), torch.zeros(SIZE, dtype=torch.int16)
    looks: list[Callable[[Tensor], object]] = [
        lambda v: backend.settle(),
        lambda v: backend.to_float(v, torch.empty(SIZE), FixedPoint()),
        lambda v: backend.spill(v.clone()),
        lambda v: backend.refill(v.clone(), words),
        lambda v: backend.maximum(zeros, zeros.clone()),
    ]
    for look in looks:
        v, head = torch.tensor(start), torch.zeros(SIZE, dtype=torch.int64)
        backend.multiply(v, head, n, COARSE)
        backend.add(v, torch.full((SIZE,), 3.0), 2.5, 1)
        look(v)
        assert v.tolist() == expected


def to_float32(x: float) -> float:
    """Rounded to the nearest."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


@pytest.mark.parametrize("dtype", BITS, ids=str)
@relaxed
@given(data=st.data())
def test_to_float(backend: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    narrow = to_float32 if dtype == torch.float32 else float
    form = FixedPoint(data.draw(st.integers(1, 60), "fractional_bits"))
    # one unit above or below a tie of float32, which float64 does not see: two roundings are not one
    near_ties = st.builds(lambda m, unit: (m << 38) + (1 << 37) + unit, within(-(2**23), 2**23), st.integers(-1, 1))
    q = data.draw(st.one_of(numbers(COARSE), drawn(near_ties)), "q")
    found = backend.to_float(torch.tensor(q), torch.empty(SIZE, dtype=dtype), form)
    assert found.tolist() == [narrow(reference.to_float(x, form.fractional_bits)) for x in q]
    q = data.draw(numbers(WIDE), "q of two words")
    out = torch.empty(SIZE, dtype=dtype)
    assert backend.to_float(tensor(q, 2), out, Wide()) is out
    assert out.tolist() == [narrow(reference.wide_to_float(reference.words_of(x))) for x in q]


@pytest.mark.parametrize("dtype", BITS, ids=str)
@relaxed
@given(data=st.data())
def test_largest_and_fingerprint(backend: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    """Of any bits at all: NaNs of every kind, infinities, numbers next to 0."""
    width = 32 if dtype == torch.float32 else 64
    entries = st.one_of(
        st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1),
        st.floats(width=width).map(lambda f: struct.unpack("<i", struct.pack("<f", f))[0])
        if width == 32
        else st.floats().map(lambda f: struct.unpack("<q", struct.pack("<d", f))[0]),
    )
    bits = data.draw(st.lists(entries, max_size=9), "bits")
    x = torch.tensor(bits, dtype=BITS[dtype]).view(dtype)
    assert same(backend.largest(x), reference.largest(x.tolist()))
    assert int(backend.fingerprint(x)) == reference.fingerprint(bits)
    assert x.view(BITS[dtype]).tolist() == bits


@relaxed
@given(data=st.data())
def test_maximum(backend: Backend, data: st.DataObject) -> None:
    target, source = data.draw(numbers(WIDE), "target"), data.draw(numbers(WIDE), "source")
    source[0] = target[0] >> 60 << 60 | source[0] & 2**60 - 1  # the same high word
    expected = [reference.maximum(*map(reference.words_of, e)) for e in zip(target, source, strict=True)]
    q, other = tensor(target, 2), tensor(source, 2)
    backend.maximum(q, other)
    assert integers(q) == list(map(reference.integer_of, expected)) == list(map(max, target, source))
    assert integers(other) == source


@relaxed
@given(heads=drawn(within(0, 2**HEAD_BITS)))
def test_spill_and_refill(backend: Backend, heads: list[int]) -> None:
    head = torch.tensor(heads)
    words = backend.spill(head)
    assert words.dtype == torch.int16
    assert list(zip(head.tolist(), words.tolist(), strict=True)) == list(map(reference.spill, heads))
    backend.refill(head, words)
    assert head.tolist() == heads == [reference.refill(*reference.spill(h)) for h in heads]


@pytest.mark.parametrize("name", RADICES)
@relaxed
@given(data=st.data())
def test_a_bit_store_spills_what_the_specification_does(backend: Backend, name: str, data: st.DataObject) -> None:
    radix = RADICES[name]
    start = data.draw(numbers(radix), "v")
    factors = st.one_of(within(0, radix.base), st.floats(0, 1).map(radix.quantise))
    schedule = data.draw(st.lists(factors, min_size=1, max_size=12), "n")
    history = DeviceHistory()
    store, v = BitStore(SIZE, CPU, history, radix, backend), tensor(start, radix.words)
    plain, values = [reference.BitStore(radix.bits) for _ in start], start

    def compare() -> None:
        backend.settle()
        assert integers(v) == values
        assert store.head.tolist() == [s.head for s in plain]
        assert [store._bound] * SIZE == [s.bound for s in plain]
        spilled = [integers(words.to(torch.int64)) for words in history._stack]
        assert list(map(list, zip(*spilled, strict=True))) == [s.history for s in plain if s.history]

    for n in schedule:
        store.decay_(v, n)
        values = [s.decay(x, n) for s, x in zip(plain, values, strict=True)]
        compare()
    for n in reversed(schedule):
        store.undecay_(v, n)
        values = [s.undecay(x, n) for s, x in zip(plain, values, strict=True)]
        compare()
    assert values == start
    assert bool(store.is_empty())


@pytest.mark.parametrize("name", RADICES)
def test_a_bit_store_loses_all_of_what_was_asked_for(backend: Backend, name: str) -> None:
    """Decays to n = 0 behind an add, and an add behind them on the way back: no one has looked meanwhile."""
    radix = RADICES[name]
    start, source = [5, -7, 2**40, 0, 1], torch.full((SIZE,), 3.0)
    store, v = BitStore(SIZE, CPU, DeviceHistory(), radix, backend), tensor(start, radix.words)
    backend.add(v, source, 1.0, 1)
    store.decay_(v, 0)
    backend.settle()
    assert integers(v) == [0] * SIZE
    backend.add(v, source, 1.0, 1)
    backend.add(v, source, 1.0, -1)
    backend.add(v, source, 2.0, -1)
    store.undecay_(v, 0)
    backend.settle()
    assert integers(v) == [x + 3 for x in start]


@pytest.mark.parametrize(("name", "n"), [("coarse", 2**15), ("fine", 2**29), ("wide", 2**29), ("coarse", 2**12)])
def test_a_bit_store_fills_its_heads_to_the_last_bit(backend: Backend, name: str, n: int) -> None:
    """Where the bound reaches 2^52 exactly, nothing is spilled yet."""
    radix = RADICES[name]
    store, plain = BitStore(SIZE, CPU, DeviceHistory(), radix, backend), reference.BitStore(radix.bits)
    v, value, full = tensor([2**61 - 1] * SIZE, radix.words), 2**61 - 1, 0
    for _ in range(60):
        store.decay_(v, n)
        backend.settle()
        value = plain.decay(value, n)
        full += plain.bound == 2**HEAD_BITS
        assert store._bound == plain.bound
        assert len(store.history._stack) == len(plain.history)  # type: ignore[attr-defined]
    assert full


POSITIVE = st.floats(1e-30, 1e30)


@relaxed
@given(
    m=drawn(st.floats(-1e4, 1e4)), s=drawn(st.floats(0, 1e8)), c1=drawn(POSITIVE), rest=st.tuples(POSITIVE, POSITIVE)
)
def test_roots_and_ratios(
    backend: Backend, m: list[float], s: list[float], c1: list[float], rest: tuple[float, float]
) -> None:
    """Of the loops. A GPU's root is correctly rounded too; that of the CPU's tensor operations is not."""
    m_, s_ = (torch.tensor(x, dtype=torch.float64) for x in (m, s))
    if backend is LOOPS:
        assert backend.root(s_).tolist() == list(map(math.sqrt, s))
    rooted = contextlib.nullcontext() if backend is LOOPS else mock.patch.object(backend, "root", LOOPS.root)
    with rooted:
        one = backend.ratio(m_, s_, c1[0], *rest).tolist()
        each = backend.ratio(m_, s_, torch.tensor(c1, dtype=torch.float64), *rest).tolist()
    assert one == [reference.ratio(a, b, c1[0], *rest) for a, b in zip(m, s, strict=True)]
    assert each == [reference.ratio(a, b, c, *rest) for a, b, c in zip(m, s, c1, strict=True)]


@pytest.mark.standin
def test_a_devices_roots(counts: standin.Counts) -> None:
    s = torch.rand(1001, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3
    m = s - 5e-4
    there = standin.put(s)
    assert standin.take(Passes().root(there)).tolist() == list(map(math.sqrt, s.tolist()))
    found = standin.take(Passes().ratio(standin.put(m), there, 0.1, 3.3, 1e-8)).tolist()
    assert found == [reference.ratio(a, b, 0.1, 3.3, 1e-8) for a, b in zip(m.tolist(), s.tolist(), strict=True)]
