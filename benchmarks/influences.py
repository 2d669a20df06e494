"""What the benchmarks of attribution on MNIST share: the data, one network, plain training, metagradients of the weight
of every label, TracIn, and how a ranking is judged.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

import revdistill as rd
from revdistill.outer.data import Dataset

CLASSES = 10
Examples = tuple[Tensor, Tensor]
Params = dict[str, Tensor]
Checkpoints = list[Params]


@dataclass(frozen=True)
class Recipe:
    """A training: SGD with momentum .9 over shuffled minibatches."""

    batch_size: int
    epochs: int
    lr: float

    def order(self, n: int, seed: int) -> Tensor:
        """int64 [T, B]."""
        return rd.epochs(n, min(self.batch_size, n), self.epochs, seed)


@dataclass(frozen=True)
class Ask:
    """What is differentiated: the queries' mean loss at a temperature; at the end of training, or, `along` it, the mean
    of that after each epoch of its second half (which costs no pass more).
    """

    temperature: float = 1.0
    along: bool = False


def network(seed: int) -> torch.nn.Module:
    """784-128-64-10, GELU: smooth."""
    torch.manual_seed(seed)
    widths = (784, 128, 64)
    layers = [m for a, b in itertools.pairwise(widths) for m in (torch.nn.Linear(a, b), torch.nn.GELU())]
    return torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], CLASSES))


def draw(data: Dataset, sizes: tuple[int, int, int], seed: int) -> tuple[Examples, Examples, Examples, Examples]:
    """Training, clean held-out and second held-out examples of these sizes, drawn by the seed; and all test ones."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randperm(len(data.x), generator=generator)[: sizes[0]]
    held = torch.randperm(len(data.x_validation), generator=generator)[: sizes[1] + sizes[2]]
    first, second = held[: sizes[1]], held[sizes[1] :]
    held_x = data.x_validation.flatten(1)
    return (
        (data.x[own].flatten(1), data.y[own]),
        (held_x[first], data.y_validation[first]),
        (held_x[second], data.y_validation[second]),
        (data.x_test.flatten(1), data.y_test),
    )


def outputs(net: torch.nn.Module, params: Params, x: Tensor) -> Tensor:
    """Logits, without a graph."""
    with torch.no_grad():
        found: Tensor = torch.func.functional_call(net, params, (x,))
    return found


def accuracy(net: torch.nn.Module, params: Params, examples: Examples) -> float:
    """Share of right answers."""
    return float((outputs(net, params, examples[0]).argmax(1) == examples[1]).float().mean())


def train(examples: Examples, recipe: Recipe, seed: int) -> tuple[torch.nn.Module, Checkpoints]:
    """A plain training by torch.optim.SGD; the parameters after each epoch."""
    net = network(seed)
    optimizer = torch.optim.SGD(net.parameters(), recipe.lr, momentum=0.9)
    order = recipe.order(len(examples[0]), seed)
    per_epoch, kept = len(order) // recipe.epochs, []
    for k, rows in enumerate(order):
        rows = rows[rows >= 0]
        optimizer.zero_grad()
        F.cross_entropy(net(examples[0][rows]), examples[1][rows]).backward()
        optimizer.step()
        if (k + 1) % per_epoch == 0:
            kept.append({name: p.detach().clone() for name, p in net.named_parameters()})
    return net, kept


@dataclass(frozen=True)
class Found:
    """What one training and its way back gave.

    Args:
        bars: [K, n, C], dL_q / dV_ic, V_ic being the weight with which example i is trained on as one of class c: the
            given label's column is the metagradient of the example's weight.
        losses: [n] of the examples at the end, by their given labels.
        log_p: [n, C] there.
        net: the network.
        theta: its parameters at the end.
    """

    bars: Tensor
    losses: Tensor
    log_p: Tensor
    net: torch.nn.Module
    theta: Params


def metagradient(
    examples: Examples,
    weights: Tensor,
    queries: Examples,
    recipe: Recipe,
    seed: int,
    asks: tuple[Ask, ...] = (Ask(),),
) -> Found:
    """Train with these weights of each label of each example [n, C]; differentiate what is asked through all of it."""
    net = network(seed)
    x, y = examples
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    table = weights.detach().clone().requires_grad_()

    def loss(params: Params, batch: Any) -> Tensor:
        log_p = torch.func.functional_call(net, params, (batch[0],)).log_softmax(1)
        return -(batch[1] * log_p).sum() / len(log_p)

    order = recipe.order(len(x), seed)
    per_epoch = len(order) // recipe.epochs
    at = [per_epoch * epoch for epoch in range(max(1, recipe.epochs // 2), recipe.epochs + 1)]
    batches, optimizer = rd.Minibatches((x, table), order), rd.SGD(recipe.lr, 0.9)
    saved = rd.unroll(loss, params, batches, optimizer, steps=len(order), save_at=at)
    logits = [
        torch.func.functional_call(net, {k: p[i] for k, p in saved.items()}, (queries[0],)) for i in range(len(at))
    ]
    measured = []
    for ask in asks:
        t, asked = ask.temperature, logits if ask.along else logits[-1:]
        measured.append(torch.stack([F.cross_entropy(z / t, queries[1]) * t for z in asked]).mean())
    bars = rd.jacobian(torch.stack(measured), table)
    theta = {name: p[-1].detach() for name, p in saved.items()}
    log_p = outputs(net, theta, x).log_softmax(1)
    return Found(bars, -log_p.gather(1, y[:, None])[:, 0], log_p, net, theta)


def one_hot(y: Tensor) -> Tensor:
    """The weights of each label where every example has but its own, with weight 1: [n, C]."""
    return F.one_hot(y, CLASSES).float()


def given(table: Tensor, y: Tensor) -> Tensor:
    """[n, C] -> [n]: the given label's entry."""
    return table.gather(1, y[:, None])[:, 0]


def against_the_best_other(table: Tensor, y: Tensor) -> Tensor:
    """[n, C] -> [n]: how much more the given label harms than the label that would harm least."""
    others = table.masked_fill(F.one_hot(y, CLASSES).bool(), float("inf"))
    return given(table, y) - others.min(1).values


def tracin(net: torch.nn.Module, checkpoints: Checkpoints, examples: Examples, queries: Examples, lr: float) -> Tensor:
    """[n]: -lr times the product of the example's gradient with that of the queries' mean loss, summed over
    checkpoints (Pruthi et al. 2020): positive is harmful, as a metagradient is.
    """
    total, ones = torch.zeros(len(examples[0])), torch.ones(len(examples[0]), requires_grad=True)
    for checkpoint in checkpoints:
        params = {name: p.clone().requires_grad_() for name, p in checkpoint.items()}

        def losses(asked: Examples, params: Params = params) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(net, params, (asked[0],)), asked[1], reduction="none")

        leaves = list(params.values())
        direction = torch.autograd.grad(losses(queries).mean(), leaves)
        # the derivative by each example's weight of the weighted gradient's product with the direction
        gradient = torch.autograd.grad((ones * losses(examples)).sum(), leaves, create_graph=True)
        total -= lr * torch.autograd.grad(gradient, ones, direction)[0]
    return total


def worst(scores: Tensor, count: int) -> Tensor:
    """Boolean [n]: the `count` with the largest scores."""
    found = torch.zeros(len(scores), dtype=torch.bool)
    found[scores.topk(count).indices] = True
    return found


def judged(scores: Tensor, truth: Tensor) -> dict[str, float]:
    """How well scores [n] find what is true [n]: AUROC, precision at the true number and among the worst 10 %."""
    return {
        "auroc": float(roc_auc_score(truth.numpy(), scores.numpy())),
        "precision": float(truth[worst(scores, int(truth.sum()))].float().mean()),
        "precision_worst_tenth": float(truth[worst(scores, len(scores) // 10)].float().mean()),
    }
