"""Softplus in the place of ReLU: everywhere or refused, while distilling, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.distill.evaluation import evaluate
from revdistill.outer import models
from revdistill.outer.data import load
from revdistill.outer.networks import NetworkStack
from revdistill.outer.random_streams import evaluation_seed
from revdistill.outer.smoothing import smoothed

CPU = torch.device("cpu")


class Shared(nn.Module):
    """One module under two names, in two modules."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.a = self.b = nn.ReLU(inplace=True)
        self.rest = nn.Sequential(self.a, nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.b(self.a(self.first(x))))  # type: ignore[no-any-return]


def test_every_relu_is_replaced() -> None:
    net = Shared()
    names = [name for name, _ in net.named_parameters()]
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    softplus = lambda x: torch.log1p(torch.exp(3 * x)) / 3  # noqa: E731
    expected = net.rest[1](softplus(softplus(softplus(net.first(x)))))
    assert smoothed(net, 3.0) is net
    torch.testing.assert_close(net(x), expected)
    assert not any(isinstance(module, nn.ReLU) for module in net.modules())
    assert [name for name, _ in net.named_parameters()] == names
    torch.testing.assert_close(smoothed(nn.ReLU(), 3.0)(x), softplus(x))  # a network that is one itself
    for name in models.ARCHITECTURES:
        built = smoothed(models.build(name, (3, 16, 16), 10), 60.0)
        assert not any(isinstance(module, nn.ReLU) for module in built.modules()), name


class Other(nn.ReLU):
    """A class derived from ReLU that does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square()


def of(activation: Callable[[Tensor], Tensor]) -> Callable[..., nn.Module]:
    """A factory of networks with an activation that is a function, or a module."""

    class Made(nn.Module):
        def __init__(self, *_: Any) -> None:
            super().__init__()
            self.a, self.b, self.activation = nn.Linear(2, 4), nn.Linear(4, 3), activation

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.activation(self.a(x)))  # type: ignore[no-any-return]

    return Made


def layer(*_: Any) -> nn.Module:
    """torch fuses the whole of it where there are no gradients."""
    inside = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 4)), inside, nn.Flatten(), nn.Linear(4, 3))


KINKED = {
    "torch": of(torch.relu),
    "functional": of(F.relu),
    "in_place": of(lambda x: F.relu(x, inplace=True)),
    "method": of(lambda x: x.relu()),
    "operator": of(torch.ops.aten.relu),
    "not_registered": of(lambda x, act=nn.ReLU(): act(x)),  # type: ignore[misc] # noqa: B008
    "derived": of(type("Derived", (nn.ReLU,), {})()),
    "fused": layer,
}
SMOOTH = {"gelu": of(F.gelu), "derived_from_it": of(Other()), "shared": Shared}


@pytest.fixture(autouse=True)
def _own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(**KINKED, **SMOOTH))


@pytest.mark.parametrize("name", KINKED)
def test_what_cannot_be_replaced_is_refused(name: str) -> None:
    """And taken without smooth."""
    own = f"own:{name}"
    NetworkStack(own, 2, (2,), 3, CPU)
    with pytest.raises(ValueError, match=rf"{own}' has a ReLU that smooth cannot replace, .* torch\.nn\.ReLU\(\), or"):
        NetworkStack(own, 2, (2,), 3, CPU, smooth=60.0)


@pytest.mark.parametrize("name", SMOOTH)
def test_what_has_no_relu_is_left_alone(name: str) -> None:
    mine, plain = (NetworkStack(f"own:{name}", 2, (2,), 3, CPU, smooth) for smooth in (1e4, 0.0))
    x, params = torch.randn(4, 2), plain.sample(1)
    torch.testing.assert_close(mine.logits(params, x), plain.logits(params, x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["LeNet", "ResNet-8", "own:shared"])
def test_the_start_is_the_same(name: str) -> None:
    shape = (2,) if ":" in name else (1, 12, 12)
    plain, mine = (NetworkStack(name, 2, shape, 3, CPU, smooth).sample(5) for smooth in (0.0, 60.0))
    assert list(plain) == list(mine)
    assert all(torch.equal(plain[key], mine[key]) for key in plain)


def test_distilled_with_softplus_and_measured_with_relu() -> None:
    """Against loops over single networks. The softplus is so wide that the one is not taken for the other."""
    config = Config("moons", ("NonLinearNet",), steps=2, epochs=2, momentum=0.5, smooth=1.0, batch_size=50, lr=0.3)
    data = load("moons")
    distiller = Distiller(config, data)
    inner: dict[str, Callable[[], nn.Module]] = {"softplus": lambda: nn.Softplus(1.0), "relu": nn.ReLU}

    def trained(kind: str, seed: int, number: int, networks: int) -> nn.Module:
        net = nn.Sequential(nn.Linear(2, 10), inner[kind](), nn.Linear(10, 1))
        drawn = NetworkStack("NonLinearNet", networks, (2,), 2, CPU).sample(seed)
        with torch.no_grad():
            for own, p in zip(net.parameters(), drawn.values(), strict=True):
                own.copy_(p[number])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.5)
        x, y, lr = artifact.x, artifact.y, artifact.lr
        for k in range(4):
            optimizer.param_groups[0]["lr"] = float(lr[k])
            optimizer.zero_grad()
            logits = net(torch.from_numpy(x[k % 2]))[:, 0]
            F.binary_cross_entropy_with_logits(logits, torch.from_numpy(y[k % 2]).float()).backward()
            optimizer.step()
        return net

    def right(net: nn.Module, x: Tensor, y: Tensor) -> float:
        return float(((net(x)[:, 0] > 0) == y).float().mean())

    artifact = distiller.artifact()
    x, y = distiller._batches(0)
    losses = [
        F.binary_cross_entropy_with_logits(
            trained("softplus", distiller.network_seed(0, 0), number, 2)(x)[:, 0], y.float()
        )
        for number in range(2)
    ]
    assert distiller.step().loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    artifact = distiller.artifact()
    for kind, fits in (("relu", True), ("softplus", False)):
        nets = [trained(kind, distiller.network_seed(1, 0), number, 2) for number in range(2)]
        found = sum(right(net, data.x_validation, data.y_validation) for net in nets) / 2
        assert (distiller.validation_accuracy() == pytest.approx(found, abs=1e-6)) is fits
        nets = [trained(kind, evaluation_seed(0), number, 2) for number in range(2)]
        each = [right(net, data.x_test, data.y_test) for net in nets]
        accuracies = evaluate(artifact, data, "NonLinearNet", restarts=2).accuracies
        assert (accuracies == pytest.approx(each, abs=1e-6)) is fits
