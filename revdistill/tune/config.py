"""Everything that defines a tuning: what is needed to run it again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from revdistill.outer import models
from revdistill.outer.configuration import LARGEST, LEAST_RATE, MANY, Configuration
from revdistill.outer.device import check_device
from revdistill.outer.optimizers import DEFAULT, OPTIMIZERS, accepted

LEARNABLE = ("lr", "momentum", "weight-decay", "init")


@dataclass(frozen=True)
class TuneConfig(Configuration):
    """What a tuning does.

    Args:
        dataset: a name, or the path of a file or folder.
        arch: the network that is trained.
        steps: T, training steps.
        learn: names of LEARNABLE. lr and momentum get a value for each step; weight decay and the factor on the initial
            weights get one.
        per_layer: whether each layer gets its own.
        optimizer: of the training, a name of OPTIMIZERS.
        lr: of the starting schedule.
        momentum: of the starting schedule, or what the optimizer has in its place.
        weight_decay: of the starting schedule.
        batch_size: real samples in each training step.
        inits: fresh networks in an outer step.
        side_by_side: how many of them are trained in one stack, the unit that processes share out; None for all. It is
            part of what is computed: a stack rounds in its own way.
        outer_steps: Adam steps on the schedule's logarithms and logits.
        outer_lr: their rate, which falls to 0 by a cosine.
        outer_batch: held-out samples in each outer loss.
        clip: the norm that a whole hypergradient is clipped to, 0 for no clipping.
        clip_back: of `rd.unroll`, against hypergradients that explode.
        window: of `rd.unroll`, likewise.
        device: cpu, cuda or cuda:N.
        threads: that torch computes with on the CPU; None for its own number. They are part of what is computed, as
            sums are split by thread. The command sets them; a configuration by itself does not.
        seed: of every random draw.

    Raises:
        ValueError: names the field, what came and what is accepted.
    """

    tuples: ClassVar[tuple[str, ...]] = ("learn",)
    dataset: str = "digits"
    arch: str = "MLP"
    steps: int = 100
    learn: tuple[str, ...] = ("lr",)
    per_layer: bool = False
    optimizer: str = DEFAULT
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 64
    inits: int = 1
    outer_steps: int = 50
    outer_lr: float = 0.1
    outer_batch: int = 1000
    clip: float = 1.0
    clip_back: float | None = None
    window: int | None = None
    side_by_side: int | None = None
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.need_counts(10 * MANY, "steps")
        self.need_counts(MANY, "inits")
        self.need_counts(LARGEST, "batch_size", "outer_steps", "outer_batch")
        self.need_side_by_side()
        self.need("seed", 0 <= self.seed < 2**31, "an integer from 0 to 2^31 - 1")
        self.need(
            "learn", bool(self.learn) and set(self.learn) <= set(LEARNABLE), f"names out of {', '.join(LEARNABLE)}"
        )
        self.need("optimizer", self.optimizer in OPTIMIZERS, accepted())
        self.need("lr", LEAST_RATE <= self.lr < 1e4, f"a number of at least {LEAST_RATE} and below 10,000")
        self.need("momentum", 0 <= self.momentum < 1, "a number from 0 to below 1")
        self.need("momentum", "momentum" not in self.learn or self.momentum > 0, "a number above 0 to learn it from")
        self.need("weight_decay", 0 <= self.weight_decay < 1e4, "a number of at least 0")
        self.need(
            "weight_decay",
            "weight-decay" not in self.learn or self.weight_decay > 0,
            "a number above 0 to learn it from",
        )
        self.need("outer_lr", 0 < self.outer_lr < 1e4, "a number above 0 and below 10,000")
        self.need("clip", 0 <= self.clip < 1e9, "0 (none) or a number above it")
        self.need("clip_back", self.clip_back is None or 0 < self.clip_back < math.inf, "a number above 0")
        self.need("window", self.window is None or 1 <= self.window <= LARGEST, f"an integer from 1 to {LARGEST:,}")
        self.need(
            "window",
            self.window is None or self.window >= self.steps or "init" not in self.learn,
            "none where init is learned",
        )
        object.__setattr__(self, "arch", models.canonical(self.arch))
        self.need_threads()
        check_device(self.device)
