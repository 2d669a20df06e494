"""compile="graphs" where replays run nothing of Python and keep no memory alive, as CUDA's graphs: see tests.replaying.

A replayed step is right where it has eager's bits; that eager steps are right is tested elsewhere.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from revdistill.engine.adjoints import lease
from tests.cuda.cases import CPU, Case, case, outer
from tests.replaying import Recorded, replaying

pytestmark = pytest.mark.imitated

T = 20  # step 17 is looked at again, and the last
CE = nn.CrossEntropyLoss()
Found = list[Tensor]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """As they are captured."""
    return replaying(monkeypatch)


@pytest.fixture
def of() -> Case:
    return case("mlp", torch.float32, CPU)


def there_and_back(loss: Any, params: Any, batches: Any, compile: Any, **options: Any) -> Found:
    """The end, and the hypergradients of the rates and of whatever else wants one."""
    lr = torch.full((T,), 0.05, dtype=torch.float64, requires_grad=True)
    theta = rd.unroll(loss, params, batches, rd.SGD(lr, 0.9), steps=T, seed=1, compile=compile, **options)
    return [*(p.detach() for p in theta.values()), *torch.autograd.grad(outer(theta), lr)]


def assert_same(run: Callable[[Any], Found]) -> None:
    """To the bit, a NaN as itself."""
    for found, expected in zip(run("graphs"), run(False), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def replays(graphs: list[Recorded]) -> int:
    return sum(graph.calls for graph in graphs)


@pytest.mark.parametrize("name", ["dropout", "batchnorm", "attention"])
def test_nothing_in_a_step_comes_from_python(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = replaying(monkeypatch, may_read=name == "batchnorm")
    net = case(name, torch.float32, CPU)
    for _ in range(2):
        assert_same(lambda compile: there_and_back(net.loss, net.params, net.batches, compile))
    assert [graph.calls for graph in graphs] == [2 * (T - 2), 2 * (T - 3)]  # captured once


def number(value: float, rows: bool) -> Tensor:
    falling = torch.linspace(value, value * 0.8, T, dtype=torch.float64) if rows else torch.tensor(value).double()
    return falling.requires_grad_()


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (lambda lr, m, w: rd.SGD(lr, m, weight_decay=w, max_norm=w * 10), True),
        (lambda lr, m, w: rd.Adam(lr, (m, 0.99), weight_decay=w), True),
        (lambda lr, m, w: rd.Adam(lr, (m, 0.99), weight_decay=w), False),
        (lambda lr, m, w: rd.AdamW(lr, (m, m), weight_decay=w), True),
        (lambda lr, m, w: rd.RMSprop(lr, alpha=m, momentum=m, weight_decay=w), False),
        (lambda lr, m, w: rd.SGD({"0.weight": lr, "0.bias": w, "2.weight": lr, "2.bias": w}, m), False),
    ],
    ids=["sgd", "adam", "adam of one number", "adamw", "rmsprop", "groups"],
)
def test_every_hyperparameter_wants_a_gradient(make: Any, rows: bool, of: Case, graphs: list[Recorded]) -> None:
    def run(compile: Any) -> Found:
        wanted = [number(0.01, rows), number(0.91, rows), number(0.03, rows)]
        theta = rd.unroll(
            of.loss,
            of.params,
            of.batches,
            make(*wanted),
            steps=T,
            seed=1,
            compile=compile,
            adjoint=rd.Reversible(graph_bytes=0),
        )
        return list(torch.autograd.grad(outer(theta), [*wanted, of.x]))

    assert_same(run)
    assert [graph.calls for graph in graphs] == [T - 2, T - 3]


def test_one_rate_and_a_rate_for_each_step(of: Case, graphs: list[Recorded]) -> None:
    """Of one loss: dL/d(rate) is summed up by the one's kernels, and begins anew at each step by the other's."""

    def run(compile: Any) -> Found:
        found = []
        for lr in (number(0.05, rows=False), number(0.05, rows=True), number(0.05, rows=False)):
            theta = rd.unroll(of.loss, of.params, of.batches, rd.SGD(lr, 0.9), steps=T, seed=1, compile=compile)
            found += torch.autograd.grad(outer(theta), lr)
        return found

    assert_same(run)
    assert replays(graphs) == 3 * (2 * T - 5)


def test_numbers_that_no_move_sees_may_be_of_another_form(of: Case, graphs: list[Recorded]) -> None:
    """A rate for each parameter, of a weight decay that is 0, is two numbers where there was one."""
    names = list(of.params)
    none: dict[str, Any] = dict.fromkeys(names, 0.0)

    def run(compile: Any) -> Found:
        found = []
        for decay in (0.0, none | {names[0]: torch.tensor(0.0)}):
            theta = rd.unroll(
                of.loss, of.params, of.batches, rd.SGD(0.05, 0.9, weight_decay=decay), steps=T, seed=1, compile=compile
            )
            found += [p.detach() for p in theta.values()]
        return found

    assert_same(run)


@pytest.mark.parametrize("until", [12, T])
def test_modules_are_in_the_mode_that_on_step_put_them_into(until: int, of: Case, graphs: list[Recorded]) -> None:
    """Dropout is off from step 7 on, for some steps or for good."""

    def run(compile: Any) -> Found:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.3), nn.Linear(16, 4))
        loss, params = rd.from_module(net, CE)
        return there_and_back(
            loss, params, of.batches, compile, on_step=lambda k, *_: net.train(not 5 < k < until) and None
        )

    assert_same(run)
    assert 0 < replays(graphs) < 2 * T - 5


def test_a_network_in_eval_mode_between_the_ways(of: Case, graphs: list[Recorded]) -> None:
    """The way back of each unroll has the program of its own way forward."""
    net = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.3), nn.Linear(16, 4))
    loss, params = rd.from_module(net, CE)

    def run(compile: Any) -> Found:
        found = []
        for training in (True, False):
            net.train(training)
            lr = of.rates(T)
            theta = rd.unroll(loss, params, of.batches, rd.SGD(lr, 0.9), steps=T, seed=1, compile=compile)
            net.eval()
            found += torch.autograd.grad(outer(theta), lr)
        return found

    for _ in range(2):
        assert_same(run)
    assert [graph.calls for graph in graphs] == [2 * (T - 2), 2 * (T - 3)] * 2


def frozen_rows() -> tuple[Any, dict[str, Tensor], tuple[Tensor, Tensor], Callable[[], object]]:
    """Rows of a frozen table that most steps read change; at those that are looked at they do not."""
    table, rest = nn.Embedding(T, 12), nn.Linear(12, 4)
    table.weight.requires_grad_(False)
    loss, params = rd.from_module(nn.Sequential(table, rest), CE)
    x = torch.arange(T)[:, None].repeat(1, 8)

    def change() -> None:
        rows = table.weight.detach().clone()
        rows[4:16] *= -2
        table.weight = nn.Parameter(rows, requires_grad=False)

    return loss, params, (x, x % 4), change


def class_weights() -> tuple[Any, dict[str, Tensor], tuple[Tensor, Tensor], Callable[[], object]]:
    of, weights = case("mlp", torch.float32, CPU), [torch.ones(4)]

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        return of.loss(params, batch) + (params["2.bias"] * weights[0]).sum()

    return loss, of.params, of.batches, lambda: weights.append(weights.pop() * 1.5)


def a_number() -> tuple[Any, dict[str, Tensor], tuple[Tensor, Tensor], Callable[[], object]]:
    of, scales = case("mlp", torch.float32, CPU), [1.0]
    return (
        lambda params, batch: of.loss(params, batch) * scales[0],
        of.params,
        of.batches,
        lambda: scales.append(scales.pop() * 1.5),
    )


def buffers() -> tuple[Any, dict[str, Tensor], tuple[Tensor, Tensor], Callable[[], object]]:
    of = case("mlp", torch.float32, CPU)
    net = nn.Sequential(nn.Linear(12, 16), norm := nn.BatchNorm1d(16), nn.Linear(16, 4)).eval()
    loss, params = rd.from_module(net, CE)
    assert norm.running_mean is not None
    mean = norm.running_mean
    return loss, params, of.batches, lambda: mean.add_(0.3)


@pytest.mark.parametrize("make", [frozen_rows, class_weights, a_number, buffers], ids=lambda make: str(make.__name__))
def test_what_the_loss_refers_to_is_another_one_in_the_next_unroll(make: Any, graphs: list[Recorded]) -> None:
    """The memory that was there before is given back, and nothing of a graph reads it."""

    def run(compile: Any) -> Found:
        torch.manual_seed(0)
        loss, params, batches, change = make()
        found = []
        for _ in range(3):
            found += there_and_back(loss, params, batches, compile)
            change()
        return found

    assert_same(run)
    assert replays(graphs) == 3 * (2 * T - 5)  # captured anew where that was needed, never refused


def test_hyper_that_on_step_changes(of: Case, graphs: list[Recorded]) -> None:
    def run(compile: Any) -> Found:
        scale, optimizer = torch.ones(()), rd.SGD(0.05, 0.9)
        theta = rd.unroll(
            lambda params, batch, hyper: of.loss(params, batch) * hyper,
            {name: p.detach() for name, p in of.params.items()},
            (of.x.detach(), of.y),
            optimizer,
            steps=T,
            seed=1,
            hyper=scale,
            compile=compile,
            on_step=lambda *_: scale.mul_(0.97),
        )
        return list(theta.values())

    assert_same(run)
    assert replays(graphs) == T - 2


def test_on_step_is_given_the_loss_in_its_own_dtype(of: Case, graphs: list[Recorded]) -> None:
    def run(compile: Any) -> Found:
        losses: Found = []
        there_and_back(
            lambda params, batch: of.loss(params, batch).double() / 3,
            of.params,
            of.batches,
            compile,
            on_step=lambda k, theta, loss: losses.append(loss),
        )
        assert {loss.dtype for loss in losses} == {torch.float64}
        return losses

    assert_same(run)
    assert replays(graphs) == 2 * T - 5


def test_a_hypergradient_that_is_no_number_is_itself(of: Case, graphs: list[Recorded]) -> None:
    """The root's derivative at 0 is infinite, and 0 times that is NaN: dL/dtheta is finite, and nothing is refused."""

    def run(compile: Any) -> Found:
        hyper, lr = torch.zeros((), requires_grad=True), of.rates(T)
        theta = rd.unroll(
            lambda params, batch, hyper: of.loss(params, batch) + (params["2.bias"] * 0).sum() * hyper.sqrt(),
            of.params,
            of.batches,
            rd.SGD(lr, 0.9),
            steps=T,
            seed=1,
            hyper=hyper,
            compile=compile,
        )
        found = list(torch.autograd.grad(outer(theta), [lr, hyper]))
        assert found[1].isnan()
        return found

    assert_same(run)
    assert replays(graphs) == 2 * T - 5


@pytest.mark.parametrize("at", [T - 2, 17, 2])
def test_the_step_where_the_way_back_stops_being_finite_is_named(at: int, of: Case, graphs: list[Recorded]) -> None:
    zeros = torch.ones(T, 1)
    zeros[at] = 0

    def loss(params: dict[str, Tensor], batch: tuple[Tensor]) -> Tensor:
        power = (params["0.bias"] * 0 + batch[0]).pow(1.5).sum()  # of which the second derivative at 0 is infinite
        return of.loss(params, (of.x[0].detach(), of.y[0])) + power * 1e-3

    with pytest.raises(rd.NonFiniteError, match=rf"'0.bias'\] stopped being finite at step {at} ") as found:
        there_and_back(loss, of.params, (zeros,), "graphs")
    assert found.value.step == at
    assert replays(graphs)


def test_what_on_step_changes_of_the_loss_is_refused(of: Case, graphs: list[Recorded]) -> None:
    """Eagerly, without a way back, it would be training; steps made anew would all have what it is at the end."""
    weights, seen = [torch.ones(4)], list[int]()
    params = {name: p.detach() for name, p in of.params.items()}

    def on_step(k: int, *_: object) -> None:
        seen.append(k)
        weights[0] = weights[0] * 1.1

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        return of.loss(params, batch) + (params["2.bias"] * weights[0]).sum()

    def run(compile: Any) -> Found:
        weights[0] = torch.ones(4)
        seen.clear()
        batches = of.x.detach(), of.y
        theta = rd.unroll(loss, params, batches, rd.SGD(0.05), steps=T, seed=1, compile=compile, on_step=on_step)
        return list(theta.values())

    with pytest.raises(rd.UnsupportedError, match="on_step"):
        run("graphs")
    assert_same(run)  # it is remembered, and made eagerly
    assert seen == list(range(T))


def test_a_loss_that_is_another_one_at_some_steps_is_tried_once(of: Case, graphs: list[Recorded]) -> None:
    """The batch's function says which: eager steps hear of it."""
    scale, params = [1.0], {name: p.detach() for name, p in of.params.items()}

    def batch(k: int) -> tuple[Tensor, Tensor]:
        scale[0] = 1.0 if k < 9 else 2.0
        return of.x[k % 5].detach(), of.y[k % 5]

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        return of.loss(params, batch) * scale[0]

    def run(compile: Any) -> Found:
        return list(rd.unroll(loss, params, batch, rd.SGD(0.05), steps=T, seed=1, compile=compile).values())

    with pytest.warns(rd.CompileWarning, match="step 17"):
        assert_same(run)
    before = replays(graphs)
    assert_same(run)
    assert replays(graphs) == before


class Pair(dict[str, Tensor]):
    """Cannot be put together again by its type."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x=x, y=y)


def test_a_batch_of_a_type_of_its_own_is_made_eagerly(of: Case, graphs: list[Recorded]) -> None:
    def loss(params: dict[str, Tensor], batch: Pair) -> Tensor:
        return of.loss(params, (batch["x"], batch["y"]))

    with pytest.warns(rd.CompileWarning, match="Pair"):
        assert_same(
            lambda compile: there_and_back(loss, of.params, lambda k: Pair(of.x[k % 5].detach(), of.y[k % 5]), compile)
        )
    assert not graphs


def test_minus_zero_in_a_batch_is_not_zero(of: Case, graphs: list[Recorded]) -> None:
    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        return of.loss(params, batch[:2]) * (2 + math.copysign(1, batch[2]))

    def batch(k: int) -> Any:
        return of.x[k % 5].detach(), of.y[k % 5], 0.0 if k % 6 else -0.0

    assert_same(lambda compile: there_and_back(loss, of.params, batch, compile))


def test_nothing_of_an_unroll_is_kept(of: Case, graphs: list[Recorded]) -> None:
    """For the next one; and the programs go with the loss."""
    net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).eval()
    own, params = rd.from_module(net, CE)

    def loss(params: dict[str, Tensor], batch: Any, hyper: Tensor) -> Tensor:
        return own(params, batch) * hyper

    x, hyper, lr = of.x.detach().requires_grad_(), torch.ones((), requires_grad=True), of.rates(T)
    theta = rd.unroll(loss, params, (x, of.y), rd.SGD(lr, 0.9), steps=T, compile="graphs", hyper=hyper)
    outer(theta).backward()
    theirs, ours = [weakref.ref(t) for t in (x, hyper, lr)], [weakref.ref(o) for o in (loss, own, net, *graphs)]
    assert len(graphs) == 2
    del x, hyper, lr, theta
    gc.collect()
    assert [ref() for ref in theirs] == [None] * len(theirs)
    graphs.clear()
    loss = own = net = params = None  # type: ignore[assignment]
    gc.collect()
    assert [ref() for ref in ours] == [None] * len(ours)


def test_what_is_large_is_not_kept(of: Case, graphs: list[Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs' own memory counts."""
    monkeypatch.setattr(Recorded, "nbytes", lease.KEPT_BYTES)
    for _ in range(2):
        assert_same(lambda compile: there_and_back(of.loss, of.params, of.batches, compile))
    assert [graph.calls for graph in graphs] == [T - 2, T - 3, T - 2, T - 3]


class Unhashable:
    """A loss that cannot be looked up."""

    def __init__(self, of: Case) -> None:
        self._of = of

    def __call__(self, params: dict[str, Tensor], batch: Any) -> Tensor:
        return self._of.loss(params, batch)

    def __hash__(self) -> int:
        raise RuntimeError("by nothing")


def test_a_loss_that_cannot_be_remembered(of: Case, graphs: list[Recorded]) -> None:
    loss = Unhashable(of)
    assert_same(lambda compile: there_and_back(loss, of.params, of.batches, compile))
    assert replays(graphs) == 2 * T - 5


def test_parameters_as_they_were_given_are_seen_in_steps_that_are_like_those_before_them(of: Case) -> None:
    """On the CPU itself, from step 3 on, which eager steps look at too."""
    given = {name: p.detach().clone() for name, p in of.params.items()}
    for compile in (False, "graphs"):
        calls = [0]

        def loss(params: dict[str, Tensor], batch: Any, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            return of.loss(params, batch) + ((given["2.bias"] * params["2.bias"]).sum() if calls[0] > 3 else 0.0)

        with pytest.raises(rd.UnsupportedError, match=r"params\['2.bias'\] as it was given to unroll, at step 3"):
            rd.unroll(loss, given, (of.x.detach(), of.y), rd.SGD(0.05, 0.9), steps=7, seed=1, compile=compile)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_steps_with_another_form_of_batch_are_not_like_those_before_them(
    on_cpu: bool, of: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are looked at as all steps are: of a small batch the loss reaches a tensor that was not passed."""
    if not on_cpu:
        replaying(monkeypatch)
    outside = torch.ones(4, requires_grad=True)

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        value = of.loss(params, batch)
        return value + (outside * params["2.bias"]).sum() if len(batch[1]) < 8 else value

    def batch(k: int) -> Any:
        n = 5 if k in (5, 11) else 8
        return of.x[k % 5, :n].detach(), of.y[k % 5, :n]

    with pytest.raises(ValueError, match=r"at step 5 a tensor of shape \[4\] that requires grad"):
        there_and_back(loss, of.params, batch, "graphs")
