"""Triton's kernels, interpreted on the CPU, against the specification in plain Python; and what they compile to."""

from __future__ import annotations

import math
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import revdistill as rd
from revdistill.engine import integers as integers_package
from revdistill.engine.integers import fused as fused_module
from revdistill.engine.integers import reference, select
from revdistill.engine.integers.fixedpoint import FixedPoint, Wide
from revdistill.engine.integers.fused import Fused
from revdistill.engine.integers.loops import LOOPS
from revdistill.engine.integers.passes import Passes
from revdistill.engine.integers.radix import COARSE, FINE, HEAD_BITS, WIDE
from tests.engine import interpreted, ptx
from tests.engine.test_backends import collected

pytestmark = pytest.mark.imitated

SIZE, LIMIT = 150, 2**62
RADICES = {"coarse": COARSE, "fine": FINE, "wide": WIDE}
FLOATS = [torch.float32, torch.float64]
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
KINDS = ["number", "one", "each"]


@pytest.fixture
def fused() -> Fused:
    """Programs of 64 elements: three for SIZE, the last one not full."""
    return Fused(interpreted.kernels(), 64, 64)


@pytest.fixture(autouse=True)
def _nothing_is_given_up(fused: Fused, request: pytest.FixtureRequest) -> Any:
    yield
    assert bool(fused.given_up) == ("broken" in request.fixturenames)


def drawn(draw: random.Random, low: int, high: int, count: int = SIZE) -> list[int]:
    """The ends, and numbers of every magnitude; some with low bits that are all 0 or all 1."""
    found = [x for x in (low, low + 1, -1, 0, 1, high - 1, high) if low <= x <= high]
    while len(found) < count:
        x, bits = draw.randint(low, high), draw.randrange(high.bit_length())
        x = draw.choice((x >> bits, x >> bits << bits, x | (1 << bits) - 1, x))
        found.append(min(max(x, low), high))
    draw.shuffle(found)
    return found[:count]


def numbers(draw: random.Random, words: int, bits: int = 62) -> list[int]:
    """Of magnitude below 2^bits, or in two words below 2^(bits + 60)."""
    limit = (1 << bits) << 60 * (words - 1)
    return drawn(draw, -limit + 1, limit - 1)


def tensor(values: list[int], words: int) -> Tensor:
    return (
        torch.tensor(values) if words == 1 else torch.tensor([reference.words_of(x) for x in values]).t().contiguous()
    )


def integers(v: Tensor) -> list[int]:
    if v.ndim == 1:
        return v.tolist()
    assert ((v[1] >= 0) & (v[1] < 2**60)).all()
    return list(map(reference.integer_of, zip(*v.tolist(), strict=True)))


def given_as(kind: str, values: list[Any]) -> Any:
    """One number for all, or one each."""
    if kind == "number":
        return values[0]
    return torch.tensor(values[0] if kind == "one" else values, dtype=torch.float64)


SEEDS = st.integers(0, 2**32).map(random.Random)
few = settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RADICES)
@few
@given(draw=SEEDS)
def test_decays_and_back(fused: Fused, name: str, kind: str, draw: random.Random) -> None:
    """Any number, any numerator up to the radix itself, heads up to their bound."""
    radix = RADICES[name]
    ns = [1, 2, 49, 98, 103, radix.base - 1, radix.base, *drawn(draw, 1, radix.base)]
    draw.shuffle(ns)
    ns = ns[:SIZE] if kind == "each" else [draw.choice(ns)] * SIZE
    v, head = numbers(draw, radix.words), []
    for i, n in enumerate(ns):
        highest = (n << HEAD_BITS - radix.bits) - 1
        multiple = draw.randint(0, highest // n) * n + draw.randint(-1, 1) % n
        head.append((0, highest, draw.randint(0, highest), min(multiple, highest))[i % 4])
    q, heads = tensor(v, radix.words), torch.tensor(head)
    fused.multiply(q, heads, given_as(kind, ns), radix)
    expected = [reference.multiply(*e, radix.bits) for e in zip(v, head, ns, strict=True)]
    assert list(zip(integers(q), heads.tolist(), strict=True)) == expected
    fused.divide(q, heads, given_as(kind, ns), radix)
    assert (integers(q), heads.tolist()) == (v, head)


@pytest.mark.parametrize("backend", [Passes(), collected()], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("name", RADICES)
def test_tensor_operations_take_numerators_of_the_device_too(name: str, kind: str, backend: Passes) -> None:
    radix, draw = RADICES[name], random.Random(0)
    v, ns = numbers(draw, radix.words), drawn(draw, 1, radix.base)
    ns = ns if kind == "each" else ns[:1] * SIZE
    head = [draw.randrange(n << HEAD_BITS - radix.bits) for n in ns]
    q, heads = tensor(v, radix.words), torch.tensor(head)
    backend.multiply(q, heads, given_as(kind, ns), radix)
    backend.settle()
    expected = [reference.multiply(*e, radix.bits) for e in zip(v, head, ns, strict=True)]
    assert list(zip(integers(q), heads.tolist(), strict=True)) == expected
    backend.divide(q, heads, given_as(kind, ns), radix)
    backend.settle()
    assert (integers(q), heads.tolist()) == (v, head)


def fitting(factor: float, source: float, bits: int) -> float:
    """The factor, or a power of two times it, so that |factor source| < 2^bits."""
    return math.ldexp(factor, -max(0, math.frexp(factor)[1] + math.frexp(float(source))[1] - bits))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64], ids=str)
@pytest.mark.parametrize("words", [1, 2], ids=["one word", "two words"])
@settings(few, max_examples=3)
@given(draw=SEEDS)
def test_add(fused: Fused, words: int, dtype: torch.dtype, kind: str, draw: random.Random) -> None:
    """One product in float64, one rounding of it, of any magnitude; halves among the products; -sign undoes sign."""
    bits = 61 if words == 1 else 121
    start = numbers(draw, words, 61)
    if dtype == torch.int64:
        source = torch.tensor(drawn(draw, -LIMIT + 1, LIMIT - 1))
        factors = [draw.choice((1.0, -0.5, 2.0**-44, -0.0123456789))] * SIZE
    else:
        halves = [draw.randint(-(2**20), 2**20) + 0.5 for _ in range(SIZE)]
        any_ = [draw.uniform(-1, 1) * 2.0 ** draw.randint(-100, 100) for _ in range(SIZE)]
        source = torch.tensor([draw.choice(pair) for pair in zip(halves, any_, strict=True)], dtype=dtype)
        factors = [draw.choice((1.0, 0.0, -1.0, 2.0**44, 2.0**94, -(2.0**-44), draw.gauss(0, 1e5)))] * SIZE
    if kind == "each":
        factors = [draw.gauss(0, 1) if i % 3 else f for i, f in enumerate(factors)]
    factors = [fitting(f, x, bits) for f, x in zip(factors, source.tolist(), strict=True)]
    if kind != "each":
        factors = [min(factors, key=abs)] * SIZE
    q, kept = tensor(start, words), source.clone()
    for sign in (1, -1):
        before = integers(q)
        fused.add(q, source, given_as(kind, factors), sign)
        expected = zip(before, source.tolist(), factors, strict=True)
        assert integers(q) == [reference.add(*e, sign) for e in expected]
    assert integers(q) == start
    assert torch.equal(source, kept)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@few
@given(draw=SEEDS)
def test_to_float(fused: Fused, dtype: torch.dtype, draw: random.Random) -> None:
    form, v = FixedPoint(draw.randint(1, 60)), numbers(draw, 1)
    # one unit above or below a tie of float32, which float64 does not see: two roundings are not one
    v[::5] = [(draw.randint(-(2**23), 2**23) << 38) + (1 << 37) + draw.randint(-1, 1) for _ in v[::5]]
    expected = torch.tensor([reference.to_float(x, form.fractional_bits) for x in v], dtype=torch.float64)
    assert torch.equal(fused.to_float(torch.tensor(v), torch.empty(SIZE, dtype=dtype), form), expected.to(dtype))
    v = numbers(draw, 2)
    expected = torch.tensor([reference.wide_to_float(reference.words_of(x)) for x in v], dtype=torch.float64)
    assert torch.equal(fused.to_float(tensor(v, 2), torch.empty(SIZE, dtype=dtype), Wide()), expected.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@settings(few, max_examples=2)
@given(draw=SEEDS)
def test_largest_and_fingerprint(fused: Fused, dtype: torch.dtype, draw: random.Random) -> None:
    """Of any bits at all, and of finite numbers with or without one that is not."""
    width = 32 if dtype == torch.float32 else 64
    bits = torch.tensor(drawn(draw, -(2 ** (width - 1)), 2 ** (width - 1) - 1), dtype=INTEGERS[dtype])
    finite = torch.tensor([draw.gauss(0, 1) for _ in range(SIZE)], dtype=dtype)
    cases = [bits.view(dtype), finite]
    for entry in (math.inf, -math.inf, math.nan, -1e30):
        cases.append(finite.clone())
        cases[-1][draw.randrange(SIZE)] = entry
    for x in cases:
        kept = x.clone().view(bits.dtype)
        found, expected = float(fused.largest(x)), reference.largest(x.tolist())
        assert found == expected or (math.isnan(found) and math.isnan(expected))
        assert int(fused.fingerprint(x)) == reference.fingerprint(kept.tolist())
        assert torch.equal(x.view(bits.dtype), kept)


@few
@given(draw=SEEDS)
def test_maximum(fused: Fused, draw: random.Random) -> None:
    target, source = numbers(draw, 2), numbers(draw, 2)
    source[::2] = [t >> 60 << 60 | s & 2**60 - 1 for t, s in zip(target[::2], source[::2], strict=True)]
    q, other = tensor(target, 2), tensor(source, 2)
    fused.maximum(q, other)
    assert integers(q) == list(map(max, target, source))
    assert integers(other) == source


@pytest.mark.parametrize("kinds", [["number"] * 3, ["one"] * 3, ["each", "one", "number"], ["one", "each", "each"]])
@few
@given(draw=SEEDS)
def test_ratio(fused: Fused, kinds: list[str], draw: random.Random) -> None:
    m = [draw.gauss(0, 1) * 10.0 ** draw.randint(-9, 4) for _ in range(SIZE)]
    s = [draw.random() * 10.0 ** draw.randint(-20, 8) * (i % 7 > 0) for i in range(SIZE)]
    rest = [
        [draw.random() * 10.0 ** draw.randint(-8, 3) + 1e-9 for _ in range(SIZE)]
        if kind == "each"
        else [draw.random() + 1e-9] * SIZE
        for kind in kinds
    ]
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (m, s)]
    found = fused.ratio(*tensors, *(given_as(kind, of) for kind, of in zip(kinds, rest, strict=True)))
    assert found.tolist() == [reference.ratio(*e) for e in zip(m, s, *rest, strict=True)]


# name -> what is done to two words, a head and floats; the last is what comes out of it
OPERATIONS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Any]] = {
    "multiply": lambda b, v, head, x: b.multiply(v, head, 49, WIDE),
    "divide": lambda b, v, head, x: b.divide(v, head, 49, WIDE),
    "one word": lambda b, v, head, x: b.multiply(v[0], head, 49, COARSE),
    "add": lambda b, v, head, x: b.add(v, x, 3.7 * 2.0**70, 1),
    "maximum": lambda b, v, head, x: b.maximum(v, v.flip(1)),
    "to_float": lambda b, v, head, x: b.to_float(v, x, Wide()),
    "ratio": lambda b, v, head, x: b.ratio(x, x.square(), 0.1, 3.3, 1e-8).sum(),
    "largest": lambda b, v, head, x: b.largest(x),
    "fingerprint": lambda b, v, head, x: b.fingerprint(x),
}


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 8])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_blocks_end_where_the_numbers_do(operation: str, size: int) -> None:
    """On parts of larger tensors: what lies beside them stays as it was."""
    part, draw = slice(3, 3 + size), torch.Generator().manual_seed(0)
    start = (
        torch.stack([torch.randint(-(2**61), 2**61, (12,), generator=draw), torch.arange(12) << 50]),
        torch.randint(0, 49 << HEAD_BITS - 30, (12,), generator=draw),
        torch.randn(12, dtype=torch.float64, generator=draw),
    )
    results = []
    for backend in (Fused(interpreted.kernels(), 4, 4), LOOPS):
        own = [t.clone() for t in start]
        v, head, x = (t[..., part] for t in own)
        found = OPERATIONS[operation](backend, v, head, x)
        results.append([*own, torch.as_tensor(0.0 if found is None else found)])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine.to(theirs.dtype), theirs)


@pytest.fixture
def broken(fused: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    class Raises:
        def __getitem__(self, grid: object) -> Any:
            raise OSError("no compiler")

    for name in ("decay", "add", "to_float", "largest", "fingerprint", "ratio", "maximum"):
        monkeypatch.setattr(fused.kernels, name, Raises())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kernel_that_fails_is_replaced(fused: Fused, broken: None, operation: str) -> None:
    """By tensor operations, with one warning."""
    v, head = torch.tensor([[5, -7, 2**40], [1, 2, 3]]), torch.tensor([0, 1, 2])
    x = torch.tensor([1.5, -2.0, 3.25], dtype=torch.float64)
    found, expected = (v.clone(), head.clone(), x.clone()), (v.clone(), head.clone(), x.clone())
    with pytest.warns(rd.CompileWarning, match=r"cannot be used \(OSError: no compiler\); tensor operations take"):
        a = OPERATIONS[operation](fused, *found)
    again = OPERATIONS[operation](fused, *found)
    b, _ = (OPERATIONS[operation](Passes(), *expected) for _ in range(2))
    assert all(map(torch.equal, found, expected))
    assert (a is None and b is None) or torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert (again is None) == (a is None)


def test_tensors_with_gaps_are_refused(fused: Fused) -> None:
    with pytest.raises(ValueError, match=r"add: tensors must be contiguous, got strides \(2,\) of shape \[3\]"):
        fused.add(torch.zeros(6, dtype=torch.int64)[::2], torch.zeros(3), 1.0, 1)


def test_what_is_read_may_have_gaps(fused: Fused) -> None:
    """A gradient may be one number for all: of a sum."""
    one = torch.tensor(2.5, dtype=torch.float64).expand(5)
    gaps = torch.arange(10.0, dtype=torch.float64)[::2]
    words = torch.arange(12).reshape(6, 2).t()
    for x in (one, gaps):
        found, expected = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
        for backend, target in ((fused, found), (LOOPS, expected)):
            backend.add(target, x, gaps, 1)
        assert torch.equal(found, expected)
        assert int(fused.fingerprint(x)) == int(LOOPS.fingerprint(x.contiguous()))
        assert float(fused.largest(x)) == float(x.max())
        assert torch.equal(fused.ratio(x, gaps, 0.5, gaps + 1, 1e-8), LOOPS.ratio(x, gaps, 0.5, gaps + 1, 1e-8))
    q = torch.zeros(2, 6, dtype=torch.int64)
    fused.maximum(q, words)
    assert torch.equal(q, words)


def test_every_backend_can_be_asked_for() -> None:
    cpu, passes = torch.device("cpu"), Passes()
    with select.using(passes):
        assert select.backend_for(cpu) is select.backend_for(torch.device("meta"), compile=True) is passes
    assert select.backend_for(cpu) is LOOPS
    assert type(select.backend_for(torch.device("meta"))) is Passes


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_fused", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", None)


def test_a_gpu_has_the_kernels_where_a_first_launch_works(
    fused: Fused, undecided: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One decision for each device, whatever its name."""
    tries: list[torch.device] = []

    def tried(device: torch.device) -> Fused | None:
        tries.append(device)
        return fused if device.index == 0 else None

    monkeypatch.setattr(select, "_tried", tried)
    for _ in range(2):
        assert select.backend_for(torch.device("cuda")) is select.backend_for(torch.device("cuda:0"), compile=True)
        assert select.backend_for(torch.device("cuda")) is fused
        assert type(select.backend_for(torch.device("cuda:1"))) is Passes
    assert tries == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_kernels_are_tried_before_they_are_used(fused: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert select._works(fused, cpu)
    monkeypatch.setattr(fused_module, "_number", lambda x: (0, 0))
    with (
        pytest.warns(rd.CompileWarning, match="whose bits are other ones cannot be used"),
        mock.patch.object(fused, "multiply"),
    ):
        assert not select._works(fused, cpu)


def test_without_a_gpu_to_launch_on_there_are_no_kernels(undecided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no compiler: Triton raises."""
    interpreted.needs_triton()
    with pytest.warns(rd.CompileWarning, match=r"Triton's kernel .* cannot be used .*; tensor operations take"):
        assert select._tried(torch.device("cpu")) is None
    monkeypatch.delattr(integers_package, "kernels")
    monkeypatch.setitem(sys.modules, "revdistill.engine.integers.kernels", None)
    assert select._tried(torch.device("cpu")) is None  # silently: Triton is not for everyone


def pointers(**types: str) -> dict[str, str]:
    return {name: "*" + kind for name, kind in types.items()} | {"numel": "i64"}


def test_kernels_compile_to_exact_arithmetic(tmp_path: Path) -> None:
    """For GPUs that are not there."""
    interpreted.needs_triton()
    words, block = dict(high="i64", low="i64"), {"BLOCK": fused_module.BLOCK}
    summed = {"BLOCK": fused_module.SUMMED}
    decays = {"BITS": 30, "KIND": 2, **block}
    n = pointers(**words, head="i64", n="fp64")
    source = pointers(**words, source="fp32", factor="fp64")
    floats = dict.fromkeys(("m", "s", "out", "c1", "per_root_c2", "eps"), "fp64")
    kinds: dict[str, Any] = {
        "multiply": ("decay", n, {"BACK": False, "WORDS": 1, **decays}),
        "multiply wide": ("decay", n, {"BACK": False, "WORDS": 2, **decays}),
        "divide": ("decay", n, {"BACK": True, "WORDS": 1, **decays}),
        "divide wide": ("decay", n | {"n": "i64"}, {"BACK": True, "WORDS": 2, **decays, "KIND": 0}),
        "add": ("add", source | {"factor": "i64"}, {"SIGN": -1, "WORDS": 1, "KIND": 0, **block}),
        "add wide": ("add", source | {"source": "*i64"}, {"SIGN": 1, "WORDS": 2, "KIND": 2, **block}),
        "to_float": ("to_float", pointers(**words, out="fp32") | {"resolution": "i64"}, {"WORDS": 1, **block}),
        "to_float wide": ("to_float", pointers(**words, out="fp64") | {"resolution": "i64"}, {"WORDS": 2, **block}),
        "ratio": ("ratio", pointers(**floats), {"C1": 1, "C2": 1, "EPS": 2, **block}),
        "maximum": ("maximum", pointers(**words, other_high="i64", other_low="i64"), block),
        "largest": ("largest", pointers(bits="i32", out="i32"), {"MAGNITUDE": 2**31 - 1, **summed}),
        "largest float64": ("largest", pointers(bits="i64", out="i64"), {"MAGNITUDE": 2**63 - 1, **summed}),
        "fingerprint": ("fingerprint", pointers(bits="i32", out="i64"), summed),
    }
    cases: dict[str, ptx.Case] = {name: (*case, ptx.TARGETS) for name, case in kinds.items()}
    expected = {
        "multiply": ["div.rn.f64"],
        "divide wide": ["div.rn.f64", "mul.rn.f64", "cvt.rmi.f64.f64"],
        "add": ["mul.rn.f64", "add.rn.f64", "sub.rn.f64"],
        "add wide": ["mul.rn.f64", "sub.rn.f64"],
        "to_float": ["mul.rn.f64", "cvt.rn.f32.f64"],
        "ratio": ["div.rn.f64", "sqrt.rn.f64", "mul.rn.f64", "add.rn.f64"],
    }
    found = ptx.compiled("revdistill.engine.integers.kernels", cases, tmp_path)
    assert len(found) == len(cases) * len(ptx.TARGETS)
    for name, text in found.items():
        ptx.assert_exact(text, expected=expected.get(name.rsplit(" ", 1)[0], ()))
    with pytest.raises(AssertionError):
        ptx.assert_exact(found["add 80"] + "\n\tfma.rn.f64 %rd1, %rd2, %rd3, %rd4;")


def test_the_bits_of_a_float_are_passed_on() -> None:
    assert fused_module._number(0.1) == (struct.unpack("q", struct.pack("d", 0.1))[0], 0)
