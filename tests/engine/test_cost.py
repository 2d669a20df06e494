"""What rd.unroll costs: evaluations per step, what it keeps alive, peak memory, imports."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd
from revdistill.engine.adjoints.trajectory import Trajectory
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


@pytest.mark.parametrize("fitting", [0, 1, 4, 10, 99])
def test_graphs_that_fit_are_not_evaluated_again(monkeypatch: pytest.MonkeyPatch, fitting: int) -> None:
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
    hypergradient(graph_bytes=0)
    assert len(set(sizes)) == 1  # one step's graph is as large as another's
    calls.clear()
    found = hypergradient(graph_bytes=fitting * sizes[0] + sizes[0] // 2)
    assert calls == [*range(10), *reversed(range(10 - min(10, fitting)))]
    assert all(map(torch.equal, found, plain))


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
steps = int(sys.argv[1])
net = torch.nn.Sequential(torch.nn.Linear(100, 300), torch.nn.ReLU(), torch.nn.Linear(300, 10))
loss, params = rd.from_module(net, torch.nn.functional.cross_entropy)
x, y = torch.randn(5, 50, 100, requires_grad=True), torch.arange(250).reshape(5, 50) % 10
def run(steps):
    theta = rd.unroll(loss, params, (x, y), rd.SGD(0.01), steps=steps, adjoint=eval(sys.argv[2]))
    torch.stack([p.sum() for p in theta.values()]).sum().backward()
def peak():  # not getrusage: its peak includes that of the process this one was forked from
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
run(5)
before = peak()
run(steps)
print(peak() - before)
"""


def peak(steps: int, adjoint: str) -> int:
    found = subprocess.run(
        [sys.executable, "-c", _PEAK, str(steps), adjoint], capture_output=True, text=True, check=True
    )
    return int(found.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_flat_in_the_number_of_steps() -> None:
    """Each in a fresh process. 33,310 parameters: 400 steps more may cost two spilled words and what the allocator
    rounds up.
    """
    flat = peak(500, "rd.Reversible(graph_bytes=0)") - peak(100, "rd.Reversible(graph_bytes=0)")
    growing = peak(500, "rd.StoreAll()") - peak(100, "rd.StoreAll()")
    assert flat < 4 * 2**20
    assert growing > 0.8 * 400 * 4 * 33_310


def test_the_first_unroll_does_not_import_the_compiler() -> None:
    """Regression: torch.use_deterministic_algorithms imports it, two seconds that nobody asked for."""
    code = (
        "import sys, torch, revdistill as rd\n"
        "p = {'w': torch.ones(2, requires_grad=True)}\n"
        "rd.unroll(lambda p, b: p['w'].square().sum(), p, lambda k: (), rd.SGD(0.1), steps=2)['w'].sum().backward()\n"
        "print('torch._inductor' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
