"""The training whose examples are attributed, made of a configuration and data: examples, queries, network, labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from revdistill.attribute.attribution import Attribution
from revdistill.attribute.config import MOST_EXAMPLES, AttributeConfig
from revdistill.attribute.metagradient import attribute
from revdistill.attribute.run import Run
from revdistill.engine import from_module
from revdistill.engine.loss.randomness import seeded
from revdistill.outer import models
from revdistill.outer.data import Dataset
from revdistill.outer.device import check_device
from revdistill.outer.networks import NetworkStack, Params, classification_loss
from revdistill.outer.orders import epochs
from revdistill.outer.random_streams import EXAMPLES, FLIPS, MINIBATCHES, NETWORKS, QUERIES, generator, mix
from revdistill.outer.ranks import ALONE, Processes

_AT_ONCE = 512  # samples whose losses are computed at once
_each = partial(classification_loss, reduction="none")


class Experiment:
    """One attribution's training. Every random draw is a function of the seed, so a resumed one draws the same.

    Args:
        config: what to do.
        data: what to train on.
        processes: that share the trainings beside the attribution itself, which each makes.

    Attributes:
        data: on the configuration's device.
        examples: int64 [n], the training samples that are taken, in ascending order, as positions in `data.x`.
        queries: int64 [K], the test samples, as positions in `data.x_test`.
        rest: int64, the other test samples.
        y: int64 [n], the examples' labels, as they are trained on.
        flipped: bool [n], which of them were made wrong on purpose.

    Raises:
        ValueError: they do not go together.
    """

    def __init__(self, config: AttributeConfig, data: Dataset, processes: Processes = ALONE) -> None:
        self.config, self.device, self.processes = config, check_device(config.device), processes
        self.data = data = data.to(self.device)
        _check_counts(config, data)
        count = min(len(data.x), MOST_EXAMPLES) if config.examples is None else config.examples
        drawn = torch.randperm(len(data.x), generator=generator(config.seed, EXAMPLES))[:count]
        self.examples = drawn.sort().values
        self.queries = balanced(data.y_test.cpu(), config.queries, generator(config.seed, QUERIES))
        others = torch.ones(len(data.y_test), dtype=torch.bool)
        others[self.queries] = False
        self.rest = others.nonzero()[:, 0]
        labels = data.y.cpu()[self.examples]
        y, self.flipped = flipped(labels, data.classes, config.flip, generator(config.seed, FLIPS))
        self.y = y.to(self.device)
        self.x = data.x[self.examples.to(self.device)]
        self.stack = NetworkStack(config.arch, 1, data.input_shape, data.classes, self.device)
        self._start = {n: p[0] for n, p in self.stack.sample(mix(config.seed, NETWORKS)).items()}
        with seeded(0, self.device):
            net = models.build(config.arch, data.input_shape, data.classes).to(self.device)
        self._loss, _ = from_module(net, _each)
        self._order = epochs(count, config.batch_size, config.epochs, mix(config.seed, MINIBATCHES))
        self._again: Run | None = None

    @property
    def steps(self) -> int:
        """T, the number of training steps."""
        return len(self._order)

    def attribute(self) -> Attribution:
        """The scores, with the trained network, and bars on stderr where that is a terminal. Errors: see
        `rd.attribute`.
        """
        c = self.config
        return attribute(
            self._loss,
            self._start,
            (self.x, self.y),
            c.family.engine(c.rate, c.momentum, c.weight_decay),
            order=self._order,
            queries=self._query_data(),
            measure=self._measure,
            seed=c.seed,
            progress=self.processes.first,
        )

    def run(self) -> Run:
        """The same training, to be made again with other weights of the examples."""
        if self._again is None:
            c = self.config
            self._again = Run(
                self._loss,
                self._start,
                (self.x, self.y),
                c.family.engine(c.rate, c.momentum, c.weight_decay),
                order=self._order,
                queries=self._query_data(),
                measure=self._measure,
                seed=c.seed,
            )
        return self._again

    def _query_data(self) -> tuple[Tensor, Tensor]:
        chosen = self.queries.to(self.device)
        return self.data.x_test[chosen], self.data.y_test[chosen]

    def _measure(self, theta: Params, queries: Sequence[Tensor]) -> Tensor:
        """Each sample's loss [K], as networks are evaluated: without dropout."""
        x, y = queries
        return _each(self.stack.logits({name: p[None] for name, p in theta.items()}, x)[0], y)

    @torch.no_grad()
    def training_losses(self, theta: Params) -> np.ndarray:
        """Each example's own loss after the training, with the label that it was trained with: float32 [n]."""
        parts = zip(torch.split(self.x, _AT_ONCE), torch.split(self.y, _AT_ONCE), strict=True)
        found: np.ndarray = torch.cat([self._measure(theta, part) for part in parts]).float().cpu().numpy()
        return found

    def test_accuracy(self, theta: Params) -> float:
        """Of the trained network, on all test samples."""
        stacked = {name: p[None] for name, p in theta.items()}
        return float(self.stack.accuracies(stacked, self.data.x_test, self.data.y_test)[0])


def _check_counts(c: AttributeConfig, data: Dataset) -> None:
    c.need(
        "examples",
        c.examples is None or c.examples <= len(data.x),
        f"an integer from 2 to {len(data.x):,}, the number of training samples of {data.name}",
    )
    most = len(data.x_test) - (c.flip > 0)
    what = "all but one of the test samples (flip measures accuracy on the others)" if c.flip else "the test samples"
    c.need("queries", c.queries <= most, f"an integer from 1 to {most:,}, {what} of {data.name}")


def balanced(y: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Samples drawn at random, as many of each class as of every other as far as the classes go.

    Args:
        y: int64 [N], classes.
        count: how many to draw, at most N.
        generator: of the CPU.

    Returns:
        int64 [count], positions in y: the first ones are of one class each.
    """
    order = torch.randperm(len(y), generator=generator)
    turn = torch.zeros(len(y), dtype=torch.int64)  # of each sample, how many of its class come before it
    for label in torch.unique(y).tolist():
        members = order[y[order] == label]
        turn[members] = torch.arange(len(members))
    # by turn, then by class; within both there is one sample
    ranked = (turn * (int(y.max()) + 1) + y).argsort()
    return ranked[:count]


def flipped(y: Tensor, classes: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels of which a share is wrong: another class, each as likely.

    Args:
        y: int64 [n].
        classes: how many there are, at least 2.
        share: of the labels that are changed: at least one and not all, unless it is 0.
        generator: of the CPU.

    Returns:
        The labels, and bool [n]: which of them were changed.
    """
    n, wrong = len(y), torch.zeros(len(y), dtype=torch.bool)
    if not share:
        return y, wrong
    wrong[torch.randperm(n, generator=generator)[: min(max(1, round(share * n)), n - 1)]] = True
    moved = torch.randint(1, classes, (n,), generator=generator)
    return torch.where(wrong, (y + moved) % classes, y), wrong
