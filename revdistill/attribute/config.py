"""Everything that defines an attribution of the command's: what is needed to run it again."""

from __future__ import annotations

from dataclasses import dataclass

from revdistill.outer import models
from revdistill.outer.configuration import LARGEST, LEAST_RATE, MANY, Configuration
from revdistill.outer.device import check_device
from revdistill.outer.optimizers import OPTIMIZERS, Family, accepted

MOST_EXAMPLES = 5000  # taken where nobody says how many: more of them take minutes
RATES = {"sgd": 0.01}  # learning rates where none is given, of the optimizers whose steps have the gradient's size
RATE = 1e-3  # of the others
EPS = 1e-3  # where none is given: with 1e-8, Adam's first steps have the sign of the gradient, which is not smooth


@dataclass(frozen=True)
class AttributeConfig(Configuration):
    """What an attribution does.

    Args:
        dataset: a name, or the path of a file or folder.
        arch: the network that is trained.
        examples: n, how many training samples are taken, drawn by the seed; None for all, but 5,000 at most.
        epochs: how often the training takes each of them.
        batch_size: B, samples in each training step.
        optimizer: of the training, a name of OPTIMIZERS.
        lr: its learning rate; None for 0.01 (sgd) or 0.001 (others).
        momentum: its momentum, or what it has in its place.
        weight_decay: as torch.optim has it.
        eps: of the optimizer; None for 0.001 where it has one.
        queries: K, how many test samples' losses are attributed.
        check: whether to train again without random subsets, and to compare.
        drop: the share of the examples in each subset.
        retrainings: how many subsets.
        flip: the share of the examples whose labels are made wrong on purpose; 0 for none.
        device: cpu, cuda or cuda:N.
        threads: that torch computes with on the CPU; None for its own number. They are part of what is computed, as
            sums are split by thread. The command sets them; a configuration by itself does not.
        seed: of every random draw.

    Raises:
        ValueError: names the field, what came and what is accepted.
    """

    dataset: str = "digits"
    arch: str = "MLP-GELU"
    examples: int | None = None
    epochs: int = 5
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.01
    eps: float | None = None
    queries: int = 50
    check: bool = False
    drop: float = 0.01
    retrainings: int = 50
    flip: float = 0.0
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.need_counts(MANY, "epochs", "queries")
        self.need_counts(LARGEST, "batch_size")
        self.need(
            "examples", self.examples is None or 2 <= self.examples <= LARGEST, f"an integer from 2 to {LARGEST:,}"
        )
        self.need("retrainings", 3 <= self.retrainings <= MANY, f"an integer from 3 to {MANY:,}")
        self.need("seed", 0 <= self.seed < 2**31, "an integer from 0 to 2^31 - 1")
        self.need("optimizer", self.optimizer in OPTIMIZERS, accepted())
        # What is taken for None is kept: a later release may take another value, and must not for a job of this one.
        if self.lr is None:
            object.__setattr__(self, "lr", RATES.get(self.optimizer, RATE))
        self.need("lr", LEAST_RATE <= self.rate < 1e4, f"a number of at least {LEAST_RATE} and below 10,000")
        self.need("momentum", 0 <= self.momentum < 1, "a number from 0 to below 1")
        self.need("weight_decay", 0 <= self.weight_decay < 1e4, "a number of at least 0 and below 10,000")
        has_eps = OPTIMIZERS[self.optimizer].with_eps is not None
        self.need("eps", self.eps is None or has_eps, f"none with optimizer {self.optimizer}, which has no eps")
        if self.eps is None and has_eps:
            object.__setattr__(self, "eps", EPS)
        self.need("eps", self.eps is None or 0 < self.eps < 1e4, "a number above 0 and below 10,000")
        self.need("drop", 0 < self.drop < 1, "a share of the examples above 0 and below 1")
        self.need("flip", 0 <= self.flip < 1, "a share of the examples from 0 to below 1")
        object.__setattr__(self, "arch", models.canonical(self.arch))
        self.need_threads()
        check_device(self.device)

    @property
    def rate(self) -> float:
        """The learning rate."""
        assert self.lr is not None
        return self.lr

    @property
    def family(self) -> Family:
        """The optimizer, with this eps."""
        family = OPTIMIZERS[self.optimizer]
        return family if family.with_eps is None or self.eps is None else family.with_eps(self.eps)
