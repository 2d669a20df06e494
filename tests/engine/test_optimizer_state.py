"""Going on from a state: 10 + 10 steps are 20 bit for bit, and the state that comes in has gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from tests.engine.small import CE

FIXED = [rd.Reversible(graph_bytes=0), rd.Reversible(), rd.Checkpoint(), rd.StoreAll()]
EVERY = [*FIXED, rd.Backprop()]
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: rd.SGD(0.1, 0.9, dampening=0.1, weight_decay=0.01),
    "adamw": lambda: rd.AdamW(0.01, eps=1e-3),
    "rmsprop": lambda: rd.RMSprop(0.01, momentum=0.5, centered=True, eps=1e-2),
}
TORCHS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (rd.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.5, "dampening": 0.25}),
    "adam": (rd.Adam, torch.optim.Adam, {"lr": 0.01, "eps": 1e-3}),
    "amsgrad": (rd.Adam, torch.optim.Adam, {"lr": 0.01, "eps": 1e-3, "amsgrad": True}),
    "rmsprop": (rd.RMSprop, torch.optim.RMSprop, {"lr": 0.01, "eps": 1e-2, "momentum": 0.5, "centered": True}),
}


def network(*, dropout: float = 0.2, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(7, 5, 4, dtype=torch.float64, generator=draw).to(dtype)
    return x.requires_grad_(), torch.arange(35).reshape(7, 5) % 3


def outer(theta: dict[str, Tensor], state: rd.OptimizerState) -> Tensor:
    slots = [q.sum() for of in state.slots.values() for q in of.values()]
    return torch.stack([p.square().sum() for p in theta.values()] + slots).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("adjoint", FIXED, ids=repr)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_and_ten_steps_are_twenty(name: str, adjoint: Any, dtype: torch.dtype) -> None:
    """Bit for bit: dropout, the row of the table and the heads of the bit store go on too; gradients, in one graph."""
    loss, params = rd.from_module(network(dtype=dtype), CE)
    x, y = data(dtype)
    options: dict[str, Any] = dict(adjoint=adjoint, return_state=True)
    whole, last = rd.unroll(loss, params, (x, y), OPTIMIZERS[name](), steps=20, seed=3, **options)
    half, middle = rd.unroll(loss, params, (x, y), OPTIMIZERS[name](), steps=10, seed=3, **options)
    rest, end = rd.unroll(loss, half, (x, y), OPTIMIZERS[name](), steps=10, state=middle, **options)
    assert (middle.step, end.step, end.seed) == (10, 20, 3)
    for n in whole:
        assert torch.equal(whole[n], rest[n])
        assert all(torch.equal(last.slots[slot][n], end.slots[slot][n]) for slot in last.slots)
    leaves = [x, *params.values()]
    for a, b in zip(
        torch.autograd.grad(outer(rest, end), leaves), torch.autograd.grad(outer(whole, last), leaves), strict=True
    ):
        rtol, atol = (1e-3, 1e-5) if dtype == torch.float32 else (1e-11, 1e-13)
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_a_state_may_be_copied() -> None:
    """The integers behind it go along."""
    loss, params = rd.from_module(network(), CE)
    batches = tuple(t.detach() for t in data())
    whole = rd.unroll(loss, params, batches, rd.AdamW(0.01), steps=20, seed=3)
    with torch.no_grad():
        half, state = rd.unroll(loss, params, batches, rd.AdamW(0.01), steps=10, seed=3, return_state=True)
    for again in (state, copy.deepcopy(state)):
        rest = rd.unroll(loss, half, batches, rd.AdamW(0.01), steps=10, state=again)
        assert all(torch.equal(whole[n], rest[n]) for n in whole)


@pytest.mark.parametrize("adjoint", FIXED, ids=repr)
def test_changed_floats_count(adjoint: Any) -> None:
    """A state that was edited, or parameters that were, is taken as it is and not as the integers have it."""
    loss, params = rd.from_module(network(dropout=0.0), CE)
    x, y = data()
    half, state = rd.unroll(loss, params, (x, y), rd.SGD(0.1), steps=3, return_state=True)
    cut = rd.OptimizerState(
        state.step, {"momentum_buffer": {n: torch.zeros_like(p) for n, p in half.items()}}, state.seed, state._integers
    )
    found = rd.unroll(loss, half, (x, y), rd.SGD(0.1), steps=1, state=cut, adjoint=adjoint)
    value = CE(torch.func.functional_call(network(dropout=0.0), half, (x[3],)), y[3])
    gradients = torch.autograd.grad(value, list(half.values()))
    for n, g in zip(half, gradients, strict=True):
        torch.testing.assert_close(found[n], half[n] - 0.1 * g, rtol=1e-10, atol=1e-12)
    torch.stack([p.sum() for p in found.values()]).sum().backward()


@pytest.mark.parametrize("name", TORCHS)
def test_on_from_torchs_state(name: str) -> None:
    """A network that torch.optim has trained goes on as there."""
    ours, theirs, settings = TORCHS[name]
    net = network(dropout=0.0)
    optimizer = theirs(net.parameters(), **settings)
    x, y = (t.detach() for t in data())

    def train(first: int, last: int) -> None:
        for k in range(first, last):
            optimizer.zero_grad()
            CE(net(x[k % 7]), y[k % 7]).backward()
            optimizer.step()

    train(0, 6)
    loss, params = rd.from_module(net, CE)
    state = rd.OptimizerState.from_torch(optimizer, params, step=6 if name in ("sgd", "rmsprop") else None)
    assert state.step == 6
    theta = rd.unroll(loss, params, (x, y), ours(**settings), steps=9, state=state)
    train(6, 15)
    for n, p in net.named_parameters():
        torch.testing.assert_close(theta[n], p.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_gradients_to_a_state_that_came_in(adjoint: Any) -> None:
    """Against SGD and Adam in a loop, from averages that require grad."""
    loss, params = rd.from_module(network(dropout=0.0), CE)
    x, y = data()
    draw = torch.Generator().manual_seed(2)

    def slot(low: float) -> dict[str, Tensor]:
        return {
            n: (torch.rand(p.shape, dtype=torch.float64, generator=draw) + low).requires_grad_()
            for n, p in params.items()
        }

    v, m, s = slot(-0.5), slot(-0.5), slot(0.5)
    net = network(dropout=0.0)

    def gradients(theta: dict[str, Tensor], k: int) -> dict[str, Tensor]:
        value = CE(torch.func.functional_call(net, theta, (x[k % 7],)), y[k % 7])
        return dict(zip(theta, torch.autograd.grad(value, list(theta.values()), create_graph=True), strict=True))

    mu, beta1, beta2 = round(0.9 * 2**16) / 2**16, round(0.9 * 2**30) / 2**30, round(0.999 * 2**30) / 2**30
    by_hand, own = [dict(params), dict(params)], [dict(v), dict(m), dict(s)]
    for k in range(4, 9):
        g = gradients(by_hand[0], k)
        own[0] = {n: mu * own[0][n] + g[n] for n in g}
        by_hand[0] = {n: p - 0.1 * own[0][n] for n, p in by_hand[0].items()}
        g = gradients(by_hand[1], k)
        own[1] = {n: beta1 * own[1][n] + (1 - beta1) * g[n] for n in g}
        own[2] = {n: beta2 * own[2][n] + (1 - beta2) * g[n].square() for n in g}
        c1, c2 = 1 - beta1 ** (k + 1), 1 - beta2 ** (k + 1)
        by_hand[1] = {n: p - 0.01 * (own[1][n] / c1) / ((own[2][n] / c2).sqrt() + 1e-8) for n, p in by_hand[1].items()}

    states = [{"momentum_buffer": v}, {"exp_avg": m, "exp_avg_sq": s}]
    for optimizer, slots, expected in zip((rd.SGD(0.1, 0.9), rd.Adam(0.01)), states, by_hand, strict=True):
        state = rd.OptimizerState(4, slots)
        theta = rd.unroll(loss, params, (x, y), optimizer, steps=5, state=state, adjoint=adjoint)
        leaves = [x, *params.values(), *(t for of in slots.values() for t in of.values())]
        a, b = (
            torch.autograd.grad(torch.stack([p.square().sum() for p in found.values()]).sum(), leaves)
            for found in (theta, expected)
        )
        for mine, theirs in zip(a, b, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_steps_are_numbered_on() -> None:
    """Batches, on_step, save_at and messages see the step of the whole training."""
    w = {"w": torch.ones(2, dtype=torch.float64, requires_grad=True)}
    seen: list[int] = []
    asked: list[int] = []

    def batches(k: int) -> tuple[int]:
        asked.append(k)
        return (k,)

    def loss(p: dict[str, Tensor], batch: tuple[int]) -> Tensor:
        return p["w"].square().sum() * (float("nan") if batch[0] == 7 else 1.0)

    _, state = rd.unroll(loss, w, batches, rd.SGD(0.1), steps=2, return_state=True)
    theta = rd.unroll(
        loss, w, batches, rd.SGD(0.1), steps=3, state=state, save_at=[2, 5], on_step=lambda k, *_: seen.append(k)
    )
    assert (seen, asked) == ([2, 3, 4], [0, 1, 2, 3, 4])
    assert torch.equal(theta["w"][0], w["w"])
    with pytest.raises(rd.NonFiniteError, match="at step 7") as error:
        rd.unroll(loss, w, batches, rd.SGD(0.1), steps=7, state=state)
    assert error.value.step == 7
    with pytest.raises(ValueError, match=r"save_at\[0\] is 6; with steps=3 it must be from 2 to 5"):
        rd.unroll(loss, w, batches, rd.SGD(0.1), steps=3, state=state, save_at=[6])


def test_an_unused_parameter_with_a_velocity_is_refused() -> None:
    """torch.optim would leave it alone; the velocity would move it."""
    params = {n: torch.ones(2, dtype=torch.float64) for n in ("a", "b")}
    state = rd.OptimizerState(1, {"momentum_buffer": {n: torch.ones(2, dtype=torch.float64) for n in params}})
    with pytest.raises(rd.UnsupportedError, match=r"params\['b'\] no gradient at step 1, but the state"):
        rd.unroll(lambda p, b: p["a"].sum(), params, lambda k: (), rd.SGD(0.1), steps=3, state=state)


def state_with(**changes: Any) -> rd.OptimizerState:
    slots = {"momentum_buffer": {"w": torch.zeros(2)}}
    return rd.OptimizerState(**({"step": 1, "slots": slots} | changes))


@pytest.mark.parametrize(
    ("state", "optimizer", "kind", "message"),
    [
        ({"step": 1}, rd.SGD(0.1), TypeError, "state must be an rd.OptimizerState or None, got dict"),
        (state_with(step=-1), rd.SGD(0.1), ValueError, "state.step must be an int of at least 0, got -1"),
        (state_with(), rd.Adam(0.1), ValueError, r"state.slots has \['momentum_buffer'\], but Adam keeps"),
        (
            state_with(slots={"exp_avg": {"w": torch.zeros(2)}}),
            rd.Adam(0.1),
            ValueError,
            r"state.slots has \['exp_avg'\], but Adam as it is set keeps \['exp_avg', 'exp_avg_sq'\]",
        ),
        (state_with(slots={"momentum_buffer": {}}), rd.SGD(0.1), ValueError, "must be those of params"),
        (state_with(step=10**30), rd.Adam(0.1), ValueError, "state.step must be below 2.53, got 1000"),
        (state_with(seed="x"), rd.SGD(0.1), ValueError, "state.seed must be an int of at least 0 or None, got 'x'"),
        (state_with(slots=None), rd.SGD(0.1), TypeError, "state.slots must be a dict, got NoneType"),
        (
            state_with(slots={"momentum_buffer": torch.zeros(2)}),
            rd.SGD(0.1),
            TypeError,
            r"state.slots\['momentum_buffer'\] must be a dict from name to tensor, got Tensor",
        ),
        (
            state_with(slots={"momentum_buffer": {"w": torch.zeros(2).to_sparse()}}),
            rd.SGD(0.1),
            ValueError,
            r"state.slots\['momentum_buffer'\]\['w'\] has layout torch.sparse_coo",
        ),
        (
            state_with(slots={"momentum_buffer": {"w": torch.zeros(3)}}),
            rd.SGD(0.1),
            ValueError,
            r"state.slots\['momentum_buffer'\]\['w'\] is torch.float32 of shape \[3\]",
        ),
        (
            state_with(slots={"momentum_buffer": {"w": torch.tensor([0.0, float("inf")])}}),
            rd.SGD(0.1),
            ValueError,
            "is not finite",
        ),
        (
            state_with(slots={"exp_avg": {"w": torch.zeros(2)}, "exp_avg_sq": {"w": -torch.ones(2)}}),
            rd.Adam(0.1),
            ValueError,
            "is a mean of squares and must be at least 0",
        ),
        (
            state_with(slots={"momentum_buffer": {"w": torch.full((2,), 1e6)}}),
            rd.SGD(0.1),
            rd.RangeError,
            r"the velocity of params\['w'\] left the fixed-point range at the start",
        ),
    ],
)
def test_bad_states_are_named(state: Any, optimizer: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        rd.unroll(lambda p, b: p["w"].sum(), {"w": torch.ones(2)}, lambda k: (), optimizer, steps=3, state=state)


def test_a_first_moment_without_a_second_is_looked_after() -> None:
    """Nothing bounds |m| / sqrt(s) there: the steps are checked one by one, and taken or refused."""
    slots = {"exp_avg": {"w": torch.ones(2)}, "exp_avg_sq": {"w": torch.zeros(2)}}
    state = rd.OptimizerState(1, slots)
    params = {"w": torch.ones(2)}
    theta = rd.unroll(lambda p, b: p["w"].sum(), params, lambda k: (), rd.Adam(1e-3), steps=3, state=state)
    assert all(map(torch.isfinite, theta["w"]))
    with pytest.raises(rd.RangeError):
        rd.unroll(lambda p, b: 0 * p["w"].sum(), params, lambda k: (), rd.Adam(1.0), steps=3, state=state)


def test_bad_optimizers_of_torchs_are_named() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    params = dict(net.named_parameters())
    with pytest.raises(ValueError, match=r"SGD has no count of its steps .* give step="):
        rd.OptimizerState.from_torch(optimizer, params)
    with pytest.raises(ValueError, match=r"params\['w'\] is not one of the tensors that the optimizer trains"):
        rd.OptimizerState.from_torch(optimizer, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match="Adam has no count of its steps"):
        rd.OptimizerState.from_torch(torch.optim.Adam(net.parameters()), params)
    adam = torch.optim.Adam(net.parameters())
    for first in (True, False):
        for i, p in enumerate(params.values()):
            p.grad = torch.zeros_like(p) if first or i else None
        adam.step()
    with pytest.raises(ValueError, match="were trained for different numbers of steps"):
        rd.OptimizerState.from_torch(adam, params)
    with pytest.raises(TypeError, match="params must be a dict from name to tensor, got list"):
        rd.OptimizerState.from_torch(adam, list(params.values()))  # type: ignore[arg-type]
    for step in (-1, 1.0, True):
        with pytest.raises(ValueError, match=f"step must be an int of at least 0, got {step}"):
            rd.OptimizerState.from_torch(optimizer, params, step=step)  # type: ignore[arg-type]
    adam = torch.optim.Adam(net.parameters())
    adam.step()
    with pytest.raises(
        ValueError, match="step is 7, but Adam counts 1, on which its next steps depend: leave step out"
    ):
        rd.OptimizerState.from_torch(adam, params, step=7)


@pytest.mark.parametrize("make", [torch.optim.RAdam, torch.optim.NAdam, lambda p: rd.Adam(0.1), lambda p: "Adam"])
def test_other_optimizers_are_refused(make: Any) -> None:
    """Regression: RAdam's averages have Adam's names, and were taken for them."""
    net = network()
    with pytest.raises(TypeError, match=r"optimizer must be torch.optim's SGD, Adam, AdamW or RMSprop itself, got"):
        rd.OptimizerState.from_torch(make(net.parameters()), dict(net.named_parameters()), step=0)


def test_a_group_without_momentum_was_trained_too() -> None:
    """Regression: beside a group with momentum it was taken for never trained, and refused."""
    net = network(dropout=0.0)
    groups = [{"params": [p], "momentum": 0.5 * (p.ndim - 1)} for p in net.parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.1, dampening=0.25)
    trained(net, optimizer, 3)
    loss, params = rd.from_module(net, CE)
    state = rd.OptimizerState.from_torch(optimizer, params, step=3)
    x, y = (t.detach() for t in data())
    momenta = {n: 0.5 * (p.ndim - 1) for n, p in params.items()}
    theta = rd.unroll(loss, params, (x[:3], y[:3]), rd.SGD(0.1, momenta, dampening=0.25), steps=3, state=state)
    trained(net, optimizer, 3)
    for n, p in net.named_parameters():
        torch.testing.assert_close(theta[n], p.detach(), rtol=1e-9, atol=1e-9)


def trained(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x, y = (t.detach() for t in data())
    for k in range(steps):
        optimizer.zero_grad()
        CE(net(x[k % 7]), y[k % 7]).backward()
        optimizer.step()


@pytest.mark.parametrize("momentum", [0.5, 0.0])
def test_the_first_step_with_a_buffer_is_the_one_without_dampening(momentum: float) -> None:
    """Regression: it went by the count of steps, of which SGD has none."""
    net = network(dropout=0.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=momentum, dampening=0.5 if momentum else 0.0)
    trained(net, optimizer, 3)
    loss, params = rd.from_module(net, CE)
    state = rd.OptimizerState.from_torch(optimizer, params, step=0)
    for group in optimizer.param_groups:
        group["momentum"], group["dampening"] = 0.5, 0.5
    theta = rd.unroll(
        loss, params, tuple(t.detach() for t in data()), rd.SGD(0.1, 0.5, dampening=0.5), steps=3, state=state
    )
    trained(net, optimizer, 3)
    for n, p in net.named_parameters():
        torch.testing.assert_close(theta[n], p.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: rd.RMSprop(0.01, momentum=lambda k: 0.0 if k < 10 else 0.5),
        lambda: rd.AdamW(0.1, weight_decay=lambda k: 0.0 if k < 10 else 0.1),
        lambda: rd.SGD(0.1, momentum=lambda k: 0.0 if k < 10 else 0.5),
    ],
    ids=["rmsprop", "adamw", "sgd"],
)
def test_what_is_zero_in_one_piece_only(optimizer: Callable[[], Any]) -> None:
    """Regression: a slot, or a bit store, was missing from the first piece."""
    loss, params = rd.from_module(network(dtype=torch.float32), CE)
    batches = tuple(t.detach() for t in data(torch.float32))
    whole = rd.unroll(loss, params, batches, optimizer(), steps=20, seed=3)
    half, state = rd.unroll(loss, params, batches, optimizer(), steps=10, seed=3, return_state=True)
    half, state = rd.unroll(loss, half, batches, optimizer(), steps=0, state=state, return_state=True)
    rest = rd.unroll(loss, half, batches, optimizer(), steps=10, state=state)
    assert all(torch.equal(whole[n], rest[n]) for n in whole)


def test_what_torch_has_not_trained_is_at_rest() -> None:
    """A parameter that the loss never used has no state in torch, and none is needed."""
    params = {n: torch.ones(2, dtype=torch.float64, requires_grad=True) for n in ("used", "unused")}
    optimizer = torch.optim.AdamW(params.values(), lr=0.1)

    def loss(p: dict[str, Tensor], _: Any) -> Tensor:
        return (p["used"] ** 4).sum()

    loss(params, ()).backward()
    optimizer.step()
    state = rd.OptimizerState.from_torch(optimizer, params)
    theta = rd.unroll(loss, params, lambda k: (), rd.AdamW(0.1), steps=1, state=state)
    optimizer.zero_grad()
    loss(params, ()).backward()
    optimizer.step()
    for n, p in params.items():
        torch.testing.assert_close(theta[n], p.detach(), rtol=1e-6, atol=0)
    with pytest.raises(rd.UnsupportedError, match=r"params\['unused'\] a gradient at step 1"):
        rd.unroll(
            lambda p, b: loss(p, b) + p["unused"].sum(), params, lambda k: (), rd.AdamW(0.1), steps=1, state=state
        )


def test_the_bound_of_amsgrads_step_holds_from_any_state() -> None:
    """Regression: it took the maximum of the past for the second moment of the present. torch's step, and refused."""

    def full(value: float) -> dict[str, Tensor]:
        return {"w": torch.full((3,), value, dtype=torch.float64)}

    state = rd.OptimizerState(100_000, {"exp_avg": full(-5), "exp_avg_sq": full(0), "max_exp_avg_sq": full(1)})
    g = torch.full((1, 3), -(1000**0.5), dtype=torch.float64)
    with pytest.raises(rd.RangeError) as error:
        rd.unroll(
            lambda p, b: (p["w"] * b[0]).sum(),
            full(0.0),
            (g,),
            rd.Adam(0.7, amsgrad=True, eps=1e-12),
            steps=1,
            state=state,
            adjoint=rd.Checkpoint(fractional_bits=60),
        )
    assert error.value.value == pytest.approx(0.7 * (0.9 * 5 + 0.1 * 1000**0.5), rel=1e-6)


def test_a_state_without_its_graph() -> None:
    loss, params = rd.from_module(network(), CE)
    half, state = rd.unroll(loss, params, data(), rd.Adam(0.01), steps=3, return_state=True)
    assert any(t.requires_grad for t in state.slots["exp_avg"].values())
    alone = copy.deepcopy(state.detach())
    start = {n: p.detach() for n, p in half.items()}
    a, b = (rd.unroll(loss, start, data(), rd.Adam(0.01), steps=3, state=s) for s in (state, alone))
    assert all(torch.equal(a[n], b[n]) for n in a)
