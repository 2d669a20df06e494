"""SGD as a list of moves (torch.optim.SGD's).

v <- momentum v;  v <- v + (1 - dampening) (gradient + weight_decay theta);  theta <- theta - lr v
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from revdistill.engine.integers.radix import COARSE
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.hyperparameters import Hyperparameter, Table, quantised, resolve
from revdistill.engine.optimizers.moves import Add, Decay, Factor, Move
from revdistill.engine.optimizers.optimizer import Optimizer
from revdistill.engine.optimizers.sources import GRADIENT, THETA, Read
from revdistill.engine.optimizers.update import Update


@dataclass(frozen=True)
class SGD(Optimizer):
    """torch.optim.SGD's update.

        g <- gradient + weight_decay theta
        v <- momentum v + (1 - dampening) g  (v <- g at step 0)
        theta <- theta - lr v                (nesterov: theta <- theta - lr (g + momentum v))

    One difference from torch: where momentum is 0 at some steps only, torch leaves its buffer as it was and ignores
    dampening in those steps; here v <- 0 v + (1 - dampening) g, the limit of a small momentum, which has a derivative.

    Args:
        lr, momentum, weight_decay: a float, a tensor of shape () or [T] (T steps), or a dict from each parameter's name
            to one of these (parameter groups); lr also a tensor [T, E] for parameters stacked over E networks. Tensors
            may require grad. All at least 0; momentum at most 1, and it acts as the nearest n / 2^16.
        dampening: a float from 0 to 1.
        nesterov: a bool. It needs momentum > 0 and dampening 0; `Reversible` cannot walk it back (use `Checkpoint`).

    Raises:
        ValueError, TypeError: when unrolled; name the argument, what came and what is accepted.
    """

    lr: Hyperparameter
    momentum: Hyperparameter = 0.9
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: Hyperparameter = 0.0

    def resolve(self, layout: Layout, steps: int) -> Update:
        lr = resolve("lr", self.lr, layout, steps, stackable=True)
        momentum = quantised(resolve("momentum", self.momentum, layout, steps, stackable=False, upper=1.0), COARSE)
        weight_decay = resolve("weight_decay", self.weight_decay, layout, steps, stackable=False)
        constant = self._kick_factor(momentum)
        self._check_nesterov(momentum)

        kick = Factor(constant, first=1.0)  # torch's first step sets v to the gradient, without dampening
        step = Factor(-1.0, {"lr": lr})
        moves: list[Move] = [
            Decay("v", "momentum", momentum, layout),
            Add("v", Read(GRADIENT), kick),
        ]
        if weight_decay.matters():
            moves.append(Add("v", Read(THETA), replace(kick, tables={"weight_decay": weight_decay})))
        if self.nesterov:
            looking_ahead = "nesterov=True"
            if weight_decay.matters():
                decaying = Factor(-1.0, {"lr": lr, "weight_decay": weight_decay})
                moves.append(Add(THETA, Read(THETA), decaying, looking_ahead))
            moves.append(Add(THETA, Read(GRADIENT), step, looking_ahead))
            step = Factor(-1.0, {"lr": lr, "momentum": momentum})
        moves.append(Add(THETA, Read("v"), step))
        return Update(layout, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, tuple(moves))

    def _kick_factor(self, momentum: Table) -> float | Tensor:
        if isinstance(self.dampening, bool) or not isinstance(self.dampening, (int, float)):
            raise TypeError(f"dampening must be a float, got {type(self.dampening).__name__}")
        if not 0 <= self.dampening <= 1:
            raise ValueError(f"dampening must be between 0 and 1, got {self.dampening}")
        # Like torch, dampening means nothing to a parameter group that has no momentum at all.
        factors = [1.0 - self.dampening if any(column) else 1.0 for column in zip(*momentum.host, strict=True)]
        if momentum.index is None or len(set(factors)) <= 1:
            return factors[0] if factors else 1.0  # no steps, no factor
        return torch.tensor(factors, dtype=torch.float64, device=momentum.index.device)[momentum.index]

    def _check_nesterov(self, momentum: Table) -> None:
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"nesterov must be a bool, got {type(self.nesterov).__name__}")
        if self.nesterov and (self.dampening or not all(map(all, momentum.host))):
            raise ValueError("nesterov=True needs momentum > 0 at every step and dampening 0, as in torch.optim.SGD")
