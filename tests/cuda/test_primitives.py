"""The integer work on a device, as tensor operations and as Triton's kernels, against the CPU's loops: every bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from revdistill.engine.integers.backend import Backend
from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.fixedpoint import LOW_MASK, FixedPoint, Wide
from revdistill.engine.integers.fused import Fused
from revdistill.engine.integers.history import DeviceHistory, FileHistory, History, HostHistory
from revdistill.engine.integers.loops import LOOPS
from revdistill.engine.integers.passes import Passes
from revdistill.engine.integers.radix import COARSE, FINE, HEAD_BITS, WIDE, Radix
from revdistill.engine.integers.select import fused_for
from tests.cuda.cases import DEVICE
from tests.engine import interpreted

pytestmark = pytest.mark.cuda

NUMEL = 10**6 if DEVICE == "cuda" else 20_000
FRACTIONS = [1, 2, 49, 2**29, FINE.quantise(0.9), FINE.quantise(0.999), 2**30 - 2, 2**30 - 1]
DECAYS = [
    *(pytest.param(COARSE, n, id=f"coarse-{n}") for n in (1, 2, 49, 58982, 65515, 65535)),
    *(pytest.param(FINE, n, id=f"fine-{n}") for n in FRACTIONS),
    *(pytest.param(WIDE, n, id=f"wide-{n}") for n in FRACTIONS),
]
TYPES = [torch.float32, torch.float64]


@pytest.fixture(params=["passes", "fused"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Any]:
    if request.param == "passes":
        yield Passes()
        return
    if DEVICE == "standin":
        pytest.skip("the stand-in has no kernels")
    if DEVICE == "cpu":
        found: Fused | None = Fused(interpreted.kernels())
    else:
        pytest.importorskip("triton")
        found = fused_for(device)
    assert found is not None, "the first launch of a kernel failed; a warning says why"
    yield found
    assert not found.given_up


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
def test_decays_are_the_cpus(device: torch.device, backend: Any, radix: Radix, n: int, as_tensor: bool) -> None:
    v, head = slot_for(radix), integers(0, n << HEAD_BITS - radix.bits, seed=3)
    start_v, start_head = v.clone(), head.clone()
    there, heads = v.to(device, copy=True), head.to(device, copy=True)
    numerator: Any = torch.full((), n, dtype=torch.float64, device=device) if as_tensor else n
    LOOPS.multiply(v, head, n, radix)
    backend.multiply(there, heads, numerator, radix)
    assert not torch.equal(v, start_v)
    assert torch.equal(there.cpu(), v)
    assert torch.equal(heads.cpu(), head)
    LOOPS.divide(v, head, n, radix)
    backend.divide(there, heads, numerator, radix)
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
def test_rounded_sums_are_the_cpus(
    device: torch.device, backend: Backend, wide: bool, kind: torch.dtype, each: bool
) -> None:
    target = integers(-(2**61), 2**61)
    if wide:
        target = torch.stack([target, integers(0, LOW_MASK + 1, seed=2)])
    source, factor = source_and_factor(kind, each, Wide.scale if wide else FixedPoint().scale)
    start, there = target.clone(), target.to(device, copy=True)
    moved_source, moved_factor = source.to(device), factor.to(device) if isinstance(factor, Tensor) else factor
    for sign in (1, -1):
        LOOPS.add(target, source, factor, sign)
        backend.add(there, moved_source, moved_factor, sign)
        assert torch.equal(there.cpu(), target)
        assert torch.equal(target, start) == (sign == -1)
    assert torch.equal(moved_source.cpu(), source)


@pytest.mark.parametrize("dtype", TYPES)
def test_fixed_point_numbers_are_read_and_written_as_on_the_cpu(
    device: torch.device, backend: Backend, dtype: torch.dtype
) -> None:
    fixed, x = FixedPoint(), values(dtype)
    q = fixed.from_float(x)
    assert torch.equal(fixed.from_float(x.to(device)).cpu(), q)
    q = integers(-(2**62) + 1, 2**62)
    expected = LOOPS.to_float(q, torch.empty(NUMEL, dtype=dtype), fixed)
    found = backend.to_float(q.to(device), torch.empty(NUMEL, dtype=dtype, device=device), fixed)
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(expected, (q.double() * fixed.resolution).to(dtype))  # the CPU's loop is no other arithmetic


@pytest.mark.parametrize("dtype", TYPES)
def test_wide_numbers_are_read_as_on_the_cpu(device: torch.device, backend: Backend, dtype: torch.dtype) -> None:
    q = slot_for(WIDE)
    expected = LOOPS.to_float(q, torch.empty(NUMEL, dtype=dtype), Wide())
    found = backend.to_float(q.to(device), torch.empty(NUMEL, dtype=dtype, device=device), Wide())
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_fingerprint_is_the_cpus_and_leaves_what_it_is_of(
    device: torch.device, backend: Backend, dtype: torch.dtype
) -> None:
    x = values(dtype)
    x[:5] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")])
    there, bits = x.to(device, copy=True), torch.int32 if dtype == torch.float32 else torch.int64
    assert int(backend.fingerprint(there)) == LOOPS.fingerprint(x)
    assert torch.equal(there.cpu().view(bits), x.view(bits))
    there[-1] += 1
    assert int(backend.fingerprint(there)) != LOOPS.fingerprint(x)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("entry", [0.0, -0.0, 7.5, -7.5, 1e-45, float("inf"), float("-inf"), float("nan")])
def test_the_largest_magnitude_is_the_cpus(
    device: torch.device, backend: Backend, dtype: torch.dtype, entry: float
) -> None:
    for place in (0, NUMEL // 2, NUMEL - 1):
        x = torch.zeros(NUMEL, dtype=dtype)
        x[place] = entry
        found, expected = float(backend.largest(x.to(device))), LOOPS.largest(x)
        assert found == expected or (found != found and expected != expected)
        assert expected == abs(entry) or dtype == torch.float32 or entry != entry


def test_adams_direction_and_its_maximum_are_the_cpus(device: torch.device, backend: Backend) -> None:
    """Each of the three numbers as a float, as one number of the device, or as one for each element."""
    m, s = values(torch.float64), values(torch.float64).square()
    each = torch.rand(NUMEL, dtype=torch.float64, generator=drawn(9)) + 0.1
    one = torch.tensor(0.1234567, dtype=torch.float64)
    root = torch.from_numpy(np.sqrt(s.numpy()))  # correctly rounded, as the CPU's tensor operations are not always
    for rest in ((0.1234567, 3.3, 1e-8), (one, 3.3, one), (each, one, 1e-8)):
        moved: list[Any] = [x.to(device) if isinstance(x, Tensor) else x for x in rest]
        expected = m / ((root * rest[1] + rest[2]) * rest[0])
        if DEVICE != "cpu" or isinstance(backend, Fused):
            assert torch.equal(backend.ratio(m.to(device), s.to(device), *moved).cpu(), expected)
    q, other = slot_for(WIDE), slot_for(WIDE).flip(1)
    other[0, ::3] = q[0, ::3]
    there = q.to(device, copy=True)
    backend.maximum(there, other.to(device))
    LOOPS.maximum(q, other)
    assert torch.equal(there.cpu(), q)


@pytest.mark.parametrize("place", ["device", "host", "file"])
@pytest.mark.parametrize("radix", [COARSE, FINE, WIDE], ids=["coarse", "fine", "wide"])
def test_a_bit_store_spills_and_comes_back(
    device: torch.device, backend: Backend, radix: Radix, place: str, tmp_path: Path
) -> None:
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
    theirs = BitStore(numel, device, histories[place](), radix, backend)
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
