"""compile="graphs": replayed steps have eager's bits, or are not replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from tests.cuda.cases import (
    CPU,
    DEVICE,
    NETWORKS,
    STEPS,
    Case,
    assert_same,
    case,
    hypergradient,
    outer,
)

only_on_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="about CUDA's own graphs")
no_replays = pytest.mark.skipif(DEVICE == "cpu", reason="there are no replays on a CPU")
T = max(12, min(STEPS, 60))
FLOATS = [torch.float32, torch.float64] if DEVICE == "cuda" else [torch.float32]  # the stand-in is slow
NO_CELL = "the stand-in has no fused recurrent cell, and the CPU, which it rests on, has none"


def both(of: Case, adjoint: Any = None, **kwargs: Any) -> None:
    """The hypergradients of eager and of replayed steps are the same to the bit, the second time too, and no step was
    refused.
    """
    adjoint = adjoint or rd.Reversible(graph_bytes=0)
    expected = hypergradient(of, adjoint, T, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rd.CompileWarning)
        for _ in range(2):
            assert_same(hypergradient(of, adjoint, T, compile="graphs", **kwargs), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_replayed_steps_have_eagers_bits(name: str, dtype: torch.dtype, device: torch.device) -> None:
    if name == "recurrent" and DEVICE == "standin":
        pytest.skip(NO_CELL)
    both(case(name, dtype, device))


OPTIMIZERS: dict[str, Callable[[Tensor], Any]] = {
    "momentum 0.5, which spills often": lambda lr: rd.SGD(lr, 0.5),
    "decay, dampening, clipping": lambda lr: rd.SGD(lr, 0.9, dampening=0.1, weight_decay=0.01, max_norm=0.1),
    "adam": lambda lr: rd.Adam(lr / 10),
    "adamw": lambda lr: rd.AdamW(lr / 10, weight_decay=0.1),
    "rmsprop": lambda lr: rd.RMSprop(lr / 10, momentum=0.9, centered=True, eps=1e-4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name: str, device: torch.device) -> None:
    both(case("mlp", torch.float32, device), optimizer=OPTIMIZERS[name])


def test_groups(device: torch.device) -> None:
    names = list(case("mlp", torch.float32, device).params)
    momenta = {name: (0.9, 0.5)[i % 2] for i, name in enumerate(names)}
    both(
        case("mlp", torch.float32, device),
        optimizer=lambda lr: rd.SGD({name: lr * (1 + i) for i, name in enumerate(names)}, momenta),
    )


def test_groups_of_which_some_do_not_decay(device: torch.device) -> None:
    """As everybody gives them: no weight decay for biases. Their factor is 1."""
    of = case("mlp", torch.float32, device)
    decay = {name: 0.1 * (p.ndim > 1) for name, p in of.params.items()}
    both(of, optimizer=lambda lr: rd.AdamW(lr / 10, weight_decay=decay))
    momenta = {name: (0.9, 1.0)[p.ndim > 1] for name, p in of.params.items()}
    both(of, optimizer=lambda lr: rd.SGD(lr / 10, momenta))


def test_batches_of_many_forms_are_made_eagerly(device: torch.device) -> None:
    of = case("mlp", torch.float32, device)

    def loss(params: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        return of.loss(params, (batch["x"], batch["y"])) * (1 + batch["k"] / T)

    def found(compile: Any) -> Tensor:
        lr = of.rates(T)
        theta = rd.unroll(
            loss,
            of.params,
            lambda k: {"x": of.x.detach()[k % 5], "y": of.y[k % 5], "k": k},
            rd.SGD(lr, 0.9),
            steps=T,
            seed=1,
            compile=compile,
        )
        (gradient,) = torch.autograd.grad(outer(theta), lr)
        return gradient.cpu()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", rd.CompileWarning)
        assert torch.equal(found("graphs"), found(False))
    assert ["other shapes" in str(w.message) for w in caught] == [True] * (DEVICE != "cpu")


@pytest.mark.parametrize("adjoint", [rd.Checkpoint(), rd.StoreAll(), rd.Reversible(history="host")], ids=str)
def test_other_ways_back(adjoint: Any, device: torch.device) -> None:
    both(case("mlp", torch.float32, device), adjoint)


@pytest.mark.parametrize(
    "options",
    [{"window": 9}, {"clip_back": 1e-3}, {"average": 0.9}],
    ids=str,
)
def test_what_is_done_between_replays(options: dict[str, Any], device: torch.device) -> None:
    of = case("mlp", torch.float32, device)

    def found(compile: Any) -> list[Tensor]:
        lr = of.rates(T)
        result = rd.unroll(of.loss, of.params, of.batches, rd.SGD(lr, 0.9), steps=T, seed=1, compile=compile, **options)
        theta, *rest = result if isinstance(result, tuple) else (result,)
        value = outer(theta) + sum((outer(r) for r in rest), torch.zeros((), device=device))
        return [g.cpu() for g in torch.autograd.grad(value, [of.x, lr])]

    assert all(map(torch.equal, found("graphs"), found(False)))


def test_losses_along_the_way_and_on_step(device: torch.device) -> None:
    of, seen = case("mlp", torch.float32, device), {}

    def found(compile: Any) -> Tensor:
        lr, losses = of.rates(T), []
        theta = rd.unroll(
            of.loss,
            of.params,
            of.batches,
            rd.SGD(lr, 0.9),
            steps=T,
            seed=1,
            compile=compile,
            save_at=[0, 5, T],
            on_step=lambda k, theta, loss: losses.append((k, outer(theta).clone(), loss)),
        )
        seen[compile] = [(k, float(a), float(b)) for k, a, b in losses]
        (gradient,) = torch.autograd.grad(outer(theta), lr)
        return gradient.cpu()

    assert torch.equal(found("graphs"), found(False))
    assert seen["graphs"] == seen[False]
    assert len(seen[False]) == T


def test_batches_of_a_function_and_hyper(device: torch.device) -> None:
    of = case("mlp", torch.float32, device)
    scale = torch.ones(2, device=device, requires_grad=True)
    sizes = [8, 8, 8, 5]

    def loss(params: dict[str, Tensor], batch: dict[str, Tensor], hyper: Tensor) -> Tensor:
        return of.loss(params, (batch["x"] * hyper[0], batch["y"])) * hyper[1]

    def batch(k: int) -> dict[str, Tensor]:  # every fourth is smaller, and made eagerly
        n = sizes[k % 4]
        return {"x": of.x.detach()[k % 5, :n], "y": of.y[k % 5, :n]}

    def found(compile: Any) -> list[Tensor]:
        lr = of.rates(T)
        theta = rd.unroll(loss, of.params, batch, rd.SGD(lr, 0.9), steps=T, seed=1, compile=compile, hyper=scale)
        return [g.cpu() for g in torch.autograd.grad(outer(theta), [scale, lr])]

    expected = found(False)
    for _ in range(2):
        assert all(map(torch.equal, found("graphs"), expected))


def test_minibatches(device: torch.device) -> None:
    of = case("mlp", torch.float32, device)
    x, y = of.x.detach().flatten(0, 1).requires_grad_(), of.y.flatten()
    order = rd.epochs(len(x), 6, 3, seed=0)

    def found(compile: Any) -> list[Tensor]:
        lr = of.rates(len(order))
        theta = rd.unroll(
            of.loss,
            of.params,
            rd.Minibatches((x, y), order),
            rd.SGD(lr, 0.9),
            steps=len(order),
            seed=1,
            compile=compile,
        )
        return [g.cpu() for g in torch.autograd.grad(outer(theta), [x, lr])]

    assert all(map(torch.equal, found("graphs"), found(False)))


def test_two_unrolls_before_one_backward(device: torch.device) -> None:
    """Of one loss: each has the program while it needs it."""
    of = case("mlp", torch.float32, device)

    def found(compile: Any) -> Tensor:
        lr = of.rates(T)
        parts = [
            rd.unroll(of.loss, of.params, of.batches, rd.SGD(lr * c, 0.9), steps=T, seed=1, compile=compile)
            for c in (1.0, 0.5)
        ]
        (gradient,) = torch.autograd.grad(outer(parts[0]) * outer(parts[1]), lr)
        return gradient.cpu()

    assert torch.equal(found("graphs"), found(False))


def test_many_outputs(device: torch.device) -> None:
    of = case("mlp", torch.float32, device)

    def found(compile: Any) -> Tensor:
        lr = of.rates(T)
        theta = rd.unroll(of.loss, of.params, of.batches, rd.SGD(lr, 0.9), steps=T, seed=1, compile=compile)
        outputs = torch.stack([p.square().sum() for p in theta.values()])
        return rd.jacobian(outputs, [lr])[0].cpu()

    assert torch.equal(found("graphs"), found(False))


def test_a_loss_that_is_no_number_is_named(device: torch.device) -> None:
    of = case("mlp", torch.float32, device)
    x = of.x.detach().clone()
    x[3] = float("inf")
    for compile in (False, "graphs"):
        with pytest.raises(rd.NonFiniteError, match="step 3"):
            rd.unroll(of.loss, of.params, (x, of.y), rd.SGD(0.01, 0.9), steps=T, seed=1, compile=compile)


def test_another_batch_than_at_the_capture_is_seen(device: torch.device) -> None:
    """The next unroll of the same loss has other data, rates and start."""
    of = case("mlp", torch.float32, device)
    hypergradient(of, rd.Reversible(), T, compile="graphs")
    other = Case(
        of.loss, {n: p * 1.5 for n, p in of.params.items()}, (of.x * 2).detach().requires_grad_(), of.y.roll(1, 0)
    )
    both(other, optimizer=lambda lr: rd.SGD(lr * 0.7, 0.8))


@no_replays
def test_a_loss_that_changes_with_its_calls_is_refused_or_made_eagerly(device: torch.device) -> None:
    """From its ninth call on it is another one: no step may have the first one's bits and no other the second's."""
    of, calls = case("mlp", torch.float32, device), [0]

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        calls[0] += 1
        return of.loss(params, batch) * (1.0 if calls[0] < 9 else 2.0)

    changing = Case(loss, of.params, of.x, of.y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rd.CompileWarning)
        try:
            found = hypergradient(changing, rd.Reversible(graph_bytes=0), T, compile="graphs")
        except rd.ReversalError:
            return
    assert_same(found, hypergradient(changing, rd.Reversible(graph_bytes=0), T))  # all steps were made again


@only_on_cuda
def test_a_loss_that_waits_for_the_device_is_made_eagerly(device: torch.device) -> None:
    of = case("mlp", torch.float32, device)

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        value = of.loss(params, batch)
        return value * (1.0 if value.item() < 1e9 else 2.0)

    waiting = Case(loss, of.params, of.x, of.y)
    expected = hypergradient(waiting, rd.Reversible(graph_bytes=0), T)
    with pytest.warns(rd.CompileWarning, match="could not be captured"):
        found = hypergradient(waiting, rd.Reversible(graph_bytes=0), T, compile="graphs")
    assert_same(found, expected)
    both(of)  # torch is as it was before the capture that failed
    both(case("dropout", torch.float32, device))


@only_on_cuda
def test_a_loss_that_draws_on_the_host_is_made_eagerly(device: torch.device) -> None:
    of = case("mlp", torch.float32, device)

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        return of.loss(params, batch) * (1 + float(torch.rand(())))

    drawing = Case(loss, of.params, of.x, of.y)
    expected = hypergradient(drawing, rd.Reversible(graph_bytes=0), T)
    with pytest.warns(rd.CompileWarning, match="random numbers"):
        found = hypergradient(drawing, rd.Reversible(graph_bytes=0), T, compile="graphs")
    assert_same(found, expected)


@only_on_cuda
def test_a_module_put_into_another_mode_is_captured_anew(device: torch.device) -> None:
    of = case("dropout", torch.float32, device)
    both(of)
    net = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Linear(16, 4)).to(device)
    loss, params = rd.from_module(net, nn.CrossEntropyLoss())
    for training in (True, False):
        net.train(training)
        both(Case(loss, params, of.x, of.y))


def test_on_the_cpu_it_is_eager(device: torch.device) -> None:
    both(case("mlp", torch.float32, CPU))
