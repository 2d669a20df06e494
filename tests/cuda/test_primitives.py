"""The integer work as tensor operations on a device, against the compiled loops of the CPU: every bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.fixedpoint import LOW_MASK, FixedPoint, Wide
from revdistill.engine.integers.history import DeviceHistory, FileHistory, History, HostHistory
from revdistill.engine.integers.loops import LOOPS
from revdistill.engine.integers.passes import Passes, divide_, multiply_
from revdistill.engine.integers.radix import COARSE, FINE, HEAD_BITS, WIDE, Radix
from tests.cuda.cases import DEVICE

pytestmark = pytest.mark.cuda

NUMEL = 10**6 if DEVICE == "cuda" else 20_000
FRACTIONS = [1, 2, 49, 2**29, FINE.quantise(0.9), FINE.quantise(0.999), 2**30 - 2, 2**30 - 1]
DECAYS = [
    *(pytest.param(COARSE, n, id=f"coarse-{n}") for n in (1, 2, 49, 58982, 65515, 65535)),
    *(pytest.param(FINE, n, id=f"fine-{n}") for n in FRACTIONS),
    *(pytest.param(WIDE, n, id=f"wide-{n}") for n in FRACTIONS),
]
TYPES = [torch.float32, torch.float64]


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integers(low: int, high: int, seed: int = 0) -> Tensor:
    """From the whole range, its ends among them; and as many small ones."""
    x = torch.randint(low, high, (NUMEL,), generator=drawn(seed))
    x[::2] >>= torch.randint(0, 62, (len(x[::2]),), generator=drawn(seed + 1))
    x[:4] = torch.tensor([low, high - 1, max(low, -1), 1])
    return x


def slot_for(radix: Radix) -> Tensor:
    v = integers(-(2**62) + 1, 2**62)
    return v if radix is not WIDE else torch.stack([v, integers(0, LOW_MASK + 1, seed=2)])


def values(dtype: torch.dtype) -> Tensor:
    """Of many magnitudes; halves among them, whose rounding is a tie."""
    x = torch.randn(NUMEL, dtype=torch.float64, generator=drawn()) * 2.0 ** torch.randint(
        -60, 8, (NUMEL,), generator=drawn(1)
    )
    x[::5] = torch.randint(-9, 9, (len(x[::5]),), generator=drawn(2)) * 2.0**-45
    return x.to(dtype)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize(("radix", "n"), DECAYS)
def test_decays_are_the_cpus(device: torch.device, radix: Radix, n: int, as_tensor: bool) -> None:
    v, head = slot_for(radix), integers(0, n << HEAD_BITS - radix.bits, seed=3)
    start_v, start_head = v.clone(), head.clone()
    there, heads, divisor = v.to(device, copy=True), head.to(device, copy=True), Passes().divisor(n, device)
    numerator: Any = torch.full((), n, device=device) if as_tensor else n
    LOOPS.multiply(v, head, n, radix)
    multiply_(there, heads, numerator, divisor, radix)
    assert not torch.equal(v, start_v)
    assert torch.equal(there.cpu(), v)
    assert torch.equal(heads.cpu(), head)
    LOOPS.divide(v, head, n, radix)
    divide_(there, heads, numerator, divisor, radix)
    assert torch.equal(v, start_v)
    assert torch.equal(head, start_head)
    assert torch.equal(there.cpu(), start_v)
    assert torch.equal(heads.cpu(), start_head)


SOURCES = [torch.float32, torch.float64, torch.int64]


def source_and_factor(kind: torch.dtype, each: bool, scale: float) -> tuple[Tensor, Any]:
    """What an optimizer adds: a gradient times `scale`, or a velocity times a rate."""
    source = integers(-(2**60), 2**60) if kind == torch.int64 else values(kind)
    factor = -0.0123456789 * (1.0 if kind == torch.int64 else scale)
    if not each:
        return source, factor
    return source, factor * torch.rand(NUMEL, dtype=torch.float64, generator=drawn(7))


@pytest.mark.parametrize("each", [False, True], ids=["one factor", "a factor each"])
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("wide", [False, True], ids=["one word", "two words"])
def test_rounded_sums_are_the_cpus(device: torch.device, wide: bool, kind: torch.dtype, each: bool) -> None:
    target = integers(-(2**61), 2**61)
    if wide:
        target = torch.stack([target, integers(0, LOW_MASK + 1, seed=2)])
    source, factor = source_and_factor(kind, each, Wide.scale if wide else FixedPoint().scale)
    start, there = target.clone(), target.to(device, copy=True)
    moved_source, moved_factor = source.to(device), factor.to(device) if isinstance(factor, Tensor) else factor
    for sign in (1, -1):
        LOOPS.add(target, source, factor, sign)
        Passes().add(there, moved_source, moved_factor, sign)
        assert torch.equal(there.cpu(), target)
        assert torch.equal(target, start) == (sign == -1)
    assert torch.equal(moved_source.cpu(), source)


@pytest.mark.parametrize("dtype", TYPES)
def test_fixed_point_numbers_are_read_and_written_as_on_the_cpu(device: torch.device, dtype: torch.dtype) -> None:
    fixed, x = FixedPoint(), values(dtype)
    q = fixed.from_float(x)
    assert torch.equal(fixed.from_float(x.to(device)).cpu(), q)
    q = integers(-(2**62) + 1, 2**62)
    expected = LOOPS.to_float(q, torch.empty(NUMEL, dtype=dtype), fixed)
    found = Passes().to_float(q.to(device), torch.empty(NUMEL, dtype=dtype, device=device), fixed)
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(expected, (q.double() * fixed.resolution).to(dtype))  # the CPU's loop is no other arithmetic


@pytest.mark.parametrize("dtype", TYPES)
def test_wide_numbers_are_read_as_on_the_cpu(device: torch.device, dtype: torch.dtype) -> None:
    q = slot_for(WIDE)
    expected = LOOPS.to_float(q, torch.empty(NUMEL, dtype=dtype), Wide())
    found = Passes().to_float(q.to(device), torch.empty(NUMEL, dtype=dtype, device=device), Wide())
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_fingerprint_is_the_cpus_and_leaves_what_it_is_of(device: torch.device, dtype: torch.dtype) -> None:
    x = values(dtype)
    x[:5] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")])
    there, bits = x.to(device, copy=True), torch.int32 if dtype == torch.float32 else torch.int64
    assert int(Passes().fingerprint(there)) == LOOPS.fingerprint(x)
    assert torch.equal(there.cpu().view(bits), x.view(bits))
    there[-1] += 1
    assert int(Passes().fingerprint(there)) != LOOPS.fingerprint(x)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("entry", [0.0, -0.0, 7.5, -7.5, 1e-45, float("inf"), float("-inf"), float("nan")])
def test_the_largest_magnitude_is_the_cpus(device: torch.device, dtype: torch.dtype, entry: float) -> None:
    for place in (0, NUMEL // 2, NUMEL - 1):
        x = torch.zeros(NUMEL, dtype=dtype)
        x[place] = entry
        found, expected = float(Passes().largest(x.to(device))), LOOPS.largest(x)
        assert found == expected or (found != found and expected != expected)
        assert expected == abs(entry) or dtype == torch.float32 or entry != entry


@pytest.mark.parametrize("place", ["device", "host", "file"])
@pytest.mark.parametrize("radix", [COARSE, FINE, WIDE], ids=["coarse", "fine", "wide"])
def test_a_bit_store_spills_and_comes_back(device: torch.device, radix: Radix, place: str, tmp_path: Path) -> None:
    """Rates that lose many bits, none or all, so that words are spilled often; each word to where it is kept,
    and back.
    """
    factors = [0.5, 0.9, 0.01, 1.0, 1 / radix.base, 0.0, 0.999] * 4
    histories: dict[str, Callable[[], History]] = {
        "device": DeviceHistory,
        "host": lambda: HostHistory(device),
        "file": lambda: FileHistory(tmp_path, device),
    }
    numel = NUMEL // 10
    v = slot_for(radix)[..., :numel].clone()
    there, start = v.to(device, copy=True), v.clone()
    mine = BitStore(numel, torch.device("cpu"), DeviceHistory(), radix)
    theirs = BitStore(numel, device, histories[place](), radix)
    noise = drawn(5)
    added = []
    for factor in factors:
        n, more = radix.quantise(factor), torch.randint(0, 2**40, (numel,), generator=noise)
        mine.decay_(v, n)
        theirs.decay_(there, n)
        (v if v.ndim == 1 else v[0]).add_(more)
        (there if v.ndim == 1 else there[0]).add_(more.to(device))
        added.append(more)
    assert torch.equal(there.cpu(), v)
    assert torch.equal(theirs.head.cpu(), mine.head)
    assert theirs.history.nbytes == mine.history.nbytes > 3 * v.nbytes
    for factor, more in zip(reversed(factors), reversed(added), strict=True):
        (there if v.ndim == 1 else there[0]).sub_(more.to(device))
        theirs.undecay_(there, radix.quantise(factor))
    assert torch.equal(there.cpu(), start)
    assert bool(theirs.is_empty())
