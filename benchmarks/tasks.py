"""The training problems that speed and memory are measured on: the shapes of dataset distillation and its
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import revdistill as rd
from revdistill.outer import models

ROWS = 10  # synthetic batches, gone through again and again
MOMENTUM = 58982 / 2**16  # what revdistill makes of 0.9; all methods train alike


@dataclass(frozen=True)
class Task:
    """One training run to differentiate: with respect to its data and its step sizes, as distillation does.

    loss(params, batch) -> scalar; params: name -> tensor; batches: (x [s, B, ...] requiring grad, y [s, B]); outer: the
    loss of the parameters at the end; rate: the step size.
    """

    loss: Callable[[dict[str, Tensor], Any], Tensor]
    params: dict[str, Tensor]
    batches: tuple[Tensor, Tensor]
    outer: Callable[[dict[str, Tensor]], Tensor]
    rate: float

    def rates(self, steps: int) -> Tensor:
        """A learnable step size per step, float64 [T]."""
        device = self.batches[0].device
        return torch.full((steps,), self.rate, dtype=torch.float64, device=device, requires_grad=True)

    def optimizer(self, rates: Tensor) -> rd.SGD:
        return rd.SGD(lr=rates, momentum=MOMENTUM)


def tiny_networks(
    networks: int = 30, batch: int = 8
) -> tuple[Callable[..., Tensor], dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Networks 2-10-10-10-1 side by side, as one batched matrix product per layer."""
    widths = (2, 10, 10, 10, 1)
    params = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        params[f"{i}.weight"] = torch.randn(networks, fan_in, fan_out) * (2 / (fan_in + fan_out)) ** 0.5
        params[f"{i}.bias"] = torch.zeros(networks, 1, fan_out)

    def loss(params: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
        x, y = pair
        hidden = x.expand(networks, *x.shape)
        for i in range(4):
            hidden = torch.baddbmm(params[f"{i}.bias"], hidden, params[f"{i}.weight"])
            hidden = hidden.relu() if i < 3 else hidden
        target = y.to(hidden.dtype).expand(networks, -1)
        return F.binary_cross_entropy_with_logits(hidden.squeeze(-1), target, reduction="sum") / len(y)

    x = torch.randn(ROWS, batch, 2)
    return loss, params, (x, (x[..., 0] * x[..., 1] > 0).long())


def convnet(width: int = 64) -> nn.Module:
    """The field's ConvNet-3 on 32 x 32: three of convolution, instance norm, ReLU, average pooling."""
    layers: list[nn.Module] = []
    for i in range(3):
        layers += [
            nn.Conv2d(width if i else 3, width, 3, padding=1),
            nn.GroupNorm(width, width),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 16, 10))


class Residual(nn.Module):
    """The basic block of He et al. 2016, with GroupNorm."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.GroupNorm(16, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.GroupNorm(16, channels),
        )
        same = stride == 1 and channels_in == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, channels, H / stride, W / stride]."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 for 32 x 32, with GroupNorm for BatchNorm."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(16, 64), nn.ReLU()]
    channels = 64
    for width in (64, 128, 256, 512):
        layers += [Residual(channels, width, 1 if width == 64 else 2), Residual(width, width, 1)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Transformer(nn.Module):
    """A 4-layer pre-norm encoder over the 64 patches of 4 x 4 of a 32 x 32 image; width 128, 4 heads."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(64, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(9))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(4))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(4)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 32, 32] -> [B, 10]."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for i in range(4):
            q, k, v = self.qkv[i](self.norms[2 * i](tokens)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            tokens = tokens + self.out[i](attended)
            tokens = tokens + self.mlps[i](self.norms[2 * i + 1](tokens))
        logits: Tensor = self.head(self.norms[8](tokens).mean(1))
        return logits


@dataclass(frozen=True)
class Kind:
    """How a task is made: its network, the shape of one input, the batch size, the step size; and for what machines."""

    title: str
    network: Callable[[], nn.Module] | None
    shape: tuple[int, ...]
    batch: int
    rate: float
    for_gpu: bool = False


KINDS = {
    "tiny": Kind("30 stacked 2-10-10-10-1, batch 8", None, (2,), 8, 0.05),
    "mlp": Kind("MLP 784-100-100-10, batch 100", lambda: models.build("MLP", (1, 28, 28), 10), (1, 28, 28), 100, 0.01),
    "lenet": Kind("LeNet, batch 10", lambda: models.build("LeNet", (1, 28, 28), 10), (1, 28, 28), 10, 0.01),
    "convnet": Kind("ConvNet-3 width 64, 32 x 32, batch 20", convnet, (3, 32, 32), 20, 0.01),
    "resnet18": Kind("ResNet-18 GroupNorm, 32 x 32, batch 32", resnet18, (3, 32, 32), 32, 0.01, for_gpu=True),
    "transformer": Kind("4-layer transformer, 32 x 32, batch 32", Transformer, (3, 32, 32), 32, 0.01, for_gpu=True),
}


def make(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Task:
    """The task of that name; the same numbers each time."""
    torch.manual_seed(0)
    kind = KINDS[name]
    if kind.network is None:
        loss, params, (x, y) = tiny_networks(batch=kind.batch)
    else:
        net = kind.network().to(device, dtype)
        loss, params = rd.from_module(net, F.cross_entropy)
        x = torch.randn(ROWS, kind.batch, *kind.shape)
        y = torch.arange(ROWS * kind.batch).reshape(ROWS, kind.batch) % 10
    held_out = (torch.randn_like(x[0]).to(device, dtype), y[0].to(device))
    params = {p: t.detach().to(device, dtype) for p, t in params.items()}
    batches = (x.to(device, dtype).requires_grad_(), y.to(device))
    return Task(loss, params, batches, lambda theta: loss(theta, held_out), kind.rate)
