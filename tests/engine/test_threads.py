"""Unrolls in several threads, processes and other surroundings: each as if it were alone, and torch's settings as they
were.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import revdistill as rd
from tests.engine.small import CE, data, mlp, total

PATIENCE = 120  # seconds, before a test counts as hanging


def settings() -> tuple[Any, ...]:
    """What torch keeps for the whole process and an unroll changes."""
    return (
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
    )


def dropout_problem(seed: int) -> tuple[Callable[..., Tensor], dict[str, Tensor], tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))
    loss, params = rd.from_module(net, CE)
    with torch.no_grad():
        for p in params.values():
            p.copy_(torch.randn(p.shape, generator=draw))
    x = torch.randn(4, 6, 5, generator=draw).requires_grad_()
    return loss, params, (x, torch.arange(24).reshape(4, 6) % 3)


def hypergradient(seed: int, adjoint: Any) -> Tensor:
    return of_problem(dropout_problem(seed), seed, adjoint)


def of_problem(problem: Any, seed: int, adjoint: Any) -> Tensor:
    loss, params, batches = problem
    theta = rd.unroll(loss, params, batches, rd.SGD(0.1), steps=25, adjoint=adjoint, seed=seed)
    return torch.autograd.grad(total(theta), batches[0])[0]


ADJOINTS = [rd.Reversible(graph_bytes=0), rd.Reversible(), rd.Checkpoint(), rd.StoreAll(), rd.Backprop()]


def test_unrolls_in_threads_are_as_if_alone() -> None:
    """Random losses, so that one thread's random numbers reaching another would show; twice each, switching threads
    often.
    """
    jobs = [(dropout_problem(seed), seed, adjoint) for seed in range(4) for adjoint in ADJOINTS] * 2
    expected = [of_problem(*job) for job in jobs]
    before, state, interval = settings(), torch.get_rng_state(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = [future.result(PATIENCE) for future in [pool.submit(of_problem, *job) for job in jobs]]
    finally:
        sys.setswitchinterval(interval)
    assert all(map(torch.equal, found, expected))
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("adjoint", [rd.Reversible(graph_bytes=0), rd.Checkpoint(), rd.StoreAll()], ids=repr)
def test_a_thread_that_draws_random_numbers_meanwhile_is_caught(adjoint: Any) -> None:
    """torch has one generator for all threads: what a thread in no unroll draws may fall into a loss, but where that is
    evaluated twice never unseen. (Where it is evaluated once, the hypergradient is that of the numbers drawn.)
    """
    problem, stop = dropout_problem(0), threading.Event()
    expected = of_problem(problem, 0, adjoint)

    def draw() -> None:
        while not stop.is_set():
            torch.rand(1)

    drawing, interval = threading.Thread(target=draw), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    drawing.start()
    try:
        for _ in range(10):
            with suppress(rd.ReversalError):
                assert torch.equal(of_problem(problem, 0, adjoint), expected)
    finally:
        stop.set()
        drawing.join(PATIENCE)
        sys.setswitchinterval(interval)


def test_threads_that_call_back_may_leave_in_any_order() -> None:
    """Callbacks let other threads in: here each waits in its third until the other is in its own."""
    barrier = threading.Barrier(2, timeout=PATIENCE)
    before = settings()

    # Made before the threads start: a network draws its parameters from torch's one generator, and so from the losses'
    # own.
    problems = [dropout_problem(seed) for seed in range(2)]

    def one(seed: int) -> Tensor:
        loss, params, batches = problems[seed]
        seen = []

        def on_step(k: int, theta: dict[str, Tensor], value: Tensor) -> None:
            seen.append(settings())
            if k == 2:
                barrier.wait()

        def batch(k: int) -> tuple[Tensor, ...]:
            return tuple(t.detach()[k % 4] for t in batches)

        steps = 5 + 20 * seed  # one leaves long before the other
        theta = rd.unroll(loss, params, batch, rd.SGD(0.1), steps=steps, on_step=on_step, seed=seed)
        assert len(seen) == steps
        return torch.autograd.grad(total(theta), params["0.weight"])[0]

    with ThreadPoolExecutor(2) as pool:
        found = [future.result(PATIENCE) for future in [pool.submit(one, seed) for seed in range(2)]]
    barrier = threading.Barrier(1)
    assert all(map(torch.equal, found, [one(seed) for seed in range(2)]))
    assert settings() == before


def test_a_callback_may_wait_for_another_threads_unroll() -> None:
    loss, params, batches = dropout_problem(0)
    inside: list[Tensor] = []
    with ThreadPoolExecutor(1) as pool:

        def on_step(k: int, theta: dict[str, Tensor], value: Tensor) -> None:
            inside.append(pool.submit(hypergradient, k, rd.Reversible()).result(PATIENCE))

        theta = rd.unroll(loss, params, batches, rd.SGD(0.1), steps=3, on_step=on_step, seed=0)
    total(theta).backward()
    assert all(map(torch.equal, inside, [hypergradient(k, rd.Reversible()) for k in range(3)]))


def test_on_step_sees_torch_as_the_caller_left_it() -> None:
    """Regression: deterministic kernels were asked for in the user's own callback too, where not every operator has
    one.
    """
    before, seen = settings(), []
    for adjoint in (rd.Reversible(), rd.Backprop()):
        loss, params, batches = dropout_problem(0)
        rd.unroll(
            loss, params, batches, rd.SGD(0.1), steps=3, on_step=lambda *_: seen.append(settings()), adjoint=adjoint
        )
    assert seen == [before] * 6


def test_an_error_in_a_callback_leaves_everything_as_it_was() -> None:
    before = settings()

    def fail(*_: Any) -> Any:
        raise KeyError("mine")

    loss, params, batches = dropout_problem(0)
    for kwargs in ({"on_step": fail}, {"batches": fail}):
        arguments = {"batches": batches} | kwargs
        with pytest.raises(KeyError, match="mine"):
            rd.unroll(loss, params, arguments.pop("batches"), rd.SGD(0.1), steps=3, **arguments)
        assert settings() == before
    with ThreadPoolExecutor(1) as pool:  # nobody is still having a turn
        pool.submit(hypergradient, 0, rd.Reversible()).result(PATIENCE)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_backward_on_another_thread(adjoint: Any) -> None:
    """autograd itself does so on CUDA."""
    expected = hypergradient(3, adjoint)
    loss, params, batches = dropout_problem(3)
    value = total(rd.unroll(loss, params, batches, rd.SGD(0.1), steps=25, adjoint=adjoint, seed=3))
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: torch.autograd.grad(value, batches[0])[0]).result(PATIENCE)
    assert torch.equal(found, expected)


def test_real_data_from_a_data_loader_with_workers() -> None:
    """The outer loop of a user who has a DataLoader with processes of its own."""
    loss, params = rd.from_module(mlp(), CE)
    x, y = data(5)
    real = TensorDataset(torch.randn(64, 5), torch.arange(64) % 3)
    optimizer, losses = torch.optim.Adam([x], 0.05), []
    for _ in range(4):
        for x_real, y_real in DataLoader(
            real, batch_size=32, shuffle=True, num_workers=2, multiprocessing_context="fork"
        ):
            theta = rd.unroll(loss, params, (x, y), rd.SGD(0.1), steps=12)
            outer = loss(theta, (x_real, y_real))
            optimizer.zero_grad()
            outer.backward()
            optimizer.step()
            losses.append(float(outer.detach()))
    assert len(losses) == 8
    assert losses[-1] < losses[0]


def test_batches_that_a_data_loader_gave() -> None:
    """A shuffled loader gives another order each time it is gone through: its batches are listed first, and given by
    number.
    """
    real = TensorDataset(torch.randn(60, 5), torch.arange(60) % 3)
    listed = list(DataLoader(real, batch_size=10, shuffle=True))
    loss, params = rd.from_module(mlp(), CE)
    lr = torch.full((12,), 0.1, requires_grad=True)
    theta = rd.unroll(loss, params, lambda k: listed[k % len(listed)], rd.SGD(lr), steps=12)
    total(theta).backward()
    assert lr.grad is not None
    assert lr.grad.abs().sum() > 0


def _in_child(result: Any) -> None:
    result.put(hypergradient(1, rd.Reversible()).tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_thread_may_evaluate_a_loss_while_another_unrolls() -> None:
    """Regression: it found the other's tensors in the module, computed with them, and put them back as the module's."""
    torch.manual_seed(0)
    net = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(64, 64), nn.Tanh())], nn.Linear(64, 1)).double()
    loss, params = rd.from_module(net, nn.functional.mse_loss)
    own = list(net.parameters())
    x, y = torch.randn(2, 100, 64, dtype=torch.float64), torch.randn(2, 100, 1, dtype=torch.float64)
    others = {name: 0.1 * torch.randn_like(p) for name, p in params.items()}
    done = threading.Event()

    def unrolled() -> float:
        theta = rd.unroll(loss, params, (x, y), rd.SGD(0.1, 0.9), steps=6, seed=1)
        return sum(t.detach().sum().item() for t in theta.values())

    expected = unrolled(), loss(others, (x[0], y[0])).item()
    found: list[tuple[float | None, float | None]] = []

    def evaluate() -> None:
        while not done.is_set():
            found.append((None, loss(others, (x[0], y[0])).item()))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=evaluate)
        thread.start()
        found += [(unrolled(), None) for _ in range(8)]
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert {a for a, _ in found if a is not None} == {expected[0]}
    assert {b for _, b in found if b is not None} <= {expected[1]}
    assert all(a is b for a, b in zip(own, net.parameters(), strict=True))


def test_a_process_forked_in_the_middle_of_an_unroll_has_its_own_turn() -> None:
    """Regression: the child inherited the lock of a thread that it does not have, and waited for ever."""
    context = multiprocessing.get_context("fork")
    result = context.Queue()
    child = context.Process(target=_in_child, args=(result,))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
    try:
        expected = hypergradient(1, rd.Reversible()).tolist()
        inside, forked = threading.Event(), threading.Event()
        loss, params, batches = dropout_problem(0)

        def waiting(p: dict[str, Tensor], batch: Any) -> Tensor:
            inside.set()
            assert forked.wait(PATIENCE)
            return loss(p, batch)

        busy = threading.Thread(target=lambda: rd.unroll(waiting, params, batches, rd.SGD(0.1), steps=3))
        busy.start()
        assert inside.wait(PATIENCE)
        child.start()
        forked.set()
        found = result.get(timeout=PATIENCE)
        child.join(PATIENCE)
        busy.join(PATIENCE)
    finally:
        torch.set_num_threads(threads)
    assert child.exitcode == 0
    assert found == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("place", ["loss", "on_step", "batches"])
def test_a_child_forked_by_the_users_own_code_goes_on(place: str) -> None:
    """Both processes finish the unroll that they were in."""
    loss, params, batches = dropout_problem(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
    children: list[int] = []

    def fork(where: str) -> None:
        if where == place and not children:
            children.append(os.fork())

    def forking_loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        fork("loss")
        return loss(p, batch)

    def batch(k: int) -> tuple[Tensor, ...]:
        fork("batches")
        return tuple(t.detach()[k % 4] for t in batches)

    try:
        theta = rd.unroll(forking_loss, params, batch, rd.SGD(0.1), steps=3, on_step=lambda *_: fork("on_step"))
        total(theta).backward()
        if not children[0]:
            os._exit(0)
    except BaseException:
        if children and not children[0]:
            os._exit(1)
        raise
    finally:
        torch.set_num_threads(threads)
    _, status = os.waitpid(children[0], 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_no_grad_and_inference_mode() -> None:
    loss, params = rd.from_module(mlp(), CE)
    trained = rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=9)
    with torch.no_grad():
        same = rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=9)
    assert all(torch.equal(trained[name], same[name]) for name in trained)
    assert not any(p.requires_grad for p in same.values())
    outer = total(trained)
    with torch.no_grad():
        outer.backward()
    assert params["0.weight"].grad is not None
    with torch.inference_mode(), pytest.raises(rd.UnsupportedError, match=r"torch\.no_grad\(\)"):
        rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=9)
    with torch.inference_mode():
        made = torch.randn(4, 6, 5)
    with pytest.raises(rd.UnsupportedError, match=r"batches\[0\] was made in torch.inference_mode"):
        rd.unroll(loss, params, (made, data(5)[1]), rd.SGD(0.1), steps=9)


def test_one_unroll_goes_on_from_another() -> None:
    """Nested as functions: the end of one is the start of the next; together they are one long unroll with a restart of
    v.
    """
    loss, params = rd.from_module(mlp().double(), CE)
    x, y = data(5)
    x = x.detach().double().requires_grad_()
    found = []
    for adjoint in (rd.Reversible(), rd.Backprop()):
        first = rd.unroll(loss, params, (x, y), rd.SGD(0.1), steps=7, adjoint=adjoint)
        second = rd.unroll(loss, first, (x, y), rd.SGD(0.05, 0.5), steps=5, adjoint=adjoint)
        found.append(torch.autograd.grad(total(second), [x, *params.values()]))
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)
