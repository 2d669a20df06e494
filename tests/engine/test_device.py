"""The engine on a device that is no CPU: every bit of training as on the CPU, and the same hypergradients.

The device is a stand-in (`tests.standin`), which divides as CUDA does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.history import DeviceHistory
from revdistill.engine.integers.loops import LOOPS
from revdistill.engine.integers.passes import Passes
from revdistill.engine.integers.radix import COARSE, FINE, WIDE, Radix
from tests import standin
from tests.engine.devices import DTYPES, assert_same, classifier, go_back, least_quartics, mlp, outcome, stack
from tests.engine.problems import SETTINGS, STEPS, WITHOUT_WAY_BACK, optimizer_of, tensors_of
from tests.engine.small import CE

pytestmark = pytest.mark.standin

CPU = torch.device("cpu")
AGAIN = rd.Reversible(graph_bytes=0)  # each gradient once more on the way back

# The integer work


@pytest.mark.parametrize(
    ("radix", "rates"),
    [
        (COARSE, [1, 2, 49, 58982, 65515, 65535]),
        (FINE, [1, 49, 2**29 + 1, 2**30 - 1]),
        (WIDE, [1, 49, 966367642, 2**30 - 1]),
    ],
    ids=["coarse", "fine", "wide"],
)
def test_decays_have_the_cpus_bits(counts: standin.Counts, radix: Radix, rates: list[int]) -> None:
    """Regression: heads were divided by a number of the host, which CUDA multiplies by the number's rounded
    reciprocal.
    """
    numel = 20_000
    draw = torch.Generator().manual_seed(0)
    for n in rates:
        here, there = (BitStore(numel, where, DeviceHistory(), radix) for where in (CPU, standin.device()))
        start = torch.randint(-(2**60), 2**60, (numel,), generator=draw)
        if radix is WIDE:
            start = torch.stack([start, torch.randint(0, 2**60, (numel,), generator=draw)])
        mine, theirs = start.clone(), standin.put(start)
        for _ in range(40):
            here.decay_(mine, n)
            there.decay_(theirs, n)
        assert torch.equal(mine, standin.take(theirs))
        assert torch.equal(here.head, standin.take(there.head))
        for _ in range(40):
            there.undecay_(theirs, n)
        assert torch.equal(standin.take(theirs), start)
        assert bool(there.is_empty())


def test_a_constant_rate_is_put_on_the_device_once(counts: standin.Counts) -> None:
    store, v = BitStore(5, standin.device(), DeviceHistory()), standin.put(torch.arange(5))
    for n in (58982, 58982, 58982, 49):
        store.decay_(v, n)
    assert counts.operators["aten::full"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fingerprint_is_the_cpus_and_leaves_what_it_is_of(counts: standin.Counts, dtype: torch.dtype) -> None:
    """Regression: float64's bits are int64 already, and were mixed in place: the gradient itself."""
    x = torch.randn(1001, dtype=dtype, generator=torch.Generator().manual_seed(0))
    there = standin.put(x)
    found = Passes().fingerprint(there)
    assert isinstance(found, Tensor)
    assert int(found) == LOOPS.fingerprint(x)
    assert torch.equal(standin.take(there), x)


# Whole unrolls


def compare(problem: Any, setting: str, dtype: torch.dtype, runs: list[Any], **kwargs: Any) -> None:
    found = []
    for on_device in (False, True):
        case = problem(dtype, on_device)
        settings = SETTINGS[setting](case)
        found.append(outcome(case, optimizer_of(setting, settings), tensors_of(settings), runs, steps=STEPS, **kwargs))
    assert_same(*found, dtype)


ADJOINTS: dict[str, Callable[[Path], Any]] = {
    "device": lambda folder: rd.Reversible(graph_bytes=0),
    "host": lambda folder: rd.Reversible(history="host", graph_bytes=0),
    "file": lambda folder: rd.Reversible(history=folder, graph_bytes=0),
    "graphs": lambda folder: rd.Reversible(graph_bytes=2**16),
    "default": lambda folder: rd.Reversible(),
    "checkpoint": lambda folder: rd.Checkpoint(every=5),
    "storeall": lambda folder: rd.StoreAll(),
    "backprop": lambda folder: rd.Backprop(),
}
COMBINATIONS = [
    (setting, adjoint)
    for setting, adjoint in itertools.product(SETTINGS, ADJOINTS)
    if not (setting in WITHOUT_WAY_BACK and adjoint in ("device", "host", "file", "graphs", "default"))
]
ALONG: dict[str, dict[str, Any]] = {
    "all steps": {},
    "window": {"window": 7},
    "save_at": {"save_at": [STEPS, 0, 5]},
    "both": {"window": 7, "save_at": [0, 6, STEPS]},
}


@pytest.mark.parametrize(("setting", "adjoint"), COMBINATIONS)
def test_unrolls_are_the_cpus(
    counts: standin.Counts, runs: list[Any], tmp_path: Path, setting: str, adjoint: str
) -> None:
    """Each optimizer with each adjoint, the rest in turns; test_every_combination_is_the_cpus has the whole product."""
    turn = COMBINATIONS.index((setting, adjoint))
    dtype, along = list(DTYPES.values())[turn % 2], list(ALONG.values())[turn // 2 % 4]
    compare(mlp, setting, dtype, runs, adjoint=ADJOINTS[adjoint](tmp_path), **along)


@pytest.mark.slow
@pytest.mark.parametrize("problem", [mlp, stack])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize(("setting", "adjoint"), COMBINATIONS)
def test_every_combination_is_the_cpus(
    counts: standin.Counts,
    runs: list[Any],
    tmp_path: Path,
    setting: str,
    adjoint: str,
    along: str,
    dtype: str,
    problem: Any,
) -> None:
    compare(problem, setting, DTYPES[dtype], runs, adjoint=ADJOINTS[adjoint](tmp_path), **ALONG[along])


@pytest.mark.parametrize("adjoint", ["host", "checkpoint", "storeall"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stack_with_a_rate_for_each_network(
    counts: standin.Counts, runs: list[Any], tmp_path: Path, dtype: str, adjoint: str
) -> None:
    found = []
    for on_device in (False, True):
        case = stack(DTYPES[dtype], on_device)
        lr = torch.linspace(0.05, 0.2, STEPS * 3, dtype=torch.float64).reshape(STEPS, 3).requires_grad_()
        lr = standin.put(lr) if on_device else lr
        optimizer = rd.SGD(lr, 0.5, weight_decay=0.01)
        found.append(outcome(case, optimizer, {"lr": lr}, runs, steps=STEPS, adjoint=ADJOINTS[adjoint](tmp_path)))
    assert_same(*found, DTYPES[dtype])


@pytest.mark.parametrize(
    ("optimizer", "history", "dtype", "steps"),
    [
        (rd.SGD(1e-3, 0.9), "device", torch.float32, 2000),
        (rd.SGD(1e-3, 0.9), "host", torch.float64, 1000),
        (rd.Adam(1e-3), "host", torch.float32, 300),
        pytest.param(rd.SGD(1e-3, 0.9), "host", torch.float64, 2000, marks=pytest.mark.slow),
        pytest.param(rd.AdamW(1e-3, weight_decay=0.1), "device", torch.float64, 2000, marks=pytest.mark.slow),
    ],
    ids=["sgd", "sgd-host", "adam-host", "sgd-host-2000", "adamw-2000"],
)
def test_many_steps_with_spills(
    counts: standin.Counts, runs: list[Any], optimizer: Any, history: str, dtype: torch.dtype, steps: int
) -> None:
    found = []
    for on_device in (False, True):
        case = least_quartics(dtype, on_device)
        found.append(
            outcome(case, optimizer, {}, runs, steps=steps, adjoint=rd.Reversible(history=history, graph_bytes=0))
        )
    assert_same(*found, dtype)
    assert found[0].words is not None
    assert (
        len(found[0].words) * 8 > 0.9 * 0.152 * 3 * steps - 3 * 52
    )  # the bits of momentum 0.9, less what is still in the heads


@pytest.mark.parametrize("optimizer", [rd.SGD(1e-3, 0.9), rd.Adam(1e-3), rd.AdamW(1e-3)], ids=["sgd", "adam", "adamw"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_parameters(counts: standin.Counts, runs: list[Any], optimizer: Any, dtype: str) -> None:
    """Regression: a wrong digit is rare, and one of them spoils a whole way back."""
    found = []
    for on_device in (False, True):
        found.append(
            outcome(least_quartics(DTYPES[dtype], on_device, 50_000), optimizer, {}, runs, steps=30, adjoint=AGAIN)
        )
    assert_same(*found, DTYPES[dtype])


# Networks


class Embedded(nn.Module):
    """Words, and attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        words = self.embedding((x * 3).long().clamp(0, 6))
        mixed, _ = self.attention(words, words, words, need_weights=False)
        return self.out((words + mixed).mean(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.SiLU(), nn.Linear(6, 3)), (4,)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        ),
        (2, 6, 6),
    ),
    "attention": (Embedded, (4,)),  # a mean over 4: the stand-in divides by it exactly too
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train_as_on_the_cpu(counts: standin.Counts, runs: list[Any], name: str) -> None:
    network, shape = NETWORKS[name]
    found = []
    for on_device in (False, True):
        torch.manual_seed(2)
        found.append(
            outcome(
                classifier(network(), torch.float64, on_device, *shape),
                rd.SGD(0.1, 0.5),
                {},
                runs,
                steps=40,
                adjoint=AGAIN,
            )
        )
    assert_same(*found, torch.float64)


# Errors


@pytest.mark.parametrize("adjoint", [rd.Reversible(), rd.Checkpoint(), rd.Backprop()], ids=repr)
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_what_is_not_finite_is_named_with_its_own_step(counts: standin.Counts, adjoint: Any, what: str) -> None:
    """Regression: Backprop looks at a device each 32 steps, and named the step at which it looked."""
    case = mlp(torch.float64, True)
    switch = torch.ones(40, dtype=torch.float64)
    switch[17] = torch.nan if what == "loss" else 0.0

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        return (
            case.loss(p, batch[:2]) + (p["2.bias"] - p["2.bias"].detach() + batch[2]).sqrt().sum()
        )  # at 0: 0, the gradient infinite

    x, y = (standin.put(standin.take(t).repeat(8, *[1] * (t.ndim - 1))) for t in case.batches)
    with pytest.raises(rd.NonFiniteError) as caught:
        rd.unroll(loss, case.params, (x, y, standin.put(switch)), rd.SGD(1e-3), steps=40, adjoint=adjoint)
    assert caught.value.step == 17
    assert caught.value.parameter == "2.bias"


def test_a_hypergradient_that_stops_being_finite_is_named_with_its_own_parameter(
    counts: standin.Counts, runs: list[Any]
) -> None:
    """By the time that the device is looked at, what became NaN at step 20 has spoilt the parameters before it."""
    w, u = (standin.put(torch.ones(2, dtype=torch.float64).requires_grad_()) for _ in range(2))
    shift = torch.ones(40, dtype=torch.float64)
    shift[20] = 0

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        moved = p["u"] - p["u"].detach() + batch[0]
        return (p["w"] * p["u"]).sum() + moved.abs().pow(1.5).sum()  # at 0: gradient 0, second derivative infinite

    rd.unroll(loss, {"w": w, "u": u}, (standin.put(shift),), rd.SGD(0.01), steps=40)
    with pytest.raises(rd.NonFiniteError, match=r"params\['u'\] stopped being finite at step 20"):
        go_back(runs[0])


def test_another_gradient_on_the_way_back_is_named_with_its_own_step(counts: standin.Counts, runs: list[Any]) -> None:
    """The first that is met, of all those that follow from it."""
    case, calls = mlp(torch.float32, True), itertools.count()

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        return case.loss(p, batch) * (1.5 if next(calls) == 50 + 9 else 1.0)  # the tenth on the way back

    rd.unroll(loss, case.params, case.batches, rd.SGD(0.01), steps=50, adjoint=AGAIN)
    with pytest.raises(rd.ReversalError, match="the gradient at step 40 was not the same"):
        go_back(runs[0])


def test_a_loss_with_a_tensor_of_the_cpu_says_so(counts: standin.Counts) -> None:
    """The stand-in is as strict as CUDA."""
    case, here = mlp(torch.float32, True), torch.ones(3)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        rd.unroll(
            lambda p, b: CE(p["2.bias"].expand(6, 3) + here, b[1]), case.params, case.batches, rd.SGD(0.1), steps=2
        )


@pytest.mark.parametrize("make", [lambda: rd.SGD(0.1, 0.9, max_norm=0.5), lambda: rd.AdamW(0.01)], ids=["sgd", "adamw"])
def test_pieces_have_the_cpus_bits(counts: standin.Counts, make: Callable[[], Any]) -> None:
    """Clipped, averaged, and in two pieces; and a state that was moved to the CPU goes on there, from its floats."""

    def pieces(on_device: bool) -> tuple[Any, ...]:
        case = mlp(torch.float64, on_device)
        half, state = rd.unroll(case.loss, case.params, case.batches, make(), steps=5, seed=1, return_state=True)
        rest, average = rd.unroll(case.loss, half, case.batches, make(), steps=35, state=state, average=0.9)
        return half, state, rest, average

    _, _, *here = pieces(False)
    half, state, *there = pieces(True)
    for mine, theirs in zip(here, there, strict=True):
        for n, p in mine.items():
            torch.testing.assert_close(standin.take(theirs[n].detach()), p.detach(), rtol=1e-12, atol=1e-14)

    moved = replace(
        state,
        slots={slot: {n: standin.take(t.detach()) for n, t in of.items()} for slot, of in state.slots.items()},
    )
    case = mlp(torch.float64, False)
    start = {n: standin.take(p.detach()) for n, p in half.items()}
    theta = rd.unroll(case.loss, start, case.batches, make(), steps=35, state=moved)
    for n, p in here[0].items():
        torch.testing.assert_close(theta[n].detach(), p.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("adjoint", [AGAIN, rd.Backprop()], ids=repr)
def test_what_is_written_behind_torchs_back_is_refused_at_the_end(counts: standin.Counts, adjoint: Any) -> None:
    """Where to look at once would be to wait for the device."""
    case = least_quartics(torch.float64, True)

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        p["w"].data.mul_(0.5)
        return case.loss(p, batch)

    with pytest.raises(rd.UnsupportedError, match=r"changes params\['w'\] in place"):
        rd.unroll(loss, case.params, case.batches, rd.SGD(0.01), steps=3, adjoint=adjoint)
