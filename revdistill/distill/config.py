"""Everything that defines a distillation: what is needed to run it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from revdistill.distill.augment import AUGMENTATIONS
from revdistill.distill.parametrization import MOST_PACKED
from revdistill.distill.starts import STARTS
from revdistill.engine import Adjoint, Backprop, Checkpoint, Reversible, StoreAll
from revdistill.outer import models
from revdistill.outer.configuration import LARGEST, LEAST_RATE, MANY, Configuration
from revdistill.outer.device import check_device
from revdistill.outer.optimizers import DEFAULT, OPTIMIZERS, accepted

ADJOINTS: dict[str, type[Adjoint]] = {
    "reversible": Reversible,
    "checkpoint": Checkpoint,
    "store-all": StoreAll,
    "backprop": Backprop,
}
# Of one architecture's unroll: any machine has this memory, and a short unroll is faster with it.
OUTER_DECAYS = ("cosine", "halving", "none")
INITS = ("random", "fixed")


@dataclass(frozen=True)
class Config(Configuration):
    """What a distillation does.

    Args:
        dataset: a name, or the path of a file or folder.
        architectures: distil for all of them at once.
        steps: s, the number of synthetic batches.
        epochs: how often a network trains on all of them; T = s x epochs inner steps.
        per_class: images of each class in a batch.
        optimizer: of the inner training, a name of OPTIMIZERS.
        momentum: of the inner training, or what the optimizer has in its place.
        learn_momentum: whether to learn a momentum for each inner step, from `momentum` on.
        weight_decay: of the inner training, as torch.optim has it; part of the result, not learned.
        inits: networks of each architecture in an outer step.
        side_by_side: how many of them are trained in one stack, the unit that processes share out; None for all. It is
            part of what is computed: a stack rounds in its own way.
        outer_steps: Adam steps on what is learned.
        batch_size: real samples in each.
        lr: where the inner step sizes start; one is learned for each inner step.
        outer_lr: the rate of the Adam steps.
        init: "random" draws new networks at every outer step, "fixed" distils for one network.
        start: a name of STARTS, what the synthetic data are at first.
        pack: a stored image holds pack x pack smaller ones, which are enlarged for training (Kim et al. 2022); 1 for
            none.
        bases: store images as combinations of this many of half the height and width (Deng & Russakovsky 2022); None
            for images as they are.
        smooth: distil with networks whose ReLUs are softplus of this beta; they are evaluated with ReLU. 0 for ReLU.
        zca: whiten the inputs; the result says how.
        learn_labels: whether to learn soft labels.
        noise: standard deviation of Gaussian noise on the real samples, which keeps a small training set from being
            learned by heart; None for 0.5 on images and 0 otherwise.
        clip: the norm that a hypergradient is clipped to, 0 for no clipping.
        outer_lr_rates: the rate of the Adam steps on step sizes and momenta; None for `outer_lr`.
        outer_decay: "cosine" takes the outer rates to 0, "halving" halves them ten times, as Wang et al., "none" keeps
            them.
        outer_beta1: of the Adam steps.
        average: the share of the outer steps, the last ones, whose iterates are averaged for the result.
        clip_mean: also clip to this many times the running mean of the hypergradients' norms (Feng et al. 2023), 0 for
            no such clipping.
        window: each outer step makes a random number of inner steps, from `window` to T, and goes back over the last
            `window` only (Feng et al. 2023); None, or T and more, goes back over all T.
        window_every: outer steps after which that number is drawn anew.
        pool: this many networks of different ages are kept; at each outer step one of them makes its next `window`
            steps (Zhou et al. 2022). 0 for new networks each time.
        grow: the share of the outer steps over which the number of inner steps grows, from a tenth of T.
        augment: names of AUGMENTATIONS; at each outer step one of them changes real and synthetic images alike (Zhao &
            Bilen 2021).
        adjoint: a name of ADJOINTS; None for the engine's choice.
        device: cpu, cuda or cuda:N.
        threads: that torch computes with on the CPU; None for its own number. They are part of what is computed, as
            sums are split by thread. The command sets them; a configuration by itself does not.
        seed: of every random draw.

    Raises:
        ValueError: names the field, what came and what is accepted.
    """

    tuples: ClassVar[tuple[str, ...]] = ("architectures", "augment")
    dataset: str = "digits"
    architectures: tuple[str, ...] = ("MLP",)
    steps: int = 30
    epochs: int = 3
    per_class: int = 1
    optimizer: str = DEFAULT
    momentum: float = 0.7
    learn_momentum: bool = False
    weight_decay: float = 0.0
    inits: int = 2
    outer_steps: int = 150
    batch_size: int = 512
    lr: float = 0.05
    outer_lr: float = 0.05
    init: str = "random"
    start: str = "real"
    pack: int = 1
    bases: int | None = None
    smooth: float = 0.0
    zca: bool = False
    learn_labels: bool = False
    noise: float | None = None
    clip: float = 1.0
    clip_mean: float = 0.0
    outer_lr_rates: float | None = None
    outer_decay: str = "cosine"
    outer_beta1: float = 0.5
    average: float = 0.0
    window: int | None = None
    window_every: int = 1
    pool: int = 0
    grow: float = 0.0
    augment: tuple[str, ...] = ()
    adjoint: str | None = None
    side_by_side: int | None = None
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.need_counts(MANY, "steps", "epochs", "per_class", "inits")
        self.need_counts(LARGEST, "outer_steps", "batch_size", "window_every")
        self.need_counts(MOST_PACKED, "pack")
        self.need("bases", self.bases is None or 1 <= self.bases <= MANY, f"an integer from 1 to {MANY:,}")
        self.need("bases", self.bases is None or self.pack == 1, "none with pack: images are stored in one of the ways")
        self.need("smooth", self.smooth == 0 or 1 <= self.smooth <= 1e4, "0 (ReLU) or a number from 1 to 10,000")
        self.need("pool", 0 <= self.pool <= MANY, f"an integer from 0 to {MANY:,}")
        self.need("pool", not self.pool or self.window is not None, "0 without a window: give window as well")
        self.need("pool", not self.pool or not self.grow, "0 with grow: networks of a pool have ages of their own")
        self.need("seed", 0 <= self.seed < 2**31, "an integer from 0 to 2^31 - 1")
        self.need("momentum", 0 <= self.momentum <= 1, "a number from 0 to 1")
        self.need("optimizer", self.optimizer in OPTIMIZERS, accepted())
        family = OPTIMIZERS[self.optimizer]
        fine = not family.momentum_below_one or self.momentum < 1
        self.need("momentum", fine, f"a number below 1, as {family.title}'s {family.momentum_name}")
        self.need("weight_decay", 0 <= self.weight_decay < 1e4, "a number of at least 0 and below 10,000")
        self.need("lr", LEAST_RATE <= self.lr < 1e4, f"a number of at least {LEAST_RATE} and below 10,000")
        self.need("outer_lr", 0 < self.outer_lr < 1e4, "a number above 0 and below 10,000")
        rates = self.outer_lr_rates
        self.need("outer_lr_rates", rates is None or 0 <= rates < 1e4, "a number of at least 0 and below 10,000")
        self.need("outer_decay", self.outer_decay in OUTER_DECAYS, ", ".join(OUTER_DECAYS))
        self.need("outer_beta1", 0 <= self.outer_beta1 < 1, "a number from 0 to below 1")
        self.need("average", 0 <= self.average <= 1, "a number from 0 to 1")
        self.need("grow", 0 <= self.grow <= 1, "a number from 0 to 1")
        self.need("window", self.window is None or 1 <= self.window <= LARGEST, f"an integer from 1 to {LARGEST:,}")
        self.need("augment", set(self.augment) <= set(AUGMENTATIONS), f"names out of {', '.join(AUGMENTATIONS)}")
        self.need("noise", self.noise is None or 0 <= self.noise < 1e4, "a number of at least 0")
        self.need("clip", 0 <= self.clip < 1e9, "0 (none) or a number above it")
        self.need("clip_mean", 0 <= self.clip_mean < 1e9, "0 (none) or a number above it")
        self.need("init", self.init in INITS, " or ".join(INITS))
        self.need("start", self.start in STARTS, ", ".join(STARTS))
        self.need_side_by_side()
        self.need("adjoint", self.adjoint is None or self.adjoint in ADJOINTS, ", ".join(ADJOINTS))
        self.need("architectures", bool(self.architectures), "at least one name")
        if self.learn_momentum:
            self.need("momentum", 0 < self.momentum < 1, "a number between 0 and 1 to start from, with learn_momentum")
        object.__setattr__(self, "architectures", tuple(models.canonical(name) for name in self.architectures))
        self.need_threads()
        check_device(self.device)

    @property
    def inner_steps(self) -> int:
        """T"""
        return self.steps * self.epochs

    def make_adjoint(self) -> Adjoint | None:
        """What `rd.unroll` takes as `adjoint`; None for its own choice."""
        return None if self.adjoint is None else ADJOINTS[self.adjoint]()
