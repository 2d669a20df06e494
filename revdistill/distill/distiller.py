"""The outer loop: learn synthetic data through whole training runs (Wang et al. 2018, algorithm 1, with momentum)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.distill import augment
from revdistill.distill.artifact import Artifact
from revdistill.distill.config import Config
from revdistill.distill.synthetic import Synthetic
from revdistill.engine import NonFiniteError, RangeError, unroll
from revdistill.engine.loss.determinism import repeatable
from revdistill.outer.data import Dataset
from revdistill.outer.descent import Descent, clip_to, cosine
from revdistill.outer.device import check_device, compiled_on
from revdistill.outer.labels import are_numbers
from revdistill.outer.networks import NetworkStack
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
)

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

    Raises:
        ValueError: they do not go together.
    """

    def __init__(self, config: Config, data: Dataset) -> None:
        self.config = config
        self.device = check_device(config.device)
        self.data = data.to(self.device)
        if config.augment and not data.is_image:
            raise ValueError(f"augment is {config.augment!r}, but {data.name} has no images; accepted is none")
        self.synthetic = Synthetic(config, self.data)
        self._batches = Minibatches(self.data, config.batch_size, config.seed, MINIBATCHES)
        size = 1 if config.init == "fixed" else config.inits
        self.stacks = [
            NetworkStack(name, size, data.input_shape, data.classes, self.device) for name in config.architectures
        ]
        self.descent = Descent(
            self.synthetic.leaves,
            lr={name: self._outer_lr(name) for name in self.synthetic.leaves},
            betas=(config.outer_beta1, BETA2),
            decay=self._outer_decay,
            clip=clip_to(config.clip),
            average_from=config.outer_steps * (1 - config.average) if config.average else None,
            advice="a smaller lr, momentum or outer_lr",
        )
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
        outcome = self.descent.step(lambda k: self._outer_loss(k, x, y))
        return OuterStep(k, outcome.loss, outcome.norm, outcome.diverged)

    def _outer_lr(self, leaf: str) -> float:
        rates = self.config.outer_lr_rates
        return rates if rates is not None and leaf in _RATES else self.config.outer_lr

    def _outer_decay(self, k: int) -> float:
        share = k / self.config.outer_steps
        if self.config.outer_decay == "cosine":
            return cosine(share, 1)  # of the share, not of (k, outer_steps): that rounds in another way
        return 0.5 ** int(share * HALVINGS) if self.config.outer_decay == "halving" else 1.0

    def _outer_loss(self, k: int, x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros((), device=self.device)
        steps, transform = self._horizon(k), self._augmentation(k)
        for i, stack in enumerate(self.stacks):
            params = stack.sample(self._network_seed(k, i))
            theta = self._train(self.synthetic, stack, params, seed=k, steps=steps, transform=transform)
            total = total + stack.mean_loss(theta, transform(x), y)
        return total / len(self.stacks)

    def _horizon(self, k: int) -> int:
        """How many inner steps outer step k makes."""
        config, steps = self.config, self.config.inner_steps
        if config.grow:
            share = SHORTEST + (1 - SHORTEST) * (k + 1) / (config.grow * config.outer_steps)
            steps = max(1, min(steps, round(steps * share)))
        if config.window is not None:
            least = min(config.window, steps)
            steps = int(torch.randint(least, steps + 1, (), generator=generator(config.seed, HORIZON, k)))
        return steps

    def _augmentation(self, k: int) -> Callable[[Tensor], Tensor]:
        if not self.config.augment:
            return lambda images: images
        return augment.draw(self.config.augment, generator(self.config.seed, AUGMENTATION, k))

    def _train(
        self,
        synthetic: Synthetic,
        stack: NetworkStack,
        params: dict[str, Tensor],
        seed: int,
        steps: int,
        transform: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        momentum = synthetic.momentum()
        lr, momentum = synthetic.lr()[:steps], momentum[:steps] if isinstance(momentum, Tensor) else momentum
        return unroll(
            stack.loss,
            params,
            (transform(synthetic.x.flatten(0, 1)).reshape(synthetic.x.shape), synthetic.labels()),
            OPTIMIZERS[self.config.optimizer].engine(lr, momentum, self.config.weight_decay),
            steps=steps,
            adjoint=self.config.make_adjoint(),
            compile=compiled_on(self.device),
            seed=seed,
            window=self.config.window,
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

    def _network_seed(self, k: int, architecture: int) -> int:
        if self.config.init == "fixed":
            return fixed_network_seed(self.config.seed, architecture)
        return mix(self.config.seed, NETWORKS, k, architecture)

    @torch.no_grad()
    def validation_accuracy(self) -> float:
        """Mean accuracy on the held-out data, of networks that this outer step would draw; NaN where training fails."""
        with repeatable(self.device):
            return self._validation_accuracy()

    def _validation_accuracy(self) -> float:
        found = []
        for i, stack in enumerate(self.stacks):
            params = stack.sample(self._network_seed(self.outer_step, i))
            try:
                theta = self._train(
                    self.result,
                    stack,
                    params,
                    seed=self.outer_step,
                    steps=self.config.inner_steps,
                    transform=lambda images: images,
                )
            except (RangeError, NonFiniteError):
                return math.nan
            found.append(stack.accuracies(theta, self.data.x_validation, self.data.y_validation).mean())
        return float(torch.stack(found).mean())

    def artifact(self) -> Artifact:
        """What has been learned so far."""
        s, config = self.result, self.config
        momentum = s.momentum()
        with torch.no_grad():
            momenta = momentum.cpu() if isinstance(momentum, Tensor) else torch.full((config.inner_steps,), momentum)
            return Artifact(
                x=s.x.detach().cpu().numpy(),
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
