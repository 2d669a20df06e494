"""Networks side by side: how they start, what they take, and how they are evaluated."""

from __future__ import annotations

import pytest
import torch

from revdistill.outer import models, networks
from revdistill.outer.networks import NetworkStack


def own_network(input_shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """A user's own factory, with BatchNorm."""
    return torch.nn.Sequential(torch.nn.Linear(input_shape[0], 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, classes))


def test_batch_statistics_are_of_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: data sorted by class were evaluated in batches of one class, whose mean BatchNorm then took away."""
    monkeypatch.setattr(networks, "AT_ONCE", 40)
    stack = NetworkStack(f"{__name__}:own_network", 2, (2,), 3, torch.device("cpu"))
    y = torch.arange(3).repeat_interleave(25)
    x = y[:, None].float() + 0.1 * torch.randn(75, 2, generator=torch.Generator().manual_seed(0))
    params = stack.sample(0)
    batches: list[torch.Tensor] = []

    def logits(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        batches.append(x[:, 0].round().long().clamp(0, 2))
        return one_hot[x[:, 0].round().long().clamp(0, 2)].expand(2, -1, -1)

    one_hot = torch.eye(3)
    monkeypatch.setattr(stack, "logits", logits)
    assert stack.accuracies(params, x, y).tolist() == [1.0, 1.0]
    assert sorted(torch.cat(batches).tolist()) == y.tolist()
    assert all(len(batch) <= 20 and set(batch.tolist()) == {0, 1, 2} for batch in batches)


def test_lenet_fits_what_it_fits() -> None:
    for shape in ((1, 28, 28), (3, 32, 32), (1, 12, 12), (1, 13, 15)):
        assert models.build("LeNet", shape, 7)(torch.zeros(2, *shape)).shape == (2, 7)
    with pytest.raises(ValueError, match="at least 12 x 12"):
        models.build("LeNet", (1, 8, 8), 10)


def test_xavier_start() -> None:
    stack = NetworkStack("LeNet", 200, (1, 28, 28), 10, torch.device("cpu"))
    params = stack.sample(1)
    assert float(params["conv1.bias"].abs().max()) == 0
    assert float(params["fc1.weight"].std()) == pytest.approx((2 / (400 + 120)) ** 0.5, rel=0.02)
    assert float(params["conv2.weight"].std()) == pytest.approx((2 / (25 * (6 + 16))) ** 0.5, rel=0.02)
    assert torch.equal(stack.sample(1)["fc3.weight"], params["fc3.weight"])
    assert not torch.equal(stack.sample(2)["fc3.weight"], params["fc3.weight"])


class Transposed(torch.nn.Module):
    """Its weight is transposed in memory, and forward relies on it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(3, 2).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 2] -> [B, 3]."""
        return x @ self.w.t().view(6).view(3, 2).t()


def transposed_network(input_shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    return Transposed()


def test_parameters_keep_their_strides() -> None:
    """Regression: a stack of one's own networks was made contiguous, where rd.stack_modules keeps strides."""
    stack = NetworkStack(f"{__name__}:transposed_network", 2, (2,), 3, torch.device("cpu"))
    params = stack.sample(0)
    assert params["w"].stride()[1:] == (1, 2)
    assert stack.logits(params, torch.randn(4, 2)).shape == (2, 4, 3)
