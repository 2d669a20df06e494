"""What images.py distils, row by row, and where its rows are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from revdistill.distill.config import Config
from revdistill.distill.presets import settings
from revdistill.distill.strategies import STRATEGIES

HARD, CUDA = "_hard", "_cuda"  # end the names of what was distilled with hard labels, and of what was on a GPU
# The learned steps, or as many as 50 epochs have. (Strategy 1 has rates of its own, which are for other data.)
SCHEDULES = tuple(name for name in STRATEGIES if name != "strategy1")
RAW = ("raw",)


@dataclass(frozen=True)
class Row:
    """What is distilled.

    Attributes:
        title: of its lines.
        budget: images in all whose numbers the result may have.
        config: of its distillation.
        published: what others report, in per cent.
        target: what was aimed at, in per cent.
        schedules: how networks may be trained on it; the best on held-out training data is taken.
        networks: that it is measured on; none for its own and all of the tables' columns.
        narrow: the network whose preset a GPU takes, for the usual network.
    """

    title: str
    budget: int
    config: Config
    published: str
    target: str
    schedules: tuple[str, ...] = SCHEDULES
    networks: tuple[str, ...] = ()
    narrow: str = ""

    @property
    def made_for(self) -> tuple[str, ...]:
        """The networks that it is for, at their usual width: narrow ones stand for them while it is distilled."""
        return tuple(name.partition(":")[0] for name in self.config.architectures)

    @property
    def on_gpu(self) -> Mapping[str, Any]:
        """What its distillation has there in the place of what fits a CPU: the usual network, back over more steps, as
        a GPU takes a batch in the time of one image.
        """
        if not self.narrow:
            return {}
        fields = settings("best", self.config.dataset, (self.narrow,), self.budget // 10, self.config.learn_labels)
        return fields | {"architectures": self.made_for, "window": 20, "batch_size": 1024, "inits": 2}

    def config_on(self, device: str) -> Config:
        """Of its distillation there."""
        return replace(self.config, device=device, **(self.on_gpu if device != "cpu" else {}))


TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}


def _row(dataset: str, network: str, per_class: int, published: str, target: str, on_gpu: str = "") -> Row:
    """What `revdistill train --preset best --dataset DATASET --arch NETWORK --budget PER_CLASS` distils."""
    config = _best(dataset, network, per_class)
    usual, narrow, _ = network.partition(":")
    title = f"{TITLES[dataset]}, {usual}, {per_class} per class"
    # A usual network takes a minute for 200 steps on a CPU: the learned steps alone.
    schedules, on_gpu = RAW if narrow else SCHEDULES, on_gpu or (network if narrow else "")
    return Row(title, per_class * 10, config, published, target, schedules, narrow=on_gpu)


def _best(dataset: str, network: str, per_class: int, soft: bool = True) -> Config:
    fields = settings("best", dataset, (network,), per_class, soft)
    return Config(dataset=dataset, architectures=(network,), **fields)


_PRESETS = {
    "mnist_lenet_10": _row("mnist", "LeNet", 1, "-", "93"),
    "mnist_lenet_100": _row("mnist", "LeNet", 10, "-", "97"),
    "mnist_convnet_10": _row("mnist", "ConvNet-3:width=16", 1, "94.2 (IDC)", "94"),
    "mnist_convnet_100": _row("mnist", "ConvNet-3:width=16", 10, "98.4 (IDC)", "98"),
    "cifar10_alexcifarnet_100": _row("cifar10", "AlexCifarNet", 10, "36.79 +- 1.18 (Wang et al.)", "48"),
    "cifar10_convnet_10": _row("cifar10", "ConvNet-3:width=32", 1, "55.7 (AT-BPTT++)", "40; 48 on a GPU"),
    "cifar10_convnet_100": _row(
        "cifar10", "ConvNet-3", 10, "74.9 (AT-BPTT++)", "48; 60 on a GPU", on_gpu="ConvNet-3:width=32"
    ),
}
# The setting of Wang et al. 2018, 10 steps, three times; by Adam, with images that hold four.
_STEPS_OF_2018: dict[str, Any] = settings("best", "", ()) | {
    "epochs": 3,
    "pack": 2,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "window": None,
    "lr": 0.003,
    "outer_lr": 0.03,
    "outer_steps": 400,
}
_FIXED: dict[str, Any] = {
    "steps": 1,
    "epochs": 10,
    "momentum": 0.9,
    "inits": 1,
    "outer_steps": 10_000,
    "batch_size": 256,
    "lr": 0.05,
    "outer_lr": 0.02,
    "outer_lr_rates": 0.01,
    "outer_beta1": 0.9,
    "average": 0.2,
    "learn_labels": True,
    "noise": 0.0,
}
_ALL = ("LeNet", "MLP", "ConvNet-3:width=16")
_OTHERS = {
    "mnist_all_100": Row(
        "MNIST, LeNet, MLP and ConvNet-3 at once, 10 per class",
        100,
        Config(dataset="mnist", architectures=_ALL, **settings("best", "mnist", _ALL, 10)),
        "-",
        "94 (worst)",
    ),
    "mnist_2018_100": Row(
        "MNIST, LeNet, 10 per class, 10 steps x 3 epochs",
        100,
        Config(dataset="mnist", architectures=("LeNet",), **_STEPS_OF_2018),
        "79.50 +- 8.08 (Wang et al.)",
        "92",
        RAW,
    ),
    "mnist_fixed_10": Row(
        "MNIST, LeNet, one fixed initialisation, 1 per class",
        10,
        Config(dataset="mnist", architectures=("LeNet",), init="fixed", **_FIXED),
        "94 (Wang et al.)",
        "96",
        RAW,
        ("LeNet",),
    ),
}


def _with_hard_labels(row: Row) -> Row:
    config = row.config
    config = _best(config.dataset, config.architectures[0], row.budget // 10, soft=False)
    return replace(row, title=f"{row.title}, hard labels", config=config)


ROWS: dict[str, Row] = {
    **{
        each: found
        for name, row in _PRESETS.items()
        for each, found in ((name, row), (name + HARD, _with_hard_labels(row)))
    },
    **_OTHERS,
}


@dataclass(frozen=True)
class Baseline:
    """Real images, or their centroids: start names a function of revdistill.distill.starts."""

    dataset: str
    budget: int
    start: str


BASELINES = {
    f"{dataset}_{budget}_{name}": Baseline(dataset, budget, start)
    for dataset in TITLES
    for budget in (10, 100)
    for name, start in (("random", "real"), ("kmeans", "kmeans"))
}


def row_of(name: str) -> Row:
    """The row that was kept under this name."""
    return ROWS[name.removesuffix(CUDA)]


def agrees(found: Config, config: Config, any_length: bool) -> bool:
    """Whether they are the same; any_length: but for the number of outer steps, which a time had set."""
    return found == (replace(config, outer_steps=found.outer_steps) if any_length else config)
