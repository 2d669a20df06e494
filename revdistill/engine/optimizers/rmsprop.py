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

from torch import Tensor

from revdistill.engine.integers.fixedpoint import Wide
from revdistill.engine.integers.radix import COARSE, WIDE
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers import hyperparameters as hp
from revdistill.engine.optimizers.moves import Add, Decay, Move
from revdistill.engine.optimizers.optimizer import Optimizer
from revdistill.engine.optimizers.sources import (
    GRADIENT,
    SLACK,
    THETA,
    Read,
    Source,
    Square,
    Step,
    Values,
    penalised,
    penalised_bound,
)
from revdistill.engine.optimizers.update import Update


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """torch.optim.RMSprop's update. With momentum above 0 `Reversible` walks it back; without, use `Checkpoint` (the
    default).

    Where sqrt's argument is 0 its root has derivative 0. `Reversible` keeps 48 bytes per parameter (theta and b in one
    word, s in two, a head for s and b; centred 24 more) and log2(1/alpha) + log2(1/momentum) bits per parameter and
    step.

    Args:
        lr, alpha, eps, weight_decay, momentum: a float, a tensor of shape () or [T], or a dict from each parameter's
        name to
            one of these; lr also [T, E] for stacked networks. Tensors may require grad. lr and weight_decay at least 0,
            eps above 0, alpha at least 0 and below 1 (the nearest n / 2^30), momentum 0 to 1 (the nearest n / 2^16).
        centered: divide by the standard deviation of the gradient. Where gradients hardly change that is near 0, and
            u may pass the range of b (RangeError): it has no bound but |g| / eps.
    """

    lr: hp.Hyperparameter = 1e-2
    alpha: hp.Hyperparameter = 0.99
    eps: hp.Hyperparameter = 1e-8
    weight_decay: hp.Hyperparameter = 0.0
    momentum: hp.Hyperparameter = 0.0
    centered: bool = False

    def resolve(self, layout: Layout, steps: int) -> Update:
        if not isinstance(self.centered, bool):
            raise TypeError(f"centered must be a bool, got {type(self.centered).__name__}")
        numbers = partial(hp.resolve, layout=layout, steps=steps, stackable=False)
        lr, eps = hp.resolve("lr", self.lr, layout, steps, stackable=True), numbers("eps", self.eps)
        alpha = hp.below_one("alpha", numbers("alpha", self.alpha))
        momentum = hp.quantised(numbers("momentum", self.momentum, upper=1.0), COARSE)
        weight_decay = numbers("weight_decay", self.weight_decay)
        if not all(map(all, eps.host)):
            raise ValueError("eps must be above 0 at every step")
        penalty = None if weight_decay.is_zero() and not weight_decay.values.requires_grad else weight_decay
        rest = hp.combined(lambda alpha: 1 - alpha, alpha)
        kick, step = hp.Factor(tables={"1-alpha": rest}), hp.Factor(-1.0, {"lr": lr})

        moves: list[Move] = [Decay("s", "alpha", alpha, alpha.segments(layout), WIDE)]
        if self.centered:
            moves += [Decay("a", "alpha", alpha, alpha.segments(layout), WIDE), Add("a", Read(GRADIENT), kick)]
            if penalty is not None:
                moves.append(Add("a", Read(THETA), hp.Factor(tables={"1-alpha": rest, "weight_decay": penalty})))
        moves.append(Add("s", Square(penalty), kick))
        scaled = _Scaled(alpha, eps, penalty, self.centered)
        if momentum.is_zero() and not momentum.values.requires_grad:
            moves.append(Add(THETA, scaled, step, "momentum=0"))
        else:
            moves.append(Decay("b", "momentum", momentum, momentum.segments(layout)))
            moves += [Add("b", scaled), Add(THETA, Read("b"), step)]
        tables = {"lr": lr, "alpha": alpha, "1-alpha": rest, "eps": eps}
        tables |= {"weight_decay": weight_decay, "momentum": momentum}
        return Update(layout, tables, tuple(moves), {"s": Wide(), "a": Wide()})


@dataclass(frozen=True)
class _Scaled(Source):
    """g / (sqrt(s) + eps), or g / (sqrt(s - a^2) + eps)"""

    alpha: hp.Table
    eps: hp.Table
    weight_decay: hp.Table | None
    centered: bool

    @property
    def reads(self) -> tuple[str, ...]:
        return (GRADIENT, *(() if self.weight_decay is None else (THETA,)), "s", *(("a",) if self.centered else ()))

    @property
    def tables(self) -> Mapping[str, hp.Table]:
        return {"eps": self.eps} | ({} if self.weight_decay is None else {"weight_decay": self.weight_decay})

    def value(self, values: Values, step: Step) -> Tensor:
        s = values["s"]
        if self.centered:
            s = (s - values["a"].square()).relu()  # rounding may leave it below 0
        return penalised(values, self.weight_decay, step) / (step.root(s) + step.of(self.eps))

    def bound(self, k: int, bounds: Mapping[str, float]) -> float:
        """(1 - alpha) g^2 <= s + lost, so |g| / (sqrt(s) + eps) <= (1 + sqrt(lost) / eps) / sqrt(1 - alpha)."""
        eps, high = min(self.eps.row(k)), max(self.alpha.row(k))
        if self.centered:
            return penalised_bound(k, bounds, self.weight_decay) / eps * SLACK
        lost = 2 * Wide.resolution / (1 - high)
        return (1 + math.sqrt(lost) / eps) / math.sqrt(1 - high) * SLACK
