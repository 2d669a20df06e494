"""What the experiments on hyperparameters share: networks on MNIST, plain training, outer Adam steps, and a random
search.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdistill.outer.data import Dataset
from revdistill.outer.descent import ClipTo, Descent, cosine

BATCH = 128
HELD_OUT = 2_000  # held-out samples of each outer loss
FINALISTS = 8  # of a random search: measured again, with other networks, before one is chosen

Train = Callable[[int], Callable[[Tensor], Tensor]]  # seed -> a trained network's logits


class Mnist:
    """The data, and the parts that are drawn from them by a seed."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def batch(self, seed: int, size: int = BATCH, of: int | None = None) -> Callable[[int], tuple[Tensor, Tensor]]:
        """k -> (x, y): a minibatch of the first `of` training samples, a function of (seed, k)."""
        count = of or len(self.data.x)

        def draw(k: int) -> tuple[Tensor, Tensor]:
            chosen = torch.randint(count, (size,), generator=torch.Generator().manual_seed(1_000_003 * seed + k))
            return self.data.x[chosen], self.data.y[chosen]

        return draw

    def held_out(self, seed: int) -> tuple[Tensor, Tensor]:
        """What chooses."""
        chosen = torch.randperm(len(self.data.x_validation), generator=torch.Generator().manual_seed(seed))[:HELD_OUT]
        return self.data.x_validation[chosen], self.data.y_validation[chosen]

    def held_out_loss(self, train: Train, seed: int) -> float:
        x, y = self.held_out(seed)
        with torch.no_grad():
            return float(F.cross_entropy(train(seed)(x), y))

    def measured(self, train: Train, restarts: int) -> dict[str, float]:
        """Fresh networks: held-out loss, test loss and accuracy."""
        held, losses, accuracies = [], [], []
        with torch.no_grad():
            for restart in range(restarts):
                logits = train(10**6 + restart)
                held.append(float(F.cross_entropy(logits(self.data.x_validation), self.data.y_validation)))
                found = logits(self.data.x_test)
                losses.append(float(F.cross_entropy(found, self.data.y_test)))
                accuracies.append(float((found.argmax(-1) == self.data.y_test).float().mean()))
        return {
            "held_out_loss": mean(held),
            "test_loss": mean(losses),
            "test_accuracy": mean(accuracies),
            "test_accuracy_std": stdev(accuracies) if restarts > 1 else 0.0,
        }


def network(seed: int) -> nn.Sequential:
    """784-50-50-50-10, tanh; Xavier weights, as the scale is learned from 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in ((784, 50), (50, 50), (50, 50), (50, 10)):
            linear = nn.Linear(inputs, outputs)
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.Tanh()]
        return nn.Sequential(*layers[:-1])


def regression(seed: int) -> nn.Module:
    """784-10; from small random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        nn.init.normal_(net[1].weight, std=0.01)  # type: ignore[arg-type]
        nn.init.zeros_(net[1].bias)  # type: ignore[arg-type]
        return net


def descend(
    leaves: dict[str, Tensor], outer_loss: Callable[[int], Tensor], *, rate: float, steps: int
) -> dict[str, Any]:
    """Adam steps on the leaves; the curve of outer losses, and the seconds."""
    descent = Descent(leaves, lr=rate, betas=(0.9, 0.99), decay=lambda k: cosine(k, steps), clip=ClipTo(1.0))
    curve, started = [], time.perf_counter()
    for k in range(steps):
        outcome = descent.step(outer_loss)
        if outcome.diverged:
            raise RuntimeError(f"outer step {k}: {outcome.diverged}")
        curve.append(outcome.loss)
        print(f"  outer step {k}: {curve[-1]:.4f}", flush=True)
    return {"curve": curve, "seconds": time.perf_counter() - started}


def random_search(
    mnist: Mnist, draw: Callable[[torch.Generator], tuple[Any, Train]], seconds: float
) -> tuple[Any, Train, int]:
    """The best of as many random candidates as fit in four fifths of the time; the rest measures the finalists
    again.
    """
    generator, started = torch.Generator().manual_seed(0), time.perf_counter()
    found: list[tuple[float, Any, Train]] = []
    while time.perf_counter() - started < 0.8 * seconds or not found:
        what, train = draw(generator)
        loss = mnist.held_out_loss(train, len(found))
        found.append((loss if math.isfinite(loss) else math.inf, what, train))
    finalists = sorted(found, key=lambda f: f[0])[:FINALISTS]
    losses = [[loss] for loss, _, _ in finalists]
    turn = 0
    while time.perf_counter() - started < seconds:
        i = turn % len(finalists)
        losses[i].append(mnist.held_out_loss(finalists[i][2], 10**5 + turn))
        turn += 1
    best = min(range(len(finalists)), key=lambda i: mean(losses[i]))
    return finalists[best][1], finalists[best][2], len(found)


def plain_training(
    net: nn.Module,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    lr: Tensor,
    momentum: Tensor,
    penalty: Tensor | float = 0.0,
) -> Callable[[Tensor], Tensor]:
    """torch.optim.SGD along rates [T, layers] and momenta [T]; penalty: of each weight of the last layer."""
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    optimizer = torch.optim.SGD([{"params": list(layer.parameters())} for layer in layers], lr=0.0)
    with torch.enable_grad():
        for k, (rates, mu) in enumerate(zip(lr.expand(len(lr), len(layers)).tolist(), momentum.tolist(), strict=True)):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"], group["momentum"] = rate, mu
            x, y = batch(k)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            if isinstance(penalty, Tensor) or penalty:
                loss = loss + (penalty * layers[-1].weight.square()).sum() / 2
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net
