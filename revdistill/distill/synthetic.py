"""What is learned: the synthetic batches, their step sizes, and on request their labels and momenta."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from revdistill.distill.config import Config
from revdistill.distill.parametrization import chosen
from revdistill.distill.starts import STARTS
from revdistill.outer.data import Dataset

RAW = "raw_"  # begins the names of leaves that are no part of inputs
LABEL_SMOOTHING = 0.1  # of the start of learned labels: a softmax at exactly one-hot could not learn


class Synthetic:
    """Leaf tensors by name, and the values that they stand for.

    Args:
        config: says what is learned and where it starts.
        data: what is distilled.

    Attributes:
        leaves: what Adam changes: those of the parametrization (x, or others that inputs are made of), raw_lr, and
            where they are learned raw_labels and raw_momentum.
        parametrization: what the inputs are made of.
    """

    def __init__(self, config: Config, data: Dataset) -> None:
        device = data.x.device
        generator = torch.Generator().manual_seed(config.seed)
        self._config = config
        stored = config.steps * data.classes * config.per_class
        self.parametrization = chosen(data.input_shape, stored, config.pack, config.bases)
        copies = config.per_class * self.parametrization.copies
        self.hard_labels = torch.arange(data.classes).repeat_interleave(copies).expand(config.steps, -1).to(device)
        t = config.inner_steps
        start = STARTS[config.start](data, config.steps, copies, generator)
        self.leaves: dict[str, Tensor] = {
            **self.parametrization.start(start),
            # softplus(raw_lr) = lr, in the form that does not overflow for a large lr
            "raw_lr": torch.full((t,), config.lr + math.log(-math.expm1(-config.lr)), device=device),
        }
        if config.learn_labels:
            hot = F.one_hot(self.hard_labels, data.classes).float()
            smoothed = hot * (1 - LABEL_SMOOTHING) + LABEL_SMOOTHING / data.classes
            self.leaves["raw_labels"] = smoothed.log()
        if config.learn_momentum:
            self.leaves["raw_momentum"] = torch.full(
                (t,), math.log(config.momentum / (1 - config.momentum)), device=device
            )
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def with_leaves(self, leaves: dict[str, Tensor]) -> Synthetic:
        """The same with other leaves."""
        other = copy.copy(self)
        other.leaves = leaves
        return other

    def stored(self) -> dict[str, Tensor]:
        """The leaves that inputs are made of."""
        return {name: leaf for name, leaf in self.leaves.items() if not name.startswith(RAW)}

    @property
    def x(self) -> Tensor:
        """Inputs, float32 [s, B, ...], B = classes x per_class x the parametrization's copies, ordered by class."""
        return self.parametrization.inputs(self.leaves)

    def lr(self) -> Tensor:
        """Step sizes softplus(raw_lr) [T]."""
        return F.softplus(self.leaves["raw_lr"])

    def momentum(self) -> float | Tensor:
        """sigmoid(raw_momentum) [T] where momenta are learned, otherwise the configuration's."""
        raw = self.leaves.get("raw_momentum")
        return self._config.momentum if raw is None else torch.sigmoid(raw)

    def labels(self) -> Tensor:
        """softmax(raw_labels) [s, B, C] where labels are learned, otherwise classes int64 [s, B]."""
        raw = self.leaves.get("raw_labels")
        return self.hard_labels if raw is None else torch.softmax(raw, -1)
