"""The outer loop: learn a training schedule through whole training runs (Maclaurin et al. 2015, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.engine import BackwardNorms, Optimizer, unroll
from revdistill.outer.data import Dataset
from revdistill.outer.descent import ClipTo, Descent, cosine
from revdistill.outer.device import check_device, compiled_on
from revdistill.outer.networks import NetworkStack, Params, Part
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.outer.random_streams import HELD_OUT, MINIBATCHES, NETWORKS, Minibatches, generator, mix, part_seed
from revdistill.outer.ranks import ALONE, Processes
from revdistill.tune.config import TuneConfig
from revdistill.tune.schedule import ALL, Schedule, layer_of

BETAS = (0.9, 0.99)  # of the outer Adam


@dataclass(frozen=True)
class TuneStep:
    """What an outer step was.

    Attributes:
        step: its number.
        loss: on held-out data after training.
        norm: of the hypergradient before clipping.
        longest: the largest norm of dL/dtheta_k on the way back.
        explosion: the training step where that norm passes a thousand times the smallest one before it, or None.
        diverged: why the step changed nothing: the training left the range or was not finite; None otherwise.
    """

    step: int
    loss: float
    norm: float
    longest: float
    explosion: int | None
    diverged: str | None = None


class Tuner:
    """One tuning. Every random draw is a function of (seed, outer step), so a resumed run draws the same ones.

    Args:
        config: what to do.
        data: what to train on.
        processes: that share the networks of a step; each makes all steps.

    Raises:
        ValueError: they do not go together.
    """

    def __init__(self, config: TuneConfig, data: Dataset, processes: Processes = ALONE) -> None:
        self.config, self.device, self.processes = config, check_device(config.device), processes
        self.data = data.to(self.device)
        self.stack = NetworkStack(config.arch, config.inits, data.input_shape, data.classes, self.device)
        self.parts = self.stack.parts(config.side_by_side)
        self._names = list(self.stack.sample(0))
        layers = list(dict.fromkeys(map(layer_of, self._names)))
        self.groups = layers if config.per_layer else [ALL]
        self._group = {name: layers.index(layer_of(name)) if config.per_layer else 0 for name in self._names}
        self.leaves = {name: raw.requires_grad_() for name, raw in self._start().items() if name in config.learn}
        self._fixed = {name: raw for name, raw in self._start().items() if name not in config.learn}
        self.descent = Descent(
            self.leaves,
            lr=config.outer_lr,
            betas=BETAS,
            decay=lambda k: cosine(k, config.outer_steps),
            clip=ClipTo(config.clip),
            advice="a smaller lr or outer_lr, or a clip_back",
            processes=processes,
        )

    @property
    def outer_step(self) -> int:
        """How many outer steps are done."""
        return self.descent.outer_step

    def _start(self) -> dict[str, Tensor]:
        """The starting schedule as what is learned: logarithms, and logits of momenta."""
        c, groups = self.config, len(self.groups)
        values = {
            "lr": torch.full((c.steps, groups), math.log(c.lr)),
            "momentum": torch.full((c.steps, groups), c.momentum).logit(),
            "weight-decay": torch.full((groups,), c.weight_decay).log(),
            "init": torch.zeros(groups),
        }
        return {name: value.to(self.device) for name, value in values.items()}

    def values(self) -> dict[str, Tensor]:
        """All that a schedule has, learned or not, differentiable: lr, momentum [T, G]; weight-decay, init [G]."""
        raw = self._fixed | self.leaves
        return {name: raw[name].sigmoid() if name == "momentum" else raw[name].exp() for name in raw}

    def step(self) -> TuneStep:
        """One Adam step on the schedule.

        Raises:
            RangeError, NonFiniteError: the tenth step in a row failed.
        """
        k, norms = self.outer_step, [BackwardNorms() for _ in self.parts]
        start = self.stack.sample(mix(self.config.seed, NETWORKS, k))
        outcome = self.descent.step_over(
            len(self.parts), lambda k, unit: self._outer_loss(k, self.parts[unit], start, norms[unit])
        )
        of_all = self._together(norms, outcome.diverged is None)
        longest = max(of_all.norms.values(), default=math.nan)
        return TuneStep(k, outcome.loss, outcome.norm, longest, of_all.explosion(), outcome.diverged)

    def _together(self, norms: list[BackwardNorms], fine: bool) -> BackwardNorms:
        """Of all units: the norm of their gradients side by side. fine: whether all were gone back through."""
        found = norms[0]
        if len(norms) == 1:
            return found
        found = BackwardNorms()
        if fine:
            steps = self.config.steps
            each = self.processes.share(
                [steps] * len(norms),
                lambda unit: torch.tensor(
                    [norms[unit].norms.get(k, math.nan) for k in range(steps)], dtype=torch.float64
                ),
                dtype=torch.float64,
            )
            sums = torch.stack(each).square().sum(0).sqrt().tolist()
            for k in reversed([k for k in range(steps) if not math.isnan(sums[k])]):
                found(k, sums[k])
        return found

    def _outer_loss(self, k: int, part: Part, start: Params, norms: BackwardNorms) -> Tensor:
        config, values = self.config, self.values()
        scales = values["init"]
        params = {name: scaled(p, scales[self._group[name]]) for name, p in part.take(start).items()}
        theta = unroll(
            part.stack.loss,
            params,
            Minibatches(self.data, config.batch_size, mix(config.seed, MINIBATCHES, k)),
            self._inner_optimizer(values),
            steps=config.steps,
            seed=part_seed(k, part.first),
            window=config.window,
            compile=compiled_on(self.device),
            clip_back=config.clip_back,
            on_step_back=norms,
        )
        size = min(config.outer_batch, len(self.data.x_validation))
        chosen = torch.randperm(len(self.data.x_validation), generator=generator(config.seed, HELD_OUT, k))[:size].to(
            self.device
        )
        loss = part.stack.mean_loss(theta, self.data.x_validation[chosen], self.data.y_validation[chosen])
        return loss * part.share

    def _inner_optimizer(self, values: dict[str, Tensor]) -> Optimizer:
        columns = {name: list(values[name].unbind(-1)) for name in ("lr", "momentum", "weight-decay")}
        lr, momentum, decay = ({p: column[g] for p, g in self._group.items()} for column in columns.values())
        return OPTIMIZERS[self.config.optimizer].engine(lr, momentum, decay)

    def schedule(self) -> Schedule:
        """What has been learned so far."""
        found = {name: value.detach().float().cpu().numpy() for name, value in self.values().items()}
        return Schedule(
            lr=found["lr"],
            momentum=found["momentum"],
            weight_decay=found["weight-decay"],
            init_scale=found["init"],
            optimizer=self.config.optimizer,
            groups=self.groups,
            config=self.config.to_dict(),
        )

    def starting_schedule(self) -> Schedule:
        """The schedule that the tuning starts from."""
        return Tuner(self.config, self.data).schedule()


def scaled(p: Tensor, scale: Tensor) -> Tensor:
    """Stacked initial parameters [E, ...], weights multiplied by the scale."""
    return p * scale if p.ndim >= 3 else p


def sample_scaled(stack: NetworkStack, seed: int, schedule: Schedule) -> Params:
    """Fresh parameters of a stack, scaled as the schedule says."""
    start = stack.sample(seed)
    scales = torch.from_numpy(schedule.init_scale)
    return {name: scaled(p, scales[schedule.group_of(name)].to(p.device)) for name, p in start.items()}
