"""Networks side by side: how they start, what they take, and how they are evaluated."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from revdistill.distill.plots import draw_all
from revdistill.outer import models, networks
from revdistill.outer.data import load
from revdistill.outer.networks import NetworkStack
from tests.distill.test_artifact import artifact


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


CANONICAL = {
    "lenet": "LeNet",
    "convnet-3": "ConvNet-3",
    "ConvNet-3:width=64": "ConvNet-3:width=64",
    "convnet-3:norm=group,width=0064": "ConvNet-3:width=64,norm=group",
    "ConvNet-3:norm=instance,width=128": "ConvNet-3",
    "ConvNet-3:width=128,norm=none": "ConvNet-3:norm=none",
    "resnet-8:width=8": "ResNet-8:width=8",
    "AlexCifarNet:width=064": "AlexCifarNet",
    "ConvNet-3:width=1024": "ConvNet-3:width=1024",
}


def test_options_have_a_canonical_form() -> None:
    for name, expected in CANONICAL.items():
        assert models.canonical(name) == expected
        assert models.canonical(expected) == expected
        assert not models.is_own(name)
    assert "ConvNet-3 (width=128,norm=instance), ResNet-8 (width=16)" in models.shown()


OPTIONS, NUMBER = (
    "is unknown or given twice; accepted: width=128, norm=instance",
    "accepted is an integer from 1 to 1,024",
)
BAD = {
    "ConvNet-3:depth=4": f"option 'depth=4' {OPTIONS}",
    "ConvNet-3:width=8,width=8": f"option 'width=8' {OPTIONS}",
    "ConvNet-3:width": "width is ''",
    "ConvNet-3:64": f"option '64' {OPTIONS}",
    "ConvNet-3:": f"option '' {OPTIONS}",
    "ConvNet-3:width=8,": f"option '' {OPTIONS}",
    "ConvNet-3: width=8": f"option ' width=8' {OPTIONS}",
    "ConvNet-3:Width=8": f"option 'Width=8' {OPTIONS}",
    "ConvNet-3:width=0": f"width is '0'; {NUMBER}",
    "ConvNet-3:width=-8": f"width is '-8'; {NUMBER}",
    "ConvNet-3:width=1.5": f"width is '1.5'; {NUMBER}",
    "ConvNet-3:width=wide": f"width is 'wide'; {NUMBER}",
    "ConvNet-3:width=\uff11\uff12": f"width is '\uff11\uff12'; {NUMBER}",
    "ConvNet-3:width=1025": f"width is '1025'; {NUMBER}",
    "ConvNet-3:width=000001000000": f"width is '000001000000'; {NUMBER}",  # regression: its first digits counted
    f"ConvNet-3:width={'9' * 5000}": NUMBER,
    "ConvNet-3:norm=batch": "norm is 'batch'; accepted is instance, group, none",
    "LeNet:width=8": "option 'width=8' is unknown or given twice; accepted: none",
    "LeNet:small": "cannot import 'LeNet'",
    "VGG": "unknown architecture 'VGG'; accepted are LinearNet, ",
    "": "unknown architecture ''",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_names_are_refused(name: str) -> None:
    for call in (models.canonical, lambda name: models.build(name, (1, 16, 16), 3)):
        with pytest.raises(ValueError, match="architecture") as caught:
            call(name)
        assert BAD[name] in str(caught.value)


def test_a_module_may_have_an_architectures_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlp.py").write_text(
        "import torch\n\ndef make(shape, classes):\n    return torch.nn.Linear(2, classes)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert models.canonical("mlp:make") == "mlp:make"
    assert models.is_own("mlp:make")
    assert NetworkStack("mlp:make", 1, (2,), 3, torch.device("cpu")).sample(0)["weight"].shape == (1, 3, 2)
    sys.modules.pop("mlp")


def test_no_module_is_imported_that_a_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a name without a colon was, by the pictures of `revdistill show`."""
    (tmp_path / "imported_by_a_file.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="unknown architecture 'imported_by_a_file'; accepted are LinearNet"):
        draw_all(tmp_path, artifact(architectures=["imported_by_a_file"]), load("moons"), [])
    assert "imported_by_a_file" not in sys.modules


def image(channels: int, side: int) -> Tensor:
    return torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(side), dtype=torch.float64)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Over a group's channels and all places, with the biased variance."""
    parts = x.reshape(len(x), groups, -1)
    mean, variance = parts.mean(2, keepdim=True), parts.var(2, keepdim=True, unbiased=False)
    normal = ((parts - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    return normal * weight[:, None, None] + bias[:, None, None]


def drawn(name: str, channels: int, side: int) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    net = models.build(name, (channels, side, side), 5).double()
    for p in net.parameters():  # scales and shifts of norms too
        torch.nn.init.normal_(p, 0.0, 0.3, generator=torch.Generator().manual_seed(p.numel()))
    return net, dict(net.named_parameters())


@pytest.mark.parametrize(
    ("options", "width", "groups"),
    [("width=12,norm=group", 12, 4), ("width=6", 6, 6), ("width=5,norm=none", 5, 0), ("width=16,norm=group", 16, 8)],
)
@pytest.mark.parametrize("side", [8, 28])
def test_convnet(options: str, width: int, groups: int, side: int) -> None:
    net, p = drawn(f"ConvNet-3:{options}", 2, side)
    x, step = image(2, side), 4 if groups else 3
    for block in range(3):
        at = f"features.{block * step}"
        padding = 3 if side == 28 and block == 0 else 1
        x = F.conv2d(x, p[f"{at}.weight"], p[f"{at}.bias"], padding=padding)
        assert x.shape[1] == width
        if groups:
            norm = f"features.{block * step + 1}"
            x = group_norm(x, groups, p[f"{norm}.weight"], p[f"{norm}.bias"])
        x = F.avg_pool2d(x.clamp(min=0), 2)
    expected = x.flatten(1) @ p["classifier.weight"].T + p["classifier.bias"]
    torch.testing.assert_close(net(image(2, side)), expected, rtol=1e-9, atol=1e-9)


def test_resnet() -> None:
    net, p = drawn("ResNet-8:width=8", 3, 9)

    def normed(x: Tensor, name: str) -> Tensor:
        return group_norm(x, 8, p[f"{name}.weight"], p[f"{name}.bias"])

    x = normed(F.conv2d(image(3, 9), p["stem.0.weight"], padding=1), "stem.1").clamp(min=0)
    for block, (width, stride) in enumerate([(8, 1), (16, 2), (32, 2)]):
        at = f"blocks.{block}"
        inner = normed(F.conv2d(x, p[f"{at}.body.0.weight"], padding=1, stride=stride), f"{at}.body.1").clamp(min=0)
        inner = normed(F.conv2d(inner, p[f"{at}.body.3.weight"], padding=1), f"{at}.body.4")
        x = (inner + (x if stride == 1 else F.conv2d(x, p[f"{at}.skip.weight"], stride=2))).clamp(min=0)
        assert x.shape[1:] == (width, *([[9, 9], [5, 5], [3, 3]][block]))
    expected = x.mean((2, 3)) @ p["classifier.weight"].T + p["classifier.bias"]
    torch.testing.assert_close(net(image(3, 9)), expected, rtol=1e-9, atol=1e-9)
    scales = [name for name in p if len(p[name].shape) == 1 and name.endswith("weight")]
    start = NetworkStack("ResNet-8:width=8", 2, (3, 9, 9), 5, torch.device("cpu")).sample(0)
    assert all(torch.equal(start[name], torch.ones_like(start[name])) for name in scales)
    with pytest.raises(ValueError, match="at least 4 x 4"):
        models.build("ResNet-8", (3, 3, 9), 5)


def test_lenet_is_what_it_was() -> None:
    """Its numbers, and the order in which its parameters are drawn, which results depend on."""
    net, p = drawn("LeNet", 1, 28)
    x = F.max_pool2d(F.conv2d(image(1, 28), p["conv1.weight"], p["conv1.bias"], padding=2).clamp(min=0), 2)
    x = F.max_pool2d(F.conv2d(x, p["conv2.weight"], p["conv2.bias"]).clamp(min=0), 2).flatten(1)
    for name in ("fc1", "fc2", "fc3"):
        x = x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
        x = x if name == "fc3" else x.clamp(min=0)
    torch.testing.assert_close(net(image(1, 28)), x, rtol=1e-9, atol=1e-9)
    assert list(p) == [f"{layer}.{part}" for layer in LENET for part in ("weight", "bias")]
    generator = torch.Generator().manual_seed(4)
    start = NetworkStack("LeNet", 2, (1, 28, 28), 5, torch.device("cpu")).sample(4)
    for layer in LENET:
        shape = p[f"{layer}.weight"].shape
        std = math.sqrt(2 / (sum(shape[:2]) * math.prod(shape[2:])))
        assert torch.equal(start[f"{layer}.weight"], torch.randn(2, *shape, generator=generator) * std)


LENET = ("conv1", "conv2", "fc1", "fc2", "fc3")
