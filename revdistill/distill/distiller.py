"""The outer loop: learn synthetic data through whole training runs (Wang et al. 2018, algorithm 1, with momentum)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.distill.artifact import Artifact
from revdistill.distill.config import Config, check_device
from revdistill.distill.data import Dataset
from revdistill.distill.population import Population
from revdistill.distill.synthetic import Synthetic
from revdistill.engine import SGD, NonFiniteError, RangeError, unroll

BETAS = (0.5, 0.999)  # as in Wang et al.
MAX_FAILURES = 10
IMAGE_NOISE = 0.5  # in units of the standard deviation of the normalised images


@dataclass(frozen=True)
class OuterStep:
    """loss: the networks' mean loss on a real batch after training; norm: of the hypergradient before clipping.

    diverged: the inner training left the range or was not finite, so this step changed nothing.
    """

    step: int
    loss: float
    norm: float
    diverged: str | None = None


class Distiller:
    """One distillation. Every random draw is a function of (seed, outer step), so a resumed run draws the same numbers."""

    def __init__(self, config: Config, data: Dataset) -> None:
        self.config = config
        self.device = check_device(config.device)
        self.data = data.to(self.device)
        self.synthetic = Synthetic(config, self.data)
        size = 1 if config.init == "fixed" else config.inits
        self.populations = [Population(name, size, data.input_shape, data.classes, self.device) for name in config.architectures]
        self.optimizer = torch.optim.Adam(list(self.synthetic.leaves.values()), lr=config.outer_lr, betas=BETAS)
        self.outer_step = 0
        self._failures = 0
        default_noise = IMAGE_NOISE if data.is_image else 0.0
        self._noise = default_noise if config.noise is None else config.noise

    def step(self) -> OuterStep:
        """One Adam step on data, rates and whatever else is learned."""
        k = self.outer_step
        x, y = self._real_batch(k)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.outer_lr * 0.5 * (1 + math.cos(math.pi * k / self.config.outer_steps))
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = self._outer_loss(k, x, y)
            loss.backward()  # type: ignore[no-untyped-call]
        except (RangeError, NonFiniteError) as error:
            return self._skip(k, error)
        leaves = list(self.synthetic.leaves.values())
        norm = float(torch.nn.utils.get_total_norm([leaf.grad for leaf in leaves if leaf.grad is not None]))
        if not math.isfinite(norm):
            return self._skip(k, NonFiniteError("the hypergradient's norm is not finite", parameter=None, step=0))
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(leaves, self.config.clip)
        self.optimizer.step()
        self._failures = 0
        self.outer_step = k + 1
        return OuterStep(k, loss.item(), norm)

    def _outer_loss(self, k: int, x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros((), device=self.device)
        for i, population in enumerate(self.populations):
            params = population.sample(self._network_seed(k, i))
            total = total + population.mean_loss(self._train(population, params, seed=k), x, y)
        return total / len(self.populations)

    def _train(self, population: Population, params: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        synthetic = self.synthetic
        return unroll(
            population.loss,
            params,
            (synthetic.x, synthetic.labels()),
            SGD(synthetic.lr(), synthetic.momentum()),
            steps=self.config.inner_steps,
            adjoint=self.config.make_adjoint(),
            seed=seed,
        )

    def _skip(self, k: int, error: RangeError | NonFiniteError) -> OuterStep:
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise type(error)(
                f"{MAX_FAILURES} outer steps in a row diverged; a smaller lr, momentum or outer_lr avoids it. The last: {error}",
                **error.__dict__,
            ) from error
        self.outer_step = k + 1
        return OuterStep(k, math.nan, math.nan, diverged=str(error))

    def _real_batch(self, k: int) -> tuple[Tensor, Tensor]:
        """Batch k of the shuffled epochs of the training set."""
        count = len(self.data.x)
        size = min(self.config.batch_size, count)
        per_epoch = count // size
        epoch, position = divmod(k, per_epoch)
        order = torch.randperm(count, generator=_generator(self.config.seed, 1, epoch))
        chosen = order[position * size : (position + 1) * size].to(self.device)
        x = self.data.x[chosen]
        if self._noise:
            x = x + self._noise * torch.randn(x.shape, generator=_generator(self.config.seed, 4, k)).to(self.device)
        return x, self.data.y[chosen]

    def _network_seed(self, k: int, architecture: int) -> int:
        if self.config.init == "fixed":
            return fixed_network_seed(self.config.seed, architecture)
        return mix(self.config.seed, 2, k, architecture)

    @torch.no_grad()
    def validation_accuracy(self) -> float:
        """Mean accuracy on the held-out data of networks that this outer step would draw."""
        found = []
        for i, population in enumerate(self.populations):
            try:
                theta = self._train(population, population.sample(self._network_seed(self.outer_step, i)), seed=self.outer_step)
            except (RangeError, NonFiniteError):
                return math.nan
            found.append(population.accuracies(theta, self.data.x_validation, self.data.y_validation).mean())
        return float(torch.stack(found).mean())

    def artifact(self) -> Artifact:
        """What was learned, as it stands."""
        s, config = self.synthetic, self.config
        momentum = s.momentum()
        with torch.no_grad():
            momenta = momentum.cpu() if isinstance(momentum, Tensor) else torch.full((config.inner_steps,), momentum)
            return Artifact(
                x=s.x.detach().cpu().numpy(),
                y=s.labels().detach().cpu().numpy(),
                lr=s.lr().detach().cpu().numpy(),
                momentum=momenta.detach().numpy(),
                dataset=self.data.name,
                architectures=list(config.architectures),
                epochs=config.epochs,
                seed=config.seed,
                normalization=self.data.normalization,
                config=config.to_dict(),
            )


def fixed_network_seed(seed: int, architecture: int) -> int:
    """The seed of the one network of init="fixed", for the architecture of this position."""
    return mix(seed, 3, architecture)


def mix(*numbers: int) -> int:
    """One seed from several small numbers."""
    seed = 0
    for n in numbers:
        seed = (seed * 0x9E3779B1 + n + 1) % 2**62
    return seed


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(*numbers))
