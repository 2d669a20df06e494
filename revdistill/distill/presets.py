"""Settings that belong together. What they reach is in benchmarks/images.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from revdistill.distill.parametrization import REDUCED

# Wang et al. 2018: ten batches of one image per class, three times, plain gradient descent, four networks an outer
# step. (Their 400 epochs are some 23,000 outer steps.)
_WANG2018: dict[str, Any] = {
    "steps": 10,
    "epochs": 3,
    "per_class": 1,
    "momentum": 0.0,
    "inits": 4,
    "outer_steps": 1000,
    "batch_size": 1024,
    "lr": 0.02,
    "outer_lr": 0.01,
    "outer_decay": "halving",
    "start": "noise",
    "noise": 0.0,
    "clip": 0.0,
}
# Ten batches that start from centroids, gone through twenty times with momentum; soft labels; one network an outer
# step. Weight decay makes networks forget their random start, so that the same images suit more of them, and other
# architectures. Back through the last 60 of a random number of steps: half the time of all of them. The rates are
# hardly learned: where they grow, training turns chaotic, and what was learned is lost again.
_BEST: dict[str, Any] = {
    "steps": 10,
    "epochs": 20,
    "per_class": 1,
    "momentum": 0.9,
    "weight_decay": 0.03,
    "window": 60,
    "inits": 1,
    "outer_steps": 1800,
    "batch_size": 512,
    "lr": 0.008,
    "outer_lr": 0.015,
    "outer_lr_rates": 3e-4,
    "outer_beta1": 0.9,
    "average": 0.3,
    "start": "kmeans",
    "learn_labels": True,
    "noise": 0.0,
    "clip": 0.15,
}
PRESETS = ("wang2018", "best")
BUDGETS = (1, 10)  # images per class
# The architecture that a preset uses for a dataset where none is given.
USUAL = {"mnist": "LeNet", "fashion-mnist": "LeNet", "cifar10": "AlexCifarNet"}
_SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}  # of the data that "best" was tuned on; each has ten classes
_CLASSES = 10
# Many images from few bases, in one large batch: a network's way then depends little on its start, and its
# hypergradient is not torn about.
_BASES: dict[str, Any] = {
    "steps": 1,
    "per_class": 10,
    "epochs": 100,
    "weight_decay": 0.04,
    "window": 40,
    "lr": 0.017,
    "outer_steps": 250,
}
# Few inner steps, by Adam: with plain gradient descent a network is far from done after so many.
_ADAM: dict[str, Any] = {
    "pack": 2,
    "epochs": 3,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "window": 10,
    "lr": 0.003,
    "outer_lr": 0.03,
    "batch_size": 256,
    "outer_steps": 300,
}
# What is distilled for a narrow network suits the usual one, of width 128, whose every step takes ten times as long.
_CONVNET, _WIDER = "ConvNet-3:width=16", "ConvNet-3:width=32"
_COLOURS: dict[str, Any] = _BASES | {
    "epochs": 20,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "window": 8,
    "lr": 0.002,
    "outer_lr": 0.02,
    "start": "real",
    "outer_steps": 150,
}
# What "best" changes for a dataset, the architectures and the budget.
_TUNED: dict[tuple[str, tuple[str, ...], int], dict[str, Any]] = {
    ("mnist", ("LeNet",), 1): _BASES,
    ("mnist", ("LeNet",), 10): _BASES | {"steps": 4, "epochs": 25, "weight_decay": 0.02},
    ("mnist", (_CONVNET,), 1): _BASES
    | {"epochs": 40, "weight_decay": 0.01, "window": 12, "lr": 0.03, "outer_lr": 0.02, "batch_size": 256},
    ("mnist", (_CONVNET,), 10): _BASES
    | {"steps": 4, "epochs": 15, "weight_decay": 0.005, "window": 12, "lr": 0.04, "outer_lr": 0.02, "batch_size": 256}
    | {"start": "real"},
    ("mnist", ("LeNet", "MLP", _CONVNET), 10): _ADAM | {"window": 15},
    ("cifar10", (_WIDER,), 1): _COLOURS,
    ("cifar10", (_WIDER,), 10): _COLOURS | {"steps": 4, "epochs": 5},
    ("cifar10", ("ConvNet-3",), 10): {
        "epochs": 3,
        "momentum": 0.6,
        "weight_decay": 0.0,
        "window": None,
        "batch_size": 128,
        "lr": 0.01,
        "outer_lr": 0.05,
        "outer_lr_rates": 0.001,
        "outer_steps": 240,
        "pack": 1,
    },
    ("cifar10", ("AlexCifarNet",), 10): {
        "epochs": 8,
        "weight_decay": 0.0,
        "window": 25,
        "batch_size": 256,
        "lr": 0.012,
        "outer_lr": 0.03,
        "outer_lr_rates": 0.001,
        "outer_steps": 900,
        "pack": 1,
    },
}


def settings(
    preset: str, dataset: str, architectures: Sequence[str], budget: int = 10, soft: bool = True
) -> dict[str, Any]:
    """What a preset sets of a configuration.

    Args:
        preset: a name of PRESETS.
        dataset: that is distilled.
        architectures: that it is distilled for.
        budget: of "best", one of BUDGETS: what is stored of images has no more numbers than this many per class.
        soft: of "best", whether labels are learned. With bases they are a part of these numbers, else they come on top.

    Returns:
        Fields of Config, without these.
    """
    if preset == "wang2018":
        return dict(_WANG2018)
    found = _BEST | {"steps": budget, "learn_labels": soft}
    tuned = _TUNED.get((dataset, tuple(architectures), budget))
    if tuned is None or "pack" in tuned:
        return found | (tuned or {})
    found |= tuned
    return found | {"bases": _bases(_SHAPES[dataset], found["steps"] * found["per_class"], budget, soft)}


def _bases(shape: tuple[int, int, int], per_class: int, budget: int, soft: bool) -> int:
    """As many as fit the budget, with a coefficient of each for every image, and its label."""
    channels, height, width = shape
    images = _CLASSES * per_class
    numbers = _CLASSES * budget * channels * height * width - (images * _CLASSES if soft else 0)
    return numbers // (channels * (height // REDUCED) * (width // REDUCED) + images)
