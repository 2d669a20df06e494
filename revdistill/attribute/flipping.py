"""How well labels that were made wrong on purpose are found, and what a network gains when they are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from revdistill.attribute.experiment import Experiment
from revdistill.outer.networks import NetworkStack
from revdistill.outer.orders import epochs
from revdistill.outer.random_streams import MINIBATCHES, evaluation_seed, mix
from revdistill.outer.ranks import ALONE, Processes
from revdistill.outer.training import train

WORST = 0.1  # of the examples: the share whose precision is reported
RESTARTS = 5  # fresh networks behind each accuracy
HARM, LOSS = "harm", "training_loss"  # what examples are ranked by
NONE, TRUE = "none", "flipped"  # what else trainings leave out
SAID = {
    NONE: "nothing",
    TRUE: "what was flipped",
    HARM: "the most harmful",
    LOSS: "the highest training losses",
}
LEFT_OUT = tuple(SAID)


@dataclass(frozen=True)
class Flipped:
    """What became of labels that were flipped on purpose.

    Attributes:
        share: of the labels that were to be flipped.
        flipped: how many were.
        examples: n.
        queries: K, clean test samples whose mean loss harm is about.
        auroc: of HARM and LOSS: the chance that a flipped example ranks above another one.
        worst: how many examples a tenth of them is.
        precision: of HARM and LOSS: the share of flipped ones among these, the highest ranked.
        test_samples: behind each accuracy; none of them is a query.
        accuracy: of fresh networks, trained on all examples but some: of LEFT_OUT, where HARM and LOSS leave out as
            many as were flipped, the highest ranked.
    """

    share: float
    flipped: int
    examples: int
    queries: int
    auroc: dict[str, float]
    worst: int
    precision: dict[str, float]
    test_samples: int
    accuracy: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """In the types of JSON."""
        return asdict(self)


def figures(
    experiment: Experiment, harm: np.ndarray, losses: np.ndarray, accuracies: dict[str, list[float]]
) -> Flipped:
    """The figures.

    Args:
        experiment: with labels that were flipped.
        harm: [n], each example's mean score.
        losses: [n], each example's own loss after the training: the plain rival.
        accuracies: of LEFT_OUT, of each fresh network.
    """
    from sklearn.metrics import roc_auc_score

    wrong = experiment.flipped.numpy()
    n, ranked = len(wrong), {HARM: harm, LOSS: losses}
    worst = max(1, round(WORST * n))
    return Flipped(
        share=experiment.config.flip,
        flipped=int(wrong.sum()),
        examples=n,
        queries=len(experiment.queries),
        auroc={name: float(roc_auc_score(wrong, by)) for name, by in ranked.items()},
        worst=worst,
        precision={name: float(wrong[highest(by, worst)].mean()) for name, by in ranked.items()},
        test_samples=len(experiment.rest),
        accuracy={
            name: {"mean": float(np.mean(each)), "std": float(np.std(each, ddof=1)), "accuracies": each}
            for name, each in accuracies.items()
        },
    )


def highest(by: np.ndarray, count: int) -> np.ndarray:
    """The positions of the largest values, largest first."""
    found: np.ndarray = np.argsort(-by, kind="stable")[:count]
    return found


def left_out(name: str, wrong: np.ndarray, harm: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Which examples a training leaves out: bool [n]. name: of LEFT_OUT."""
    chosen: dict[str, Callable[[], np.ndarray]] = {
        NONE: lambda: np.empty(0, np.int64),
        TRUE: lambda: np.flatnonzero(wrong),
        HARM: lambda: highest(harm, int(wrong.sum())),
        LOSS: lambda: highest(losses, int(wrong.sum())),
    }
    mask = np.zeros(len(wrong), bool)
    mask[chosen[name]()] = True
    return mask


def accuracies_without(
    experiment: Experiment, without: Sequence[np.ndarray], processes: Processes = ALONE
) -> list[list[float]]:
    """Test accuracies of RESTARTS fresh networks, trained by torch.optim on the examples that are left.

    Args:
        experiment: whose network, optimizer and number of epochs are taken.
        without: each bool [n], the examples that networks do not see; not all. All of them have the same starts.
        processes: that share the trainings.

    Returns:
        The networks' accuracies, of each of `without`.
    """
    c, data, device = experiment.config, experiment.data, experiment.device
    stack = NetworkStack(c.arch, RESTARTS, data.input_shape, data.classes, device)
    rest = experiment.rest.to(device)
    units = [(mask, part) for mask in without for part in stack.best_parts()]

    def accuracies(unit: int) -> torch.Tensor:
        mask, part = units[unit]
        kept = torch.from_numpy(np.flatnonzero(~mask)).to(device)
        x, y = experiment.x[kept], experiment.y[kept]
        order = epochs(len(kept), c.batch_size, c.epochs, evaluation_seed(mix(c.seed, MINIBATCHES))).to(device)

        def batch(k: int) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = order[k][order[k] >= 0]
            return x[chosen], y[chosen]

        own = part.take(stack.sample(evaluation_seed(c.seed)))
        train(
            part.stack,
            own,
            batch,
            optimizer=c.family,
            groups=[(list(own), c.weight_decay)],
            lr=[[c.rate]] * len(order),
            momentum=[[c.momentum]] * len(order),
            seed=evaluation_seed(c.seed) + part.first,
        )
        return part.stack.accuracies(own, data.x_test[rest], data.y_test[rest])

    shared = processes.share([part.stack.size for _, part in units], accuracies)
    each = len(units) // len(without)
    return [torch.cat(shared[i : i + each]).double().tolist() for i in range(0, len(units), each)]
