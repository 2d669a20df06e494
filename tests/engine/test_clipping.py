"""max_norm: torch.nn.utils.clip_grad_norm_ before every step, differentiated exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from tests.engine.small import CE

STEPS = 8
SETTINGS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (rd.SGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}),
    "adam": (rd.Adam, torch.optim.Adam, {"lr": 0.05, "eps": 1e-3}),
    "rmsprop": (rd.RMSprop, torch.optim.RMSprop, {"lr": 0.05, "momentum": 0.5, "eps": 1e-3}),
}
ADJOINTS = [rd.Reversible(graph_bytes=0), rd.Reversible(), rd.Checkpoint(), rd.StoreAll(), rd.Backprop()]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, 6, 4, dtype=torch.float64, generator=draw) * torch.tensor([0.3, 1.0, 3.0]).view(3, 1, 1)
    return x.requires_grad_(), torch.arange(18).reshape(3, 6) % 3


def total(theta: dict[str, Tensor]) -> Tensor:
    return torch.stack([p.square().sum() for p in theta.values()]).sum()


def by_torch(net: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> list[float]:
    """The norms before clipping; the network is trained."""
    norms = []
    x, y = data()
    for k in range(STEPS):
        optimizer.zero_grad()
        CE(net(x[k % 3].detach()), y[k % 3]).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)))
        optimizer.step()
    return norms


@pytest.mark.parametrize("name", SETTINGS)
def test_torchs_values(name: str) -> None:
    ours, theirs, settings = SETTINGS[name]
    net = network()
    loss, params = rd.from_module(net, CE)
    theta = rd.unroll(loss, params, data(), ours(**settings, max_norm=0.3), steps=STEPS)
    norms = by_torch(net, theirs(net.parameters(), **settings), 0.3)
    assert min(norms) < 0.3 < max(norms)  # some steps are clipped, and some are not
    for n, p in net.named_parameters():
        torch.testing.assert_close(theta[n], p.detach(), rtol=1e-4, atol=1e-6)


def by_hand(settings: dict[str, Any], params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """SGD after clipping, with a graph: written from the documentation of clip_grad_norm_."""
    theta, mu = dict(params), round(0.9 * 2**16) / 2**16
    velocity = {n: torch.zeros_like(p) for n, p in theta.items()}
    net = network()
    for k in range(STEPS):
        loss = CE(torch.func.functional_call(net, theta, (x[k % 3],)), y[k % 3])
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        max_norm = settings["max_norm"]
        max_norm = max_norm[k] if max_norm.ndim else max_norm
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for (n, p), g in zip(list(theta.items()), gradients, strict=True):
            velocity[n] = mu * velocity[n] + factor * g + settings["weight_decay"] * p
            theta[n] = p - settings["lr"] * velocity[n]
    return theta


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("shape", [(), (STEPS,)], ids=str)
def test_hypergradients(shape: tuple[int, ...], adjoint: Any) -> None:
    def gradients(train: Callable[..., dict[str, Tensor]]) -> list[Tensor]:
        _, params = rd.from_module(network(), CE)
        x, y = data()
        learned = {
            "max_norm": torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True),
            "lr": torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
            "weight_decay": torch.tensor(0.01, dtype=torch.float64, requires_grad=True),
        }
        theta = train(learned, params, x, y)
        return list(torch.autograd.grad(total(theta), [x, *learned.values(), *params.values()]))

    def ours(learned: dict[str, Tensor], params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        loss, _ = rd.from_module(network(), CE)
        return rd.unroll(loss, params, (x, y), rd.SGD(**learned), steps=STEPS, adjoint=adjoint)

    for a, b in zip(gradients(ours), gradients(by_hand), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_a_bound_that_is_never_reached_changes_no_bit() -> None:
    loss, params = rd.from_module(network(), CE)
    x, y = data()
    a, b = (
        rd.unroll(loss, params, (x, y), rd.SGD(0.1, 0.9, max_norm=max_norm), steps=STEPS) for max_norm in (None, 1e6)
    )
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_stacked_networks_are_clipped_each_by_its_own_norm() -> None:
    """As if each were trained alone; a bound for each, and its gradient, too."""
    nets, (x, y) = [network(i) for i in range(3)], data()
    bounds = torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64)
    for max_norm in (0.3, bounds.expand(STEPS, 3).clone().requires_grad_()):
        loss, params = rd.stack_modules(nets, CE)
        theta = rd.unroll(loss, params, (x, y), rd.SGD(0.5, 0.9, max_norm=max_norm), steps=STEPS)
        found = torch.autograd.grad(total(theta), x, retain_graph=False)[0]
        expected = torch.zeros_like(x)
        for i, net in enumerate(nets):
            own, start = rd.from_module(net, CE)
            own_norm = max_norm if isinstance(max_norm, float) else max_norm[:, i].detach()
            alone = rd.unroll(own, start, (x, y), rd.SGD(0.5, 0.9, max_norm=own_norm), steps=STEPS)
            for n in alone:
                torch.testing.assert_close(theta[n][i], alone[n], rtol=1e-9, atol=1e-12)
            expected += torch.autograd.grad(total(alone), x)[0]
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_a_gradient_of_zero_stays_zero() -> None:
    w = torch.zeros(2, requires_grad=True)
    bound = torch.tensor(1.0, requires_grad=True)
    theta = rd.unroll(
        lambda p, b: (p["w"] ** 4).sum(), {"w": w}, lambda k: (), rd.SGD(0.1, 0.9, max_norm=bound), steps=3
    )
    found = torch.autograd.grad(theta["w"].sum(), [w, bound])
    assert found[0].tolist() == [1.0, 1.0]
    assert float(found[1]) == 0


@pytest.mark.parametrize("adjoint", [rd.Reversible(), rd.Backprop()], ids=repr)
def test_a_norm_that_overflows_gives_zero_as_torchs_does(adjoint: Any) -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    w.grad = torch.full((2,), 1e200, dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_([w], 1.0)
    assert not w.grad.any()
    theta = rd.unroll(
        lambda p, b: 1e200 * p["w"].sum(), {"w": w}, lambda k: (), rd.SGD(0.1, max_norm=1.0), steps=2, adjoint=adjoint
    )
    assert torch.equal(theta["w"], w)


def test_it_keeps_adam_in_its_range() -> None:
    """Gradients of 1e6 are more than the moments hold; their clipped ones are not."""
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def loss(p: dict[str, Tensor], _: Any) -> Tensor:
        return 1e6 * p["w"].square().sum()

    with pytest.raises(rd.RangeError):
        rd.unroll(loss, {"w": w}, lambda k: (), rd.Adam(0.1), steps=3)
    theta = rd.unroll(loss, {"w": w}, lambda k: (), rd.Adam(0.1, max_norm=1.0), steps=3)
    theta["w"].sum().backward()


@pytest.mark.parametrize("adjoint", [rd.Reversible(), rd.Backprop()], ids=repr)
def test_what_is_not_finite_is_still_named(adjoint: Any) -> None:
    def loss(p: dict[str, Tensor], _: Any) -> Tensor:
        return p["a"].square().sum() + (p["b"] - 1.0).sqrt().sum()

    params = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(2, requires_grad=True)}
    with pytest.raises(rd.NonFiniteError) as error:
        rd.unroll(loss, params, lambda k: (), rd.SGD(0.1, 0.9, max_norm=1.0), steps=3, adjoint=adjoint)
    assert error.value.parameter == "b"


@pytest.mark.parametrize(
    ("max_norm", "kind", "message"),
    [
        ({"w": 1.0}, TypeError, "max_norm must be a float or a tensor, got dict: the norm is of all parameters"),
        (0.0, ValueError, "max_norm must be above 0"),
        (-1.0, ValueError, "max_norm must be finite and at least 0, got -1"),
        ("1", TypeError, "max_norm must be a float, a tensor or a schedule, got str"),
        (torch.ones(4), ValueError, r"max_norm has shape \[4\]; with steps=3"),
    ],
)
def test_bad_bounds_are_named(max_norm: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        rd.unroll(
            lambda p, b: p["w"].sum(), {"w": torch.ones(2)}, lambda k: (), rd.SGD(0.1, max_norm=max_norm), steps=3
        )
