"""compile=True never changes exactness: the same bits for integers, checked values for floats, eager where it fails."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import shutil
import time
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from revdistill.engine.integers.compiled import Compiled
from revdistill.engine.integers.passes import Passes
from revdistill.engine.integers.radix import COARSE, FINE, WIDE, Radix
from revdistill.engine.loss import compiled, timing
from revdistill.engine.loss.timing import best_times

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler"
)
# The compiler's own imports and sub-processes warn; only ours matter here.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.filterwarnings("error::revdistill.CompileWarning")]


@pytest.fixture(autouse=True)
def compiled_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine is doing: these networks are so small that either form may be."""
    monkeypatch.setattr(compiled, "best_times", lambda first, second: (1.0, 2.0))


def problem() -> tuple[Any, dict[str, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    loss, params = rd.from_module(net, nn.functional.cross_entropy)
    return loss, params, (torch.randn(4, 6, 5, requires_grad=True), torch.arange(24).reshape(4, 6) % 3)


def hypergradient(
    loss: Any, params: dict[str, Tensor], batches: tuple[Tensor, ...], **kwargs: Any
) -> tuple[Tensor, ...]:
    lr = torch.full((20,), 0.1, requires_grad=True)
    theta = rd.unroll(loss, params, batches, rd.SGD(lr, 0.9), steps=20, **kwargs)
    outer = torch.stack([p.square().sum() for p in theta.values()]).sum()
    return torch.autograd.grad(outer, [batches[0], lr, *params.values()])


@pytest.mark.slow
@needs_compiler
def test_compiled_hypergradient_is_eagers() -> None:
    loss, params, batches = problem()
    eager = hypergradient(loss, params, batches)
    for _ in range(2):  # the second time without comparing
        for mine, theirs in zip(hypergradient(loss, params, batches, compile=True), eager, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def operands(n: int, draw: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """([v, theta, moment], [their heads]), anywhere in the range: one word for COARSE and FINE, two for WIDE."""
    v, theta, high = (torch.randint(-(2**60), 2**60, (1001,), generator=draw) for _ in range(3))
    moment = torch.stack([high, torch.randint(0, 2**60, (1001,), generator=draw)])
    widths = (16, 30, 30)
    heads = [torch.randint(0, min(n % 2**bits << 52 - bits, 2**52), (1001,), generator=draw) for bits in widths]
    return [v, theta, moment], heads


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("n", [1, 49, 58982, 65535])
def test_compiled_integers_have_eagers_bits(n: int) -> None:
    draw = torch.Generator().manual_seed(0)
    compiled = Compiled()
    numbers, heads = operands(n, draw)
    g, before = torch.randn(1001, generator=draw), [t.clone() for t in (*numbers, *heads)]
    mine, theirs = ([t.clone() for t in before] for _ in range(2))
    for backend, own in ((compiled, mine), (Passes(), theirs)):
        for v, head, radix in zip(own[:3], own[3:], (COARSE, FINE, WIDE), strict=True):
            backend.multiply(v, head, n, radix)
        backend.add(own[0], g, 2.0**44 * 0.37, 1)
        backend.add(own[2], g, 2.0**94 * 0.37, 1)
        backend.add(own[1], own[0], 0.01, 1)
        backend.settle()
    assert all(map(torch.equal, mine, theirs))
    compiled.add(mine[1], mine[0], 0.01, -1)
    compiled.add(mine[2], g, 2.0**94 * 0.37, -1)
    compiled.add(mine[0], g, 2.0**44 * 0.37, -1)
    for v, head, radix in zip(mine[2::-1], mine[:2:-1], (WIDE, FINE, COARSE), strict=True):
        compiled.divide(v, head, n, radix)
    compiled.settle()
    assert all(map(torch.equal, mine, before))
    assert compiled.compiled is not None


def _fake_compile(change: Any) -> Any:
    return lambda function, **_: lambda *args: change(function, *args)


def test_what_does_not_compile_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, params, batches = problem()
    eager = hypergradient(loss, params, batches)

    def fails(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", _fake_compile(fails))
    with pytest.warns(rd.CompileWarning, match="could not be compiled.*no compiler here"):
        found = hypergradient(loss, params, batches, compile=True)
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


def test_wrong_values_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.13 did with a LeNet: a compiled gradient that is far off, with no error."""
    loss, params, batches = problem()
    eager = hypergradient(loss, params, batches)

    def wrong(function: Any, *args: Any) -> Any:
        found = function(*args)
        return (found[0] * 1.5, found[1])

    monkeypatch.setattr(torch, "compile", _fake_compile(wrong))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = hypergradient(loss, params, batches, compile=True)
    messages = [str(w.message) for w in caught if issubclass(w.category, rd.CompileWarning)]
    assert any("compiled gradient differs from eager" in m for m in messages)
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


def test_integers_with_one_wrong_bit_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(function: Any, operations: Any) -> None:
        function(operations)
        operations[-1].target.bitwise_xor_(1)

    monkeypatch.setattr(torch, "compile", _fake_compile(wrong))
    compiled, eager = Compiled(), Passes()
    for _ in range(2):
        mine, theirs = torch.arange(5), torch.arange(5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compiled.add(mine, torch.ones(5), 3.0, 1)
            compiled.settle()
        eager.add(theirs, torch.ones(5), 3.0, 1)
        assert torch.equal(mine, theirs)
        messages = [str(w.message) for w in caught]
        assert messages == [] or "other bits than eager" in messages[0]
        assert compiled.compiled is None


@pytest.mark.parametrize("radix", [COARSE, FINE, WIDE], ids=["coarse", "fine", "wide"])
@pytest.mark.parametrize("direction", ["multiply", "divide"])
def test_a_wrong_decay_is_dropped_where_slots_and_heads_are_still_zero(
    monkeypatch: pytest.MonkeyPatch, radix: Radix, direction: str
) -> None:
    """Regression: the one comparison was that of step 0, where every decay of 0 is 0."""

    def wrong(function: Any, operations: Any) -> None:
        function(operations)
        for o in operations:
            if hasattr(o, "head"):
                o.head.copy_(torch.where(o.head > 1000, o.head ^ 1, o.head))

    monkeypatch.setattr(torch, "compile", _fake_compile(wrong))
    slot = torch.zeros(5, dtype=torch.int64) if radix is not WIDE else torch.zeros(2, 5, dtype=torch.int64)
    head, compiled = torch.zeros(5, dtype=torch.int64), Compiled()
    state = torch.get_rng_state()
    getattr(compiled, direction)(slot, head, radix.quantise(0.9), radix)
    compiled.add(slot, torch.zeros(5), 1.0, 1)
    with pytest.warns(rd.CompileWarning, match="other bits than eager"):
        compiled.settle()
    assert compiled.compiled is None
    assert not slot.any()  # what it was compared on is gone
    assert not head.any()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_compilers_advice_to_use_tf32_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor warns where TensorFloat-32 is off on a GPU that has it: an error, where a user makes errors of
    warnings.
    """
    loss, params, batches = problem()
    eager = hypergradient(loss, params, batches)

    def advise(function: Any, *args: Any) -> Any:
        warnings.warn(
            "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled.", stacklevel=2
        )
        return function(*args)

    first: set[int] = set()

    def once(function: Any, *args: Any) -> Any:
        seen, _ = id(function) in first, first.add(id(function))
        return function(*args) if seen else advise(function, *args)

    monkeypatch.setattr(torch, "compile", _fake_compile(once))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hypergradient(loss, params, batches, compile=True)
        compiled = Compiled()
        compiled.add(torch.arange(5), torch.ones(5), 3.0, 1)
        compiled.settle()
    assert compiled.compiled is not None
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


@pytest.mark.parametrize("adjoint", [rd.Reversible(), rd.Checkpoint(), rd.StoreAll()], ids=repr)
def test_a_product_whose_gradient_has_other_bits_does_not_feed_the_reversal(
    monkeypatch: pytest.MonkeyPatch, adjoint: Any
) -> None:
    """As torch 2.13 does with an MLP: the same bits on the first use, and other bits at one step of a hundred."""
    loss, params, batches = problem()
    eager = hypergradient(loss, params, batches, adjoint=adjoint)
    products = itertools.count()
    separate = []

    def nearly(function: Any, *args: Any) -> Any:
        if len(args) == 3:
            separate.append(1)
        found = function(*args)
        if len(args) == 4 and next(products) % 5 == 1:  # the product, which returns a gradient too
            return found[0] * (1 + 1e-6), found[1]
        return found

    monkeypatch.setattr(torch, "compile", _fake_compile(nearly))
    found = hypergradient(loss, params, batches, compile=True, adjoint=adjoint)  # no ReversalError
    for mine, theirs in zip(found, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    again = 20 if isinstance(adjoint, rd.Checkpoint) else 0
    assert (
        len(separate) == 1 + 20 + again + 4
    )  # the check, the steps forward, and only where the product's had other bits


# Which form is kept


class Calls:
    """A stand-in for torch.compile, that counts the calls of what it compiled by their number of arguments."""

    def __init__(self, slow: set[int], **scales: float) -> None:
        self.slow, self.scale, self.counts = slow, scales.get("scale", 1.0), {3: 0, 4: 0}

    def __call__(self, function: Any, **_: Any) -> Any:
        """The function, a gradient (3 arguments) or a product (4); 20 ms slower where it is to be slow."""

        def call(*args: Any) -> Any:
            self.counts[len(args)] += 1
            if len(args) in self.slow:
                time.sleep(0.02)
            found = function(*args)
            return found[0] * self.scale, found[1]

        return call


GRADIENT, PRODUCT = 3, 4


def slow_unless_compiled(loss: Any) -> Any:
    """A loss that takes 20 ms, but where torch.func differentiates it, as compiled functions do."""

    def wrapped(params: dict[str, Tensor], pair: tuple[Tensor, ...]) -> Tensor:
        if not torch._C._functorch.is_gradtrackingtensor(next(iter(params.values()))):
            time.sleep(0.02)
        return loss(params, pair)

    return wrapped


def unrolled(loss: Any, params: Any, batches: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # to be slower is no reason to warn
        return hypergradient(loss, params, batches, compile=True, **kwargs)


@pytest.mark.parametrize("adjoint", [rd.Reversible(), rd.Checkpoint(), rd.StoreAll()], ids=repr)
def test_a_slow_compiled_gradient_is_dropped(monkeypatch: pytest.MonkeyPatch, adjoint: Any) -> None:
    loss, params, batches = problem()
    eager = hypergradient(loss, params, batches, adjoint=adjoint)
    fake = Calls(slow={GRADIENT, PRODUCT}, scale=1 + 1e-6)  # other bits, within the tolerance
    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(compiled, "best_times", best_times)
    assert all(map(torch.equal, unrolled(loss, params, batches, adjoint=adjoint), eager))
    compared = fake.counts[GRADIENT]
    assert compared < 10  # the values, and the time
    assert all(map(torch.equal, unrolled(loss, params, batches, adjoint=adjoint), eager))
    assert fake.counts == {GRADIENT: compared, PRODUCT: 0}


def test_a_fast_compiled_form_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, params, batches = problem()
    loss = slow_unless_compiled(loss)
    eager = hypergradient(loss, params, batches)
    fake = Calls(slow=set())
    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(compiled, "best_times", best_times)
    unrolled(loss, params, batches)
    compared = dict(fake.counts)
    for mine, theirs in zip(unrolled(loss, params, batches), eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert fake.counts[PRODUCT] == compared[PRODUCT] + 20
    assert compared[GRADIENT] + 20 <= fake.counts[GRADIENT] <= compared[GRADIENT] + 40


@pytest.mark.parametrize("adjoint", [rd.Reversible(), rd.Checkpoint(), rd.StoreAll()], ids=repr)
def test_one_unroll_has_one_gradient_function(monkeypatch: pytest.MonkeyPatch, adjoint: Any) -> None:
    """A product that is dropped on the way back takes the gradient with it, from the next unroll on: in this one the
    way back needs the forward pass's bits.
    """
    loss, params, batches = problem()
    eager = hypergradient(loss, params, batches, adjoint=adjoint)
    fake = Calls(slow={PRODUCT}, scale=1 + 1e-6)  # with eager's gradient the way back would not end at the start
    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(
        compiled, "best_times", lambda first, second: (1.0, 1.5) if not fake.counts[PRODUCT] else (3.0, 2.0)
    )
    for mine, theirs in zip(unrolled(loss, params, batches, adjoint=adjoint), eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert fake.counts[GRADIENT] >= 40  # both ways
    counted = dict(fake.counts)
    assert all(map(torch.equal, unrolled(loss, params, batches, adjoint=adjoint), eager))
    assert fake.counts == counted


def test_a_much_faster_gradient_stays_without_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, params, batches = problem()
    fake = Calls(slow=set())
    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(
        compiled, "best_times", lambda first, second: (1.0, 3.0) if not fake.counts[PRODUCT] else (3.0, 2.0)
    )
    for _ in range(2):
        before = fake.counts[GRADIENT]
        unrolled(loss, params, batches)
        assert fake.counts[GRADIENT] >= before + 40
    assert fake.counts[PRODUCT] == 1  # the comparison of the values


def test_an_unroll_keeps_its_gradient_while_another_unroll_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that gives batches lets other unrolls of the same loss in, before this one has compared."""
    loss, params, (x, y) = problem()
    fake = Calls(slow={GRADIENT}, scale=1 + 1e-6)
    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(compiled, "best_times", best_times)
    entered: list[int] = []

    def batch(k: int) -> tuple[Tensor, Tensor]:
        if not entered:
            entered.append(k)
            rd.unroll(loss, params, batch, rd.SGD(0.1), steps=2, compile=True)
        return x.detach()[k % 4], y[k % 4]

    theta = rd.unroll(loss, params, batch, rd.SGD(0.1), steps=5, compile=True)
    torch.stack([p.square().sum() for p in theta.values()]).sum().backward()


def test_the_function_that_gives_batches_is_not_called_for_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, params, (x, y) = problem()
    monkeypatch.setattr(torch, "compile", Calls(slow={GRADIENT}))
    monkeypatch.setattr(compiled, "best_times", best_times)
    asked: list[int] = []
    rd.unroll(
        loss,
        params,
        lambda k: asked.append(k) or (x.detach()[k % 4], y[k % 4]),
        rd.SGD(0.1),
        steps=5,
        compile=True,
    )
    assert asked == list(range(5))


def test_long_calls_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    first, second = (lambda name=name: calls.append(name) or torch.zeros(()) for name in "ab")
    best_times(first, second)
    assert calls == ["a", "b"] * (1 + timing.REPETITIONS)
    calls.clear()
    monkeypatch.setattr(timing, "ENOUGH", 0.0)
    best_times(first, second)
    assert calls == ["a", "b"] * 2


def test_a_module_that_counts_its_calls_is_called_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: comparing and timing both forms moved the counter; another training, in silence."""

    class WarmUp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(5, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            result: Tensor = self.layer(x) * (2 if self.calls > 5 else 1)
            return result

    monkeypatch.setattr(torch, "compile", lambda function: function)
    _, _, batches = problem()
    net = WarmUp()
    expected, found = copy.deepcopy(net), copy.deepcopy(net)
    plain = rd.unroll(*rd.from_module(expected, nn.functional.cross_entropy), batches, rd.SGD(0.1), steps=8)
    with pytest.warns(rd.CompileWarning, match="the module changes the attribute 'calls' when it is called"):
        theta = rd.unroll(
            *rd.from_module(found, nn.functional.cross_entropy), batches, rd.SGD(0.1), steps=8, compile=True
        )
    assert found.calls == expected.calls == 8
    assert all(torch.equal(theta[name], p) for name, p in plain.items())


def test_a_loss_that_does_not_repeat_itself_is_told_from_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, params, batches = problem()
    draw = random.Random(0)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    with pytest.raises(rd.UnsupportedError, match=r"does not repeat itself.*compile=False"):
        rd.unroll(lambda p, b: loss(p, b) * (1 + draw.random()), params, batches, rd.SGD(0.1), steps=2, compile=True)


def test_the_cache_keeps_no_data_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: it held the first unroll's batches and hyper, and by a function's closure its own key."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    loss, params, (x, y) = problem()
    rows, scale = x.detach().clone(), torch.ones((), requires_grad=True)
    kept = [weakref.ref(rows), weakref.ref(scale)]
    rd.unroll(lambda p, b, h: loss(p, b) * h, params, (rows, y), rd.SGD(0.1), steps=2, hyper=scale, compile=True)
    del rows, scale
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


@pytest.mark.parametrize("kind", ["bound method", "without weak references"])
def test_losses_that_die_or_cannot_be_referred_to_weakly(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a bound method, equal to one that had died, ended in a bare AssertionError."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    loss, params, (x, y) = problem()

    class Slotted:
        __slots__ = ()

        def __call__(self, p: Any, batch: Any) -> Tensor:
            return loss(p, batch)

        def method(self, p: Any, batch: Any) -> Tensor:
            return loss(p, batch)

    owner = Slotted() if kind != "bound method" else type("Owner", (Slotted,), {})()
    for _ in range(3):
        given = owner.method if kind == "bound method" else owner
        theta = rd.unroll(given, params, (x, y), rd.SGD(0.1), steps=3, compile=True)
        del given
        torch.stack([p.square().sum() for p in theta.values()]).sum().backward()


def test_what_was_dropped_is_not_evaluated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: an unroll that begins again, for a parameter without a gradient, did so in its second unroll."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(compiled, "best_times", lambda first, second: (2.0, 1.0))
    calls = []

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        calls.append(1)
        return p["used"].square().sum()

    params = {name: torch.ones(2, requires_grad=True) for name in ("used", "unused")}
    for _ in range(2):
        calls.clear()
        optimizer = rd.SGD(0.1, weight_decay=0.1)
        rd.unroll(loss, params, lambda k: (), optimizer, steps=4, compile=True)
    assert len(calls) == 4


def test_each_unroll_goes_back_with_the_buffers_of_its_own_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: with those of the unroll that began last, and so with a ReversalError."""
    within: list[bool] = []

    def fake(function: Any) -> Any:
        def run(*args: Any) -> Any:
            within.append(True)
            try:
                return function(*args)
            finally:
                within.pop()

        return run

    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: bool(within))
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).eval()
    loss, params = rd.from_module(net, nn.functional.cross_entropy)
    _, _, batches = problem()
    first = rd.unroll(loss, params, batches, rd.SGD(0.1), steps=3, compile=True)
    with torch.no_grad():
        net[1].running_mean.add_(1.0)  # type: ignore[union-attr, operator]
    rd.unroll(loss, params, batches, rd.SGD(0.1), steps=3, compile=True)
    torch.stack([p.square().sum() for p in first.values()]).sum().backward()
