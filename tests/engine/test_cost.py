"""What rd.unroll costs: evaluations per step, what it keeps alive, peak memory, imports."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd
from revdistill.engine.adjoints import memory, reversible
from revdistill.engine.adjoints.trajectory import Trajectory
from revdistill.engine.layout import Layout
from revdistill.engine.loss.data import Data
from revdistill.engine.loss.determinism import Determinism
from revdistill.engine.loss.gradient import EagerLinearization as Linearization
from revdistill.engine.loss.gradient import Gradient
from tests.engine.small import CE, data, mlp, total


def test_one_gradient_and_one_product_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    linearize = Gradient.linearize
    monkeypatch.setattr(Gradient, "linearize", lambda self, k, theta: calls.append(k) or linearize(self, k, theta))
    loss, params = rd.from_module(mlp(), CE)
    for adjoint, expected in ((rd.Reversible(graph_bytes=0), 20), (rd.StoreAll(), 20), (rd.Checkpoint(), 30)):
        calls.clear()
        total(rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=10, adjoint=adjoint)).backward()
        assert len(calls) == expected
    calls.clear()
    with torch.no_grad():
        rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=10)
    assert len(calls) == 10


@pytest.mark.parametrize("fitting", [None, 0, 1, 4, 10, 99])
def test_graphs_that_fit_are_not_evaluated_again(monkeypatch: pytest.MonkeyPatch, fitting: int | None) -> None:
    calls = []
    linearize = Gradient.linearize
    loss, params = rd.from_module(mlp(), CE)
    batches, lr = data(5), torch.full((10,), 0.1, requires_grad=True)

    def hypergradient(**kwargs: Any) -> tuple[Tensor, ...]:
        theta = rd.unroll(
            loss, params, batches, rd.SGD(lr, 0.9, weight_decay=1e-3), steps=10, adjoint=rd.Reversible(**kwargs)
        )
        return torch.autograd.grad(total(theta), [batches[0], lr, *params.values()])

    plain = hypergradient(graph_bytes=0)
    sizes = []

    def watched(self: Gradient, k: int, theta: Tensor) -> Any:
        at = linearize(self, k, theta)
        calls.append(k)
        sizes.append(at.nbytes)
        return at

    monkeypatch.setattr(Gradient, "linearize", watched)
    monkeypatch.setattr(reversible, "free_bytes", lambda device: 2**40)
    hypergradient(graph_bytes=0)
    assert len(set(sizes)) == 1  # one step's graph is as large as another's
    calls.clear()
    found = hypergradient(graph_bytes=None if fitting is None else fitting * sizes[0] + sizes[0] // 2)
    assert calls == [*range(10), *reversed(range(10 - min(10, 10 if fitting is None else fitting)))]
    assert all(map(torch.equal, found, plain))


def evaluations(monkeypatch: pytest.MonkeyPatch, free: int | None = None, **kwargs: Any) -> tuple[list[int], int]:
    """(Of which steps gradients were evaluated in an unroll of 10, the bytes of one step's graph.)"""
    calls, sizes = [], []
    linearize = Gradient.linearize

    def watched(self: Gradient, k: int, theta: Tensor) -> Any:
        at = linearize(self, k, theta)
        calls.append(k)
        sizes.append(at.nbytes)
        return at

    loss, params = rd.from_module(mlp(), CE)
    with monkeypatch.context() as patch:
        patch.setattr(Gradient, "linearize", watched)
        if free is not None:
            patch.setattr(reversible, "free_bytes", lambda device: free)
        total(rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=10, **kwargs)).backward()
    assert len(set(sizes)) == 1
    return calls, sizes[0]


def test_graphs_of_a_short_unroll_are_kept_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for adjoint in (None, rd.Reversible(), rd.Reversible(history="host", graph_bytes=None)):
        calls, _ = evaluations(monkeypatch, free=2**40, adjoint=adjoint)
        assert calls == [*range(10)]


def test_graphs_take_a_sixteenth_of_the_free_memory_and_256_mib_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    _, size = evaluations(monkeypatch)
    for free, kept in ((0, 0), (16 * size - 1, 0), (16 * size, 1), (16 * 3 * size + 15, 3), (2**60, 10)):
        calls, _ = evaluations(monkeypatch, free=free)
        assert calls == [*range(10), *reversed(range(10 - kept))]
    assert reversible.GRAPH_BYTES == 256 * 2**20
    for nbytes, kept in ((size, 1), (4 * size + 1, 4), (0, 0)):
        monkeypatch.setattr(reversible, "GRAPH_BYTES", nbytes)
        calls, _ = evaluations(monkeypatch, free=2**60)
        assert calls == [*range(10), *reversed(range(10 - kept))]


def test_an_explicit_size_does_not_look_at_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, _ = evaluations(monkeypatch, free=0, adjoint=rd.Reversible(graph_bytes=2**20))
    assert calls == [*range(10)]


@pytest.mark.parametrize(
    ("meminfo", "limit", "used", "expected"),
    [
        ("MemTotal: 9 kB\nMemAvailable: 7 kB\n", None, None, 7 * 1024),
        ("MemTotal: 9 kB\nMemAvailable: 7 kB\n", "max", "5", 7 * 1024),
        ("MemTotal: 9 kB\nMemAvailable: 7 kB\n", "5000\n", "1000\n", 4000),  # a container's own limit
        ("MemTotal: 9 kB\nMemAvailable: 7 kB\n", "999999", "1000", 7 * 1024),
        ("MemTotal: 9 kB\nMemAvailable: 7 kB\n", "5000", "6000", 0),
        ("MemTotal: 9 kB\n", "5000", "1000", 0),
        ("MemAvailable:\n", None, None, 0),
        (None, "5000", "1000", 0),  # a system that does not tell
    ],
)
def test_free_memory(
    meminfo: str | None,
    limit: str | None,
    used: str | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name, text in (("meminfo", meminfo), ("memory.max", limit), ("memory.current", used)):
        if text is not None:
            (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert memory.free_bytes(torch.device("cpu")) == expected


def test_nothing_is_kept_alive() -> None:
    loss, params = rd.from_module(mlp(), CE)
    alive: list[weakref.ref[Tensor]] = []

    def watched(p: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        value = loss(p, batch)
        alive.append(weakref.ref(value))
        assert sum(ref() is not None for ref in alive) <= 2  # this step's, and the one being let go of
        return value

    gc.collect()
    before = {
        id(o) for o in gc.get_objects() if type(o) in (Trajectory, Linearization)
    }  # of caught errors in other tests
    theta = rd.unroll(watched, params, data(5), rd.SGD(0.1), steps=30, adjoint=rd.Reversible(graph_bytes=0))
    total(theta).backward()
    del theta
    gc.collect()
    assert {id(o) for o in gc.get_objects() if type(o) in (Trajectory, Linearization)} <= before
    assert not any(ref() is not None for ref in alive)


_PEAK = """
import sys, torch, revdistill as rd
net = torch.nn.Sequential(torch.nn.Linear(100, 300), torch.nn.ReLU(), torch.nn.Linear(300, 10))
loss, params = rd.from_module(net, torch.nn.functional.cross_entropy)
x, y = torch.randn(5, 50, 100, requires_grad=True), torch.arange(250).reshape(5, 50) % 10
def run(steps):
    theta = rd.unroll(loss, params, (x, y), rd.SGD(0.01), steps=steps, adjoint=eval(sys.argv[1]))
    torch.stack([p.sum() for p in theta.values()]).sum().backward()
def peak():  # not getrusage: its peak includes that of the process this one was forked from
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
run(50)
print("torch._inductor" in sys.modules)
before = peak()
run(250)
print(peak() - before)
"""
FLAT, LINEAR = "rd.Reversible(graph_bytes=0)", "rd.StoreAll()"


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[str, int]]:
    """Whether the first unroll imported the compiler, and the bytes from the peak of 50 steps to that of 250."""
    found = {}
    for adjoint in (FLAT, LINEAR):
        done = subprocess.run([sys.executable, "-c", _PEAK, adjoint], capture_output=True, text=True, check=True)
        imported, growth = done.stdout.split()
        found[adjoint] = imported, int(growth)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_flat_in_the_number_of_steps(measured: dict[str, tuple[str, int]]) -> None:
    """Each in a fresh process. 33,310 parameters: 200 steps more may cost a spilled word and what the allocator rounds
    up.
    """
    assert measured[FLAT][1] < 4 * 2**20
    assert measured[LINEAR][1] > 0.8 * 200 * 4 * 33_310


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the process reads /proc")
def test_the_first_unroll_does_not_import_the_compiler(measured: dict[str, tuple[str, int]]) -> None:
    """Regression: torch.use_deterministic_algorithms imports it, two seconds that nobody asked for."""
    assert [imported for imported, _ in measured.values()] == ["False"] * 2


def test_the_nodes_of_a_graph_count_too() -> None:
    """Regression: on tiny networks they are a third of a graph, and 256 MiB of graphs took 370."""

    def nbytes(links: int) -> int:
        def loss(p: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
            w = p["w"]
            for _ in range(links):
                w = w.view(3)  # keeps no numbers
            return (w - batch[0]).pow(3).sum()

        layout = Layout(("w",), (torch.Size([3]),), torch.float64, torch.device("cpu"))
        batches = Data((torch.zeros(1, 3, dtype=torch.float64),), None)
        determinism = Determinism.capture(layout.device, 0)
        gradient = Gradient(loss, layout, batches, determinism, 1)
        with determinism.passage():
            return gradient.linearize(0, torch.ones(3, dtype=torch.float64)).nbytes

    assert nbytes(200) - nbytes(0) >= 200 * 500
