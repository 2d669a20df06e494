"""RMSprop: torch.optim's values, an exact way back where momentum allows it, and a say where not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.sources import GRADIENT
from tests.engine.small import CE, data, mlp, total

CASES: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.5, "alpha": 0.8, "eps": 1e-4},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"weight_decay": 0.1, "alpha": 0.9},
    {"centered": True},
    {"centered": True, "momentum": 0.9, "weight_decay": 0.01, "eps": 1e-4},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_training_is_torchs(settings: dict[str, Any]) -> None:
    """What acts as the nearest n / 2^16 or n / 2^30 is given to torch so; float64."""
    net = mlp().double()
    loss, params = rd.from_module(net, CE)
    x, y = data(5)
    x = x.detach().double()
    exact = dict(settings)
    if "momentum" in exact:
        exact["momentum"] = round(exact["momentum"] * 2**16) / 2**16
    exact["alpha"] = round(exact.get("alpha", 0.99) * 2**30) / 2**30
    theta = rd.unroll(loss, params, (x, y), rd.RMSprop(0.01, **settings), steps=30)
    optimizer = torch.optim.RMSprop(net.parameters(), lr=0.01, **exact)
    for k in range(30):
        optimizer.zero_grad()
        CE(net(x[k % len(x)]), y[k % len(y)]).backward()
        optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(theta[name], p, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("settings", [c for c in CASES if "momentum" in c], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_hundred_steps_come_back_bit_for_bit(settings: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    loss, params = rd.from_module(net, CE)
    x, y = torch.randn(7, 6, 4, dtype=dtype, requires_grad=True), torch.arange(42).reshape(7, 6) % 3
    adjoint = rd.Reversible(graph_bytes=0)
    optimizer = rd.RMSprop(1e-3, **settings)
    theta, stats = rd.unroll(loss, params, (x, y), optimizer, steps=200, adjoint=adjoint, return_stats=True)
    total(theta).backward()  # ReversalError if any bit differs
    averages = 2 if settings.get("centered") else 1
    alpha, momentum = settings.get("alpha", 0.99), settings["momentum"]
    ideal = -averages * math.log2(alpha) - math.log2(momentum)
    bits = stats.history_bits_per_parameter_step
    assert bits is not None
    assert bits <= 1.05 * ideal
    # theta and b in one word, the averages in two, a head for each average and for b
    assert stats.state_bytes == 8 * stats.parameters * (2 + 2 * averages + averages + 1)


def test_reversible_is_the_default_with_momentum_only() -> None:
    loss, params = rd.from_module(mlp(), CE)
    with pytest.raises(
        rd.UnsupportedError, match=r"walk back momentum=0: its change of theta needs the gradient.*Check"
    ):
        rd.unroll(loss, params, data(5), rd.RMSprop(0.01), steps=3, adjoint=rd.Reversible())
    for momentum, history in ((0.0, "snapshots"), (0.9, "words")):
        _, stats = rd.unroll(loss, params, data(5), rd.RMSprop(0.01, momentum=momentum), steps=4, return_stats=True)
        assert (stats.history_bytes > 0) == (history == "snapshots")  # 4 steps spill no word yet


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"centered": 1}, TypeError, "centered must be a bool"),
        ({"alpha": 1.0}, ValueError, "alpha must be at least 0 and below 1"),
        ({"eps": 0.0}, ValueError, "eps must be above 0"),
        ({"momentum": 1.5}, ValueError, "momentum must be finite and between 0 and 1"),
        ({"lr": "0.1"}, TypeError, "lr must be a float, a tensor or a schedule"),
    ],
)
def test_arguments_that_will_not_do(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    loss, params = rd.from_module(mlp(), CE)
    with pytest.raises(error, match=message):
        rd.unroll(loss, params, data(5), rd.RMSprop(**settings), steps=3)


@pytest.mark.parametrize("alpha", [0.99, 0.5, 0.0, 0.999999])
def test_the_bound_on_the_step_holds(alpha: float) -> None:
    """Against gradients that are as bad as can be: none before, and then a large one."""
    layout = Layout(("w",), (torch.Size([200]),), torch.float64, torch.device("cpu"))
    step = rd.RMSprop(0.1, alpha).resolve(layout, 40).moves[-1].source  # type: ignore[attr-defined]
    growth = torch.linspace(0.3, 6, 200, dtype=torch.float64)
    s = torch.zeros(200, dtype=torch.float64)
    for k in range(40):
        g = growth**k
        s = alpha * s + (1 - alpha) * g * g
        assert float((g / (s.sqrt() + 1e-8)).max()) <= step.bound(k, {GRADIENT: float(g.max())}) * (1 + 1e-6)
    assert step.bound(0, {GRADIENT: 1.0}) < 1.01 / math.sqrt(1 - alpha)


def test_centered_gradients_that_hardly_change_are_named() -> None:
    """Their standard deviation goes to 0, and the step to |g| / eps: no bound holds, so the data are looked at."""

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        return 3.0 * params["w"].sum()

    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = rd.RMSprop(1e-9, alpha=0.5, momentum=0.9, centered=True)
    with pytest.raises(rd.RangeError, match=r"the velocity of params\['w'\] left the fixed-point range") as caught:
        rd.unroll(loss, {"w": w}, lambda k: (), optimizer, steps=200)
    assert caught.value.parameter == "w"
    theta = rd.unroll(loss, {"w": w}, lambda k: (), optimizer, steps=10)  # short of it
    theta["w"].sum().backward()
