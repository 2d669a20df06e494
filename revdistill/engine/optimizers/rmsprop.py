"""RMSprop as a list of moves (Tieleman & Hinton 2012; centred: Graves 2013), in torch.optim's form.

    s <- alpha s + (1 - alpha) g^2;  a <- alpha a + (1 - alpha) g;  g = gradient + weight_decay theta
    b <- momentum b + u;  theta <- theta - lr b;  u = g / (sqrt(s) + eps), or centred g / (sqrt(s - a^2) + eps)

u needs the gradient and changes b only: with momentum the change of theta is known without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from revdistill.engine.integers.fixedpoint import Wide
from revdistill.engine.integers.radix import COARSE, WIDE
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers import hyperparameters as hp
from revdistill.engine.optimizers import sources as of
from revdistill.engine.optimizers.clipping import Clipping
from revdistill.engine.optimizers.moves import Add, Decay, Factor, Move
from revdistill.engine.optimizers.optimizer import Optimizer
from revdistill.engine.optimizers.schedules import check_cycled
from revdistill.engine.optimizers.start import AT_REST, Start
from revdistill.engine.optimizers.update import Update


@dataclass(frozen=True, repr=False)
class RMSprop(Optimizer):
    """torch.optim.RMSprop's update. `Reversible` walks it back where momentum is above 0; else use `Checkpoint`.

    Where sqrt's argument is 0, its root has derivative 0. `Reversible` keeps 48 bytes per parameter (centred 72) and
    log2(1/alpha) + log2(1/momentum) bits per parameter and step (centred log2(1/alpha) more). One difference from
    torch: where momentum is 0 at some steps only, torch leaves b as it was in these; here b <- u, as in `SGD`.

    Args:
        lr: as in `SGD`.
        alpha: as momentum in `SGD`, below 1. It acts as the nearest n / 2^30.
        eps: as momentum in `SGD`, above 0.
        weight_decay: as in `SGD`.
        momentum: as in `SGD`.
        centered: divide by the gradient's standard deviation. Where gradients hardly change that is near 0, and u,
            whose only bound is |g| / eps, may leave the range of b (RangeError).
        max_norm: as in `SGD`.
    """

    lr: hp.Hyperparameter = 1e-2
    alpha: hp.Hyperparameter = 0.99
    eps: hp.Hyperparameter = 1e-8
    weight_decay: hp.Hyperparameter = 0.0
    momentum: hp.Hyperparameter = 0.0
    centered: bool = False
    max_norm: hp.Value | None = None
    slot_names: ClassVar[Mapping[str, str]] = {"s": "square_avg", "a": "grad_avg", "b": "momentum_buffer"}

    def resolve(self, layout: Layout, steps: int, start: Start = AT_REST) -> Update:
        if not isinstance(self.centered, bool):
            raise TypeError(f"centered must be a bool, got {type(self.centered).__name__}")
        numbers = partial(hp.resolve, layout=layout, steps=steps, stackable=False, taken=start.taken)
        check_cycled(self.lr, self.momentum, "momentum=scheduler")
        lr = numbers("lr", self.lr, stackable=True)
        alpha, eps = hp.below_one("alpha", numbers("alpha", self.alpha)), hp.above_zero("eps", numbers("eps", self.eps))
        momentum = hp.quantised(numbers("momentum", self.momentum, upper=1.0), COARSE)
        weight_decay, rest = numbers("weight_decay", self.weight_decay), hp.combined(lambda alpha: 1 - alpha, alpha)
        clipping = Clipping.of(self.max_norm, layout, steps, start.taken)
        g = of.Penalised(weight_decay if weight_decay.matters() else None)
        kick, step = Factor(tables={"1-alpha": rest}), Factor(-1.0, {"lr": lr})

        moves: list[Move] = [Decay("s", "alpha", alpha, layout, WIDE), Add("s", of.Square(g), kick)]
        if self.centered:
            moves += [Decay("a", "alpha", alpha, layout, WIDE), Add("a", g, kick)]
        u = _Scaled(g, alpha, eps, self.centered)
        if not hp.is_zero(self.momentum) or "b" in start.slots:
            moves += [Decay("b", "momentum", momentum, layout), Add("b", u), Add(of.THETA, of.Read("b"), step)]
        else:
            moves.append(Add(of.THETA, u, step, "momentum=0"))
        tables = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        return Update(layout, tables | {"1-alpha": rest}, tuple(moves), {"s": Wide(), "a": Wide()}, clipping)


@dataclass(frozen=True)
class _Scaled(of.Source):
    g: of.Source
    alpha: hp.Table
    eps: hp.Table
    centered: bool

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.g.reads, "s", *(("a",) if self.centered else ()))

    @property
    def tables(self) -> Mapping[str, hp.Table]:
        return {**self.g.tables, "eps": self.eps}

    def value(self, values: of.Values, step: of.Step) -> Tensor:
        variance = (values["s"] - values["a"].square()).relu() if self.centered else values["s"]  # rounded, maybe < 0
        return self.g.value(values, step) / (step.root(variance) + step.of(self.eps))

    def bound(self, k: int, bounds: Mapping[str, float]) -> float:
        """(1 - alpha) g^2 <= s + lost, so |g| / (sqrt(s) + eps) <= (1 + sqrt(lost) / eps) / sqrt(1 - alpha)."""
        eps, rest = min(self.eps.row(k)), 1 - max(self.alpha.row(k))
        if self.centered:
            return self.g.bound(k, bounds) / eps * of.SLACK
        return (1 + math.sqrt(2 * Wide.resolution / rest) / eps) / math.sqrt(rest) * of.SLACK
