"""What an unroll costs on a device that is no CPU: launches, waits, memory; and that it never waits for
another thread.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd
from revdistill.engine.integers.history import HostHistory
from revdistill.engine.loss import compiled
from tests import standin
from tests.engine.devices import least_quartics, mlp
from tests.engine.small import total

pytestmark = pytest.mark.standin

EVALUATED_AGAIN = rd.Reversible(graph_bytes=0)  # each gradient once more on the way back, as in a long unroll
PATIENCE = 60  # seconds, before a test counts as hanging


def cost(
    counts: standin.Counts, optimizer: Callable[[Tensor], Any], steps: int, **kwargs: Any
) -> tuple[standin.Counts, standin.Counts]:
    """Of one unroll of an MLP of two layers, forward and back."""
    case = mlp(torch.float32, True)
    lr = torch.full((steps,), 0.01, dtype=torch.float64, requires_grad=True)
    counts.clear()
    outer = total(rd.unroll(case.loss, case.params, case.batches, optimizer(lr), steps=steps, seed=1, **kwargs))
    forward = counts.copy()
    counts.clear()
    torch.autograd.grad(outer, [case.batches[0], lr])
    return forward, counts.copy()


def per_step(counts: standin.Counts, optimizer: Callable[[Tensor], Any], **kwargs: Any) -> list[tuple[float, float]]:
    """(operators, waits) forward, and back: per step of 64, without what is done once."""
    kwargs.setdefault("adjoint", EVALUATED_AGAIN)
    few, many = (cost(counts, optimizer, steps, **kwargs) for steps in (32, 96))
    return [
        ((long.operators.total() - short.operators.total()) / 64, (long.waits.total() - short.waits.total()) / 64)
        for short, long in zip(few, many, strict=True)
    ]


OPTIMIZERS: dict[str, Callable[[Tensor], Any]] = {"sgd": lambda lr: rd.SGD(lr, 0.9), "adam": rd.Adam}
# Per step forward and back, the gradient's and the product's own among them. On a GPU each is a launch, and small
# networks take as long as there are launches: these are to fall, and not to rise unseen.
OPERATORS = {"sgd": (57, 109), "adam": (150, 237)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_operators_and_waits_per_step(counts: standin.Counts, name: str) -> None:
    (forward, waits), (back, waits_back) = per_step(counts, OPTIMIZERS[name])
    print(
        f"{name}: {forward:.1f} operators per step forward, {back:.1f} back; {32 * waits:g} and {32 * waits_back:g} "
        "waits per 32"
    )
    assert forward <= OPERATORS[name][0]
    assert back <= OPERATORS[name][1]
    assert (32 * waits, 32 * waits_back) == (1, 1)


@pytest.mark.parametrize(
    "adjoint",
    [rd.Reversible(), rd.Reversible(history="host", graph_bytes=0), rd.Reversible(graph_bytes=2**20), rd.StoreAll()],
    ids=repr,
)
def test_other_adjoints_wait_as_seldom(counts: standin.Counts, adjoint: Any) -> None:
    assert [32 * waits for _, waits in per_step(counts, OPTIMIZERS["sgd"], adjoint=adjoint)] == [1, 1]


def test_groups_and_schedules_wait_as_seldom(counts: standin.Counts) -> None:
    def optimizer(lr: Tensor) -> Any:
        momentum = torch.linspace(0.4, 0.9, len(lr), dtype=torch.float64).requires_grad_()
        names = mlp(torch.float32, False).params
        return rd.SGD(
            {n: lr if i % 2 else 0.01 for i, n in enumerate(names)},
            {n: momentum if i % 2 else 0.9 for i, n in enumerate(names)},
        )

    assert [32 * waits for _, waits in per_step(counts, optimizer)] == [1, 1]


def test_checkpoint_waits_for_each_stretch(counts: standin.Counts) -> None:
    """Two checks of gradients and one of theta, forward none."""
    forward, back = (long.waits.total() - short.waits.total() for short, long in zip(*stretches(counts), strict=True))
    assert forward == 64 / 32
    assert back == 64 / 32 + 3 * 64 / 16


def stretches(counts: standin.Counts) -> list[tuple[standin.Counts, standin.Counts]]:
    return [cost(counts, OPTIMIZERS["sgd"], steps, adjoint=rd.Checkpoint(every=16)) for steps in (32, 96)]


def test_nothing_is_kept_for_each_step(counts: standin.Counts) -> None:
    """Regression: comparisons of fingerprints were kept one by one until the end, 18 kB a step."""
    case = least_quartics(torch.float32, True)
    alive: dict[int, int] = {}

    def on_step_back(k: int, norm: float) -> None:
        if k % 96 == 40:  # between two looks at the device
            gc.collect()
            alive[k] = sum(type(o) is standin.OnDevice for o in gc.get_objects())

    for _ in range(3):  # what earlier tests left: a loss that dies lets go of a program, which the next one finds
        gc.collect()
    theta = rd.unroll(
        case.loss,
        case.params,
        case.batches,
        rd.SGD(1e-3, 0.9),
        steps=300,
        adjoint=EVALUATED_AGAIN,
        on_step_back=on_step_back,
    )
    torch.autograd.grad(theta["w"].sum(), case.batches[0])
    spilled = 300 // 100
    assert len(alive) == 3
    assert max(alive.values()) - min(alive.values()) <= spilled + 2


def test_host_memory_is_taken_for_several_spills_at_once(
    counts: standin.Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: each spill pinned memory of its own."""
    history = HostHistory(standin.device())
    words = [torch.randint(-(2**15), 2**15, (size,), dtype=torch.int16) for size in [1001, 3] * 40]
    blocks = set()
    for w in words:
        history.push(standin.put(w))
        blocks.add(len(history._blocks))
    assert history.nbytes == sum(w.nbytes for w in words)
    assert max(blocks) <= len(words) / 5  # two sizes in turns: a block is full after 4 or 8 pushes of its own
    whole = torch.arange(70, dtype=torch.int64)  # what momentum 0 loses: other words than the others
    history.push(standin.put(whole))
    assert torch.equal(standin.take(history.pop()), whole)
    for w in reversed(words[40:]):
        assert torch.equal(standin.take(history.pop()), w)
    history.push(standin.put(whole))  # and on again from there
    assert torch.equal(standin.take(history.pop()), whole)
    for w in reversed(words[:40]):
        assert torch.equal(standin.take(history.pop()), w)
    assert len(history._blocks) == 1
    assert history.nbytes == 0
    with pytest.raises(LookupError):
        history.pop()


# Threads


def within_patience(*jobs: Callable[[], object]) -> None:
    """Run them at once; a failure rather than a hanging test."""
    errors: list[BaseException] = []

    def run(job: Callable[[], object]) -> None:
        try:
            with standin.running():
                job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for another that waits for it"
    if errors:
        raise errors[0]


def test_a_thread_on_its_way_forward_does_not_wait_for_one_on_its_way_back(counts: standin.Counts) -> None:
    """Regression: a way back runs on autograd's one thread of the device, and waited there for its turn; the thread
    whose turn it was waited for that one to evaluate its gradient.
    """
    mine, theirs = mlp(torch.float32, True), mlp(torch.float32, True)
    outer = total(rd.unroll(theirs.loss, theirs.params, theirs.batches, rd.SGD(0.1), steps=5))
    inside = threading.Event()

    def slowly(p: dict[str, Tensor], batch: Any) -> Tensor:
        inside.set()
        threading.Event().wait(0.3)  # the other one is waiting for its turn by now
        return mine.loss(p, batch)

    def forward() -> None:
        with torch.no_grad():
            rd.unroll(slowly, mine.params, mine.batches, rd.SGD(0.1), steps=3)

    def back() -> None:
        assert inside.wait(PATIENCE)
        torch.autograd.grad(outer, theirs.batches[0])

    within_patience(forward, back)


def test_a_loss_may_hold_an_unroll(counts: standin.Counts) -> None:
    """Its way back is for the thread whose turn it is."""
    case = mlp(torch.float32, True)
    batches = tuple(t.detach() for t in case.batches)

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        inner = rd.unroll(case.loss, p, batches, rd.SGD(0.01), steps=2, adjoint=rd.Backprop())
        probe = {name: t.detach().requires_grad_() for name, t in p.items()}
        ahead = total(rd.unroll(case.loss, probe, batches, rd.SGD(0.01), steps=2))
        torch.autograd.grad(ahead, list(probe.values()))
        return case.loss(inner, batch)

    within_patience(lambda: rd.unroll(loss, case.params, case.batches, rd.SGD(0.1), steps=2))


def test_callbacks_see_autograd_as_the_caller_has_it(counts: standin.Counts) -> None:
    case, seen = mlp(torch.float32, True), []

    def see(where: str) -> None:
        seen.append((where, torch._C._is_multithreading_enabled()))  # type: ignore[attr-defined]

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        see("loss")
        return case.loss(p, batch)

    for mode in (True, False):
        seen.clear()
        with torch.autograd.set_multithreading_enabled(mode):
            rd.unroll(loss, case.params, case.batches, rd.SGD(0.1), steps=1, on_step=lambda *_: see("on_step"))
            see("after")
        assert seen == [("loss", False), ("on_step", mode), ("after", mode)]


# torch.compile


@pytest.mark.parametrize("times", [(1.0, 2.0), (2.0, 1.0)], ids=["compiled", "eager"])
def test_compiled_parts_do_not_wait_at_each_step(
    counts: standin.Counts, monkeypatch: pytest.MonkeyPatch, times: tuple[float, float]
) -> None:
    """Regression: the product's own gradient was compared with the forward pass's, and the answer waited for, at each
    step back; and whether a compiled gradient is 0 was read for each step by itself.
    """
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compiled, "best_times", lambda first, second: times)  # the form kept, whatever the machine does
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = per_step(counts, OPTIMIZERS["sgd"], compile=True)
    # Compiled, one more forward: which gradients are 0.
    assert [32 * waits for _, waits in found] == [2 if times == (1.0, 2.0) else 1, 1]
