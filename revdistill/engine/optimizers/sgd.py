"""Optimizers as lists of moves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from revdistill.engine.integers.radix import COARSE
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.hyperparameters import Schedule, Table, quantised, resolve
from revdistill.engine.optimizers.moves import GRADIENT, THETA, Add, Decay, Factor, Update


class Optimizer(ABC):
    """What rd.unroll takes: `SGD`, `Adam` or `AdamW`."""

    @abstractmethod
    def resolve(self, layout: Layout, steps: int) -> Update:
        """The moves for `steps` steps of parameters laid out like `layout`."""


@dataclass(frozen=True)
class SGD(Optimizer):
    """torch.optim.SGD's update.

        g <- gradient + weight_decay theta;  v <- momentum v + (1 - dampening) g  (v <- g at step 0);  theta <- theta -
        lr v (nesterov: theta <- theta - lr (g + momentum v))

    lr, momentum, weight_decay: a float, a tensor of shape () or [T] (T steps), or a dict from each parameter's name to
    one of these (parameter groups); lr also a tensor [T, E] for parameters stacked over E networks. Tensors may require
    grad. All at least 0; momentum at most 1, and it acts as the nearest n / 2^16. dampening: a float; nesterov: a bool,
    which needs momentum > 0 and dampening 0 and cannot be walked back by `Reversible` (use `Checkpoint`).

    One difference from torch: where momentum is 0 at some steps only, torch leaves its buffer as it was and ignores
    dampening in those steps; here v <- 0 v + (1 - dampening) g, the limit of a small momentum, which has a derivative.

    Errors (when unrolled): ValueError and TypeError name the argument, what came and what is accepted.
    """

    lr: Schedule
    momentum: Schedule = 0.9
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: Schedule = 0.0

    def resolve(self, layout: Layout, steps: int) -> Update:
        lr = resolve("lr", self.lr, layout, steps, stackable=True)
        momentum = quantised(resolve("momentum", self.momentum, layout, steps, stackable=False, upper=1.0), COARSE)
        weight_decay = resolve("weight_decay", self.weight_decay, layout, steps, stackable=False)
        constant = self._kick_factor(momentum)
        self._check_nesterov(momentum)
        has_decay = weight_decay.values.requires_grad or not weight_decay.is_zero()

        kick = Factor(constant, first=1.0)  # torch's first step sets v to the gradient, without dampening
        kicks = [Add("v", GRADIENT, kick)]
        if has_decay:
            kicks.append(Add("v", THETA, replace(kick, names=("weight_decay",), tables=(weight_decay,))))

        def step(names: tuple[str, ...] = (), tables: tuple[Table, ...] = ()) -> Factor:
            return Factor(-1.0, -1.0, ("lr", *names), (lr, *tables))

        drifts = [Add(THETA, "v", step())]
        if self.nesterov:
            drifts = [Add(THETA, GRADIENT, step()), Add(THETA, "v", step(("momentum",), (momentum,)))]
            if has_decay:  # first: it must see theta as the gradient saw it
                drifts.insert(0, Add(THETA, THETA, step(("weight_decay",), (weight_decay,))))
        return Update(
            layout=layout,
            tables={"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
            decays=(Decay("v", "momentum", momentum, momentum.segments(layout)),),
            kicks=tuple(kicks),
            drifts=tuple(drifts),
        )

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
