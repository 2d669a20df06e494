"""The outer loop: learn synthetic data through whole training runs (Wang et al. 2018, algorithm 1, with momentum)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from revdistill.distill import augment
from revdistill.distill.artifact import Artifact
from revdistill.distill.augment import Transform
from revdistill.distill.config import Config
from revdistill.distill.fresh import FreshNetworks, Units
from revdistill.distill.parametrization import Pixels
from revdistill.distill.pool import Member, Pool
from revdistill.distill.synthetic import Synthetic
from revdistill.engine import NonFiniteError, OptimizerState, RangeError, unroll
from revdistill.engine.loss.determinism import repeatable
from revdistill.outer.data import Dataset
from revdistill.outer.descent import ClipTo, Descent, Outcome, cosine
from revdistill.outer.device import check_device, compiled_on
from revdistill.outer.labels import are_numbers
from revdistill.outer.networks import NetworkStack, Params, Part
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.outer.random_streams import (
    AUGMENTATION,
    FIXED_NETWORK,
    HORIZON,
    MINIBATCHES,
    NETWORKS,
    NOISE,
    Minibatches,
    generator,
    mix,
    part_seed,
)
from revdistill.outer.ranks import ALONE, Processes
from revdistill.outer.whitening import Whitening

BETA2 = 0.999
HALVINGS = 10  # Wang et al. halve every 40 of 400 epochs
SHORTEST = 0.1  # of T, where the unroll grows
_RATES = ("raw_lr", "raw_momentum")
IMAGE_NOISE = 0.5  # in units of the standard deviation of the normalised images


@dataclass(frozen=True)
class OuterStep:
    """What an outer step was.

    Attributes:
        step: its number.
        loss: the networks' mean loss on a real batch after training.
        norm: of the hypergradient before clipping.
        diverged: why the step changed nothing: the inner training left the range or was not finite; None otherwise.
    """

    step: int
    loss: float
    norm: float
    diverged: str | None = None


class Distiller:
    """One distillation. Every random draw is a function of (seed, outer step), so a resumed run draws the same ones.

    Args:
        config: what to do.
        data: what to distil.
        processes: that share the networks of a step; each makes all steps.

    Raises:
        ValueError: they do not go together.
    """

    def __init__(self, config: Config, data: Dataset, processes: Processes = ALONE) -> None:
        self.config, self.processes = config, processes
        self.device = check_device(config.device)
        self.given = data
        self.whitening = Whitening.of(data.x) if config.zca else None
        self.data = (data if self.whitening is None else self.whitening.of_data(data)).to(self.device)
        if config.augment and not data.is_image:
            raise ValueError(f"augment is {config.augment!r}, but {data.name} has no images; accepted is none")
        self.synthetic = Synthetic(config, self.data)
        self._batches = Minibatches(self.data, config.batch_size, config.seed, MINIBATCHES)
        size = 1 if config.init == "fixed" else config.inits
        self.stacks = [self._stack(name, size, config.smooth) for name in config.architectures]
        self._plain = [self._stack(name, size, 0.0) for name in config.architectures] if config.smooth else self.stacks
        self.units, self._plain_units = self._units(self.stacks), self._units(self._plain)
        self.descent = Descent(
            self.synthetic.leaves,
            lr={name: self._outer_lr(name) for name in self.synthetic.leaves},
            betas=(config.outer_beta1, BETA2),
            decay=self._outer_decay,
            clip=ClipTo(config.clip, config.clip_mean),
            average_from=config.outer_steps * (1 - config.average) if config.average else None,
            advice="a smaller lr, momentum or outer_lr",
            processes=processes,
        )
        self.pool = self._pool() if config.pool else None
        default_noise = IMAGE_NOISE if data.is_image else 0.0
        self._noise = default_noise if config.noise is None else config.noise

    @property
    def outer_step(self) -> int:
        """How many outer steps are done."""
        return self.descent.outer_step

    def step(self) -> OuterStep:
        """One Adam step on data, rates and whatever else is learned.

        Raises:
            RangeError, NonFiniteError: the tenth step in a row failed.
        """
        k = self.outer_step
        x, y = self._real_batch(k)
        transform = self._augmentation(k)
        take = self._new_networks if self.pool is None else self._pooled_networks
        outcome = take(k, transform, transform(x), y)
        return OuterStep(k, outcome.loss, outcome.norm, outcome.diverged)

    def _new_networks(self, k: int, transform: Transform, x: Tensor, y: Tensor) -> Outcome:
        """The step with networks that are drawn for it."""
        steps, networks = self._horizon(k), self._fresh_networks(self.units)

        def outer_loss(k: int, unit: int) -> Tensor:
            part, params = networks.of(unit)
            theta = self._train(self.synthetic, part, params, seed=k, steps=steps, transform=transform)
            return part.stack.mean_loss(theta, x, y) * (part.share / len(self.stacks))

        return self.descent.step_over(len(self.units), outer_loss)

    def _pooled_networks(self, k: int, transform: Transform, x: Tensor, y: Tensor) -> Outcome:
        """The step with the next steps of networks in the pool."""
        assert self.pool is not None
        try:
            number, member = self.pool.draw(k)
        except (RangeError, NonFiniteError) as error:
            return self.descent.failed(error)
        ends: list[tuple[Params, dict[str, Params]]] = []

        def outer_loss(k: int, i: int) -> Tensor:
            theta, end = self._train_on(member, i, seed=k, steps=self.window, transform=transform)
            ends.append(end)
            return self.stacks[i].mean_loss(theta, x, y) / len(self.stacks)

        outcome = self.descent.step_over(len(self.stacks), outer_loss)
        self.pool.members[number] = None
        if outcome.diverged is None:
            params, slots = zip(*ends, strict=True)
            self.pool.members[number] = Member(member.age + self.window, params, slots)
        return outcome

    def fresh(self, k: int, age: int) -> Member:
        """Networks for the pool, trained for `age` steps."""
        drawn = tuple(stack.sample(self.network_seed(k, i)) for i, stack in enumerate(self.stacks))
        member = Member(0, drawn, ({},) * len(drawn))
        if not age:
            return member
        with torch.no_grad(), repeatable(self.device):
            ends = [
                self._train_on(member, i, seed=k, steps=age, transform=self._augmentation(k))[1]
                for i in range(len(drawn))
            ]
        params, slots = zip(*ends, strict=True)
        return Member(age, params, slots)

    def _train_on(
        self, member: Member, i: int, seed: int, steps: int, transform: Transform
    ) -> tuple[Params, tuple[Params, dict[str, Params]]]:
        """Go on with stack i of a member; the parameters at the end, and with the optimizer's slots without a graph."""
        part = self.stacks[i].parts()[0]
        theta, state = self._train(
            self.synthetic, part, member.params[i], seed, steps, transform, state=member.state(i), return_state=True
        )
        kept = state.detach()
        slots = {slot: dict(of) for slot, of in kept.slots.items()}
        return theta, ({name: p.detach() for name, p in theta.items()}, slots)

    def _stack(self, name: str, size: int, smooth: float) -> NetworkStack:
        return NetworkStack(name, size, self.data.input_shape, self.data.classes, self.device, smooth)

    def _units(self, stacks: list[NetworkStack]) -> Units:
        return [(i, part) for i, stack in enumerate(stacks) for part in stack.parts(self.config.side_by_side)]

    def _pool(self) -> Pool:
        if self.processes.started:
            raise ValueError("pool keeps networks in one process; leave it out under torchrun, or start one process")
        return Pool(self.config.pool, self.window, self.config.inner_steps, self.config.seed, self.fresh)

    @property
    def window(self) -> int:
        """The inner steps that an outer step goes back over."""
        return min(self.config.window or self.config.inner_steps, self.config.inner_steps)

    def _outer_lr(self, leaf: str) -> float:
        rates = self.config.outer_lr_rates
        return rates if rates is not None and leaf in _RATES else self.config.outer_lr

    def _outer_decay(self, k: int) -> float:
        share = k / self.config.outer_steps
        if self.config.outer_decay == "cosine":
            return cosine(share, 1)  # of the share, not of (k, outer_steps): that rounds in another way
        return 0.5 ** int(share * HALVINGS) if self.config.outer_decay == "halving" else 1.0

    def _horizon(self, k: int) -> int:
        """How many inner steps outer step k makes."""
        config, steps = self.config, self.config.inner_steps
        if config.grow:
            share = SHORTEST + (1 - SHORTEST) * (k + 1) / (config.grow * config.outer_steps)
            steps = max(1, min(steps, round(steps * share)))
        if config.window is not None:
            least = min(config.window, steps)
            drawn = generator(config.seed, HORIZON, k // config.window_every)
            steps = int(torch.randint(least, steps + 1, (), generator=drawn))
        return steps

    def _augmentation(self, k: int) -> Transform:
        if not self.config.augment:
            return lambda images: images
        return augment.draw(self.config.augment, generator(self.config.seed, AUGMENTATION, k))

    def _train(
        self,
        synthetic: Synthetic,
        part: Part,
        params: Params,
        seed: int,
        steps: int,
        transform: Transform,
        state: OptimizerState | None = None,
        return_state: bool = False,
    ) -> Any:
        momentum, first = synthetic.momentum(), state.step if state else 0
        these = slice(first, first + steps)
        lr, momentum = synthetic.lr()[these], momentum[these] if isinstance(momentum, Tensor) else momentum
        x = synthetic.x
        return unroll(
            part.stack.loss,
            params,
            (transform(x.flatten(0, 1)).reshape(x.shape), synthetic.labels()),
            OPTIMIZERS[self.config.optimizer].engine(lr, momentum, self.config.weight_decay),
            steps=steps,
            adjoint=self.config.make_adjoint(),
            compile=compiled_on(self.device),
            seed=part_seed(seed, part.first),
            window=self.config.window,
            state=state,
            return_state=return_state,
        )

    @property
    def result(self) -> Synthetic:
        """What the artifact would hold now: the mean of the last iterates once there is one, else the last iterate."""
        descent = self.descent
        return self.synthetic.with_leaves(descent.averages) if descent.averaged else self.synthetic

    def _real_batch(self, k: int) -> tuple[Tensor, Tensor]:
        """Batch k of the shuffled epochs of the training set, with noise."""
        x, y = self._batches(k)
        if self._noise:
            x = x + self._noise * torch.randn(x.shape, generator=generator(self.config.seed, NOISE, k)).to(self.device)
        return x, y

    def _fresh_networks(self, units: Units) -> FreshNetworks:
        return FreshNetworks(self.stacks, units, partial(self.network_seed, self.outer_step))

    def network_seed(self, k: int, architecture: int) -> int:
        """Of the networks of an architecture, by its position, at outer step k."""
        if self.config.init == "fixed":
            return fixed_network_seed(self.config.seed, architecture)
        return mix(self.config.seed, NETWORKS, k, architecture)

    @torch.no_grad()
    def validation_accuracy(self) -> float:
        """Mean accuracy on the held-out data, of networks that this outer step would draw; NaN where training fails."""
        with repeatable(self.device):
            return self._validation_accuracy()

    def _validation_accuracy(self) -> float:
        units = self._plain_units
        networks, result = self._fresh_networks(units), self.result

        def accuracies(unit: int) -> Tensor:
            part, params = networks.of(unit)
            theta = self._train(
                result,
                part,
                params,
                seed=self.outer_step,
                steps=self.config.inner_steps,
                transform=lambda images: images,
            )
            return part.stack.accuracies(theta, self.data.x_validation, self.data.y_validation)

        try:
            sizes = [part.stack.size for _, part in units]
            found = self.processes.share(sizes, accuracies, device=self.device)
        except (RangeError, NonFiniteError):
            return math.nan
        means = [
            torch.cat([each for each, (j, _) in zip(found, units, strict=True) if i == j]).mean()
            for i in range(len(self.stacks))
        ]
        return float(torch.stack(means).mean())

    def artifact(self) -> Artifact:
        """What has been learned so far."""
        s, config = self.result, self.config
        momentum = s.momentum()
        stored = {name: leaf.detach().cpu() for name, leaf in s.stored().items()}  # inputs as a reader makes them
        with torch.no_grad():
            momenta = momentum.cpu() if isinstance(momentum, Tensor) else torch.full((config.inner_steps,), momentum)
            return Artifact(
                x=s.parametrization.inputs(stored).numpy(),
                form={} if isinstance(s.parametrization, Pixels) else {name: t.numpy() for name, t in stored.items()},
                pack=config.pack,
                whitening=self.whitening,
                y=s.labels().detach().cpu().numpy(),
                lr=s.lr().detach().cpu().numpy(),
                momentum=momenta.detach().numpy(),
                optimizer=config.optimizer,
                weight_decay=config.weight_decay,
                dataset=self.data.name,
                architectures=list(config.architectures),
                epochs=config.epochs,
                seed=config.seed,
                normalization=self.data.normalization,
                config=config.to_dict(),
                classes=[] if are_numbers(self.data.class_names) else list(self.data.class_names),
            )


def fixed_network_seed(seed: int, architecture: int) -> int:
    """The seed of the one network of init="fixed", for the architecture at this position of the configuration."""
    return mix(seed, FIXED_NETWORK, architecture)
