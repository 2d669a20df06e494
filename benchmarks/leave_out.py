"""The trainings of attribution.py and what is true of them: trained again in plain torch, without some examples.

5,000 MNIST images, batches of 64, 3 epochs (the last, smaller batch of an epoch is left out): 234 steps from one start
in one order, of pixels from 0 to 1; in a few cells of normalised ones (mean 0, standard deviation 1), where the same
rates make training less smooth. The losses of 50 test images are asked for. To leave an example out is to weigh its
loss by 0, with the divisor as it is. Nothing here is revdistill's but the reading of files: the truth must not share a
fault with what it measures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdistill.outer.data import load

EXAMPLES, QUERIES, BATCH, EPOCHS = 5_000, 50, 64, 3
MOMENTUM, BETAS, WEIGHT_DECAY = 0.9, (0.9, 0.999), 0.01  # AdamW's are torch's defaults
DROPS = (0.01, 0.05, 0.1)
KEPT_AT_ONCE = 5  # retrainings between two writes of the cache

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"ReLU": F.relu, "GELU": F.gelu}
ARCHITECTURES = ("MLP", "LeNet")
INPUTS = ("pixels", "normalised")


class Mlp(nn.Module):
    """784-128-64-10."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((784, 128), (128, 64), (64, 10)))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)  # type: ignore[no-any-return]


class LeNet(nn.Module):
    """The library's LeNet, with another activation."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((400, 120), (120, 84), (84, 10)))

    def forward(self, x: Tensor) -> Tensor:
        for convolution in (self.conv1, self.conv2):
            x = F.max_pool2d(self.activation(convolution(x)), 2)
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Images:
    """What is trained on and what is asked for.

    x: float32 [n, 1, 28, 28]; y: int64 [n]; x_queries, y_queries: likewise, [K]; order: int64 [T, B].
    """

    x: Tensor
    y: Tensor
    x_queries: Tensor
    y_queries: Tensor
    order: Tensor


def mnist(data_dir: str | Path, *, examples: int = EXAMPLES, queries: int = QUERIES) -> dict[str, Images]:
    """The first images of the library's training part, and of MNIST's test part, in each of INPUTS."""
    data = load("mnist", data_dir)
    y, order = data.y[:examples], epochs(min(examples, len(data.y)))
    mean, std = (torch.tensor(data.normalization[key]).float() for key in ("mean", "std"))
    normalised = Images(data.x[:examples], y, data.x_test[:queries], data.y_test[:queries], order)
    pixels = replace(normalised, x=normalised.x * std + mean, x_queries=normalised.x_queries * std + mean)
    return dict(zip(INPUTS, (pixels, normalised), strict=True))


def epochs(n: int) -> Tensor:
    """int64 [T, B]: a permutation for each epoch, cut into batches."""
    generator, size = torch.Generator().manual_seed(0), min(BATCH, n)
    return torch.cat([torch.randperm(n, generator=generator)[: n // size * size].view(-1, size) for _ in range(EPOCHS)])


@dataclass(frozen=True)
class Cell:
    """One training of the grid."""

    architecture: str
    activation: str
    optimizer: str  # SGD or AdamW
    lr: float
    eps: float = 1e-8  # of AdamW
    inputs: str = INPUTS[0]

    @classmethod
    def of(cls, results: Mapping[str, Any]) -> Cell:
        """From what was written of it, among other figures."""
        return cls(**{field.name: results[field.name] for field in fields(cls)})

    @property
    def name(self) -> str:
        """Of its files, and in the log."""
        eps = f"-eps{self.eps:g}" if self.optimizer == "AdamW" else ""
        return f"{self.architecture}-{self.activation}-{self.optimizer}-{self.lr:g}{eps}-{self.inputs}"

    def network(self) -> nn.Module:
        """At the start, which is the same for every training of this architecture."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return (Mlp if self.architecture == "MLP" else LeNet)(self.activation)

    def torch_optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        """torch's own."""
        if self.optimizer == "SGD":
            return torch.optim.SGD(net.parameters(), self.lr, MOMENTUM, fused=True)
        return torch.optim.AdamW(net.parameters(), self.lr, BETAS, self.eps, WEIGHT_DECAY, fused=True)


def cells() -> list[Cell]:
    """The grid; AdamW with eps 1e-3 beside torch's default; and the MLP at the smaller rates on normalised inputs."""
    found = []
    for architecture in ARCHITECTURES:
        for activation in ACTIVATIONS:
            found += [Cell(architecture, activation, "SGD", lr) for lr in (0.01, 0.03)]
            found += [Cell(architecture, activation, "AdamW", lr) for lr in (0.001, 0.003)]
        found.append(Cell(architecture, "GELU", "AdamW", 0.001, eps=1e-3))
    for cell in list(found):
        if cell.architecture == "MLP" and cell.lr in (0.01, 0.001):
            found.append(replace(cell, inputs="normalised"))
    return found


def train(
    cell: Cell, images: Images, weights: Tensor, on_step: Callable[[int, nn.Module], None] | None = None
) -> nn.Module:
    """One training in torch's own operators and optimizers.

    Args:
        cell: what is trained.
        images: on what.
        weights: float32 [n], of the examples.
        on_step: called with (k, network) before step k.
    """
    # channels last is faster where a convolution has one input channel
    net = cell.network().to(memory_format=torch.channels_last)
    optimizer = cell.torch_optimizer(net)
    for k, rows in enumerate(images.order):
        if on_step is not None:
            on_step(k, net)
        optimizer.zero_grad()
        losses = F.cross_entropy(net(images.x[rows]), images.y[rows], reduction="none")
        ((weights[rows] * losses).sum() / len(rows)).backward()
        optimizer.step()
    return net.eval()


def query_losses(net: nn.Module, images: Images) -> Tensor:
    """[K]."""
    with torch.no_grad():
        return F.cross_entropy(net(images.x_queries), images.y_queries, reduction="none")


def left_out(drop: float, number: int, n: int) -> Tensor:
    """bool [n]: the random subset that a retraining goes without, the same in every cell."""
    generator = torch.Generator().manual_seed(number)
    dropped = torch.zeros(n, dtype=torch.bool)
    dropped[torch.randperm(n, generator=generator)[: round(drop * n)]] = True
    return dropped


def truth(cell: Cell, images: Images, drop: float, retrainings: int, cache: Path) -> Tensor:
    """[R, K]: the queries' losses after R trainings without random subsets.

    Args:
        cell: what is trained.
        images: on what.
        drop: the share of examples left out.
        retrainings: R.
        cache: a folder; what it has already of this cell and drop is not trained again.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{cell.name}-drop{drop:g}.npy"
    found = list(np.load(path)) if path.exists() else []
    if not retrainings:
        return torch.empty(0, len(images.x_queries))
    while len(found) < retrainings:
        numbers = range(len(found), min(retrainings, len(found) + KEPT_AT_ONCE))
        for number in numbers:
            kept = (~left_out(drop, number, len(images.x))).float()
            found.append(query_losses(train(cell, images, kept), images).numpy())
        partial = path.with_suffix(".part.npy")
        np.save(partial, np.stack(found))
        partial.replace(path)
    return torch.from_numpy(np.stack(found[:retrainings]))


def smoothness(cell: Cell, images: Images, drop: float = 0.01) -> float:
    """Empirical metasmoothness of the trained parameters (Engstrom et al. 2025, definition 2), in [-1, 1]: three
    trainings, on the way from all examples to all without a random subset of them.
    """
    direction = left_out(drop, 0, len(images.x)).float()
    f = [
        torch.cat([p.detach().reshape(-1) for p in train(cell, images, 1 - part * direction).parameters()])
        for part in (0.0, 0.5, 1.0)
    ]
    first, second = f[1] - f[0], f[2] - f[1]
    return float((first.abs() * first.sign() * second.sign()).sum() / first.abs().sum())
