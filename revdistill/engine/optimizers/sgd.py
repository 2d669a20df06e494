"""SGD as a list of moves (torch.optim.SGD's).

v <- momentum v;  v <- v + (1 - dampening) (gradient + weight_decay theta);  theta <- theta - lr v
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from revdistill.engine.integers.radix import COARSE
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.clipping import Clipping
from revdistill.engine.optimizers.hyperparameters import Hyperparameter, Table, Value, quantised, resolve
from revdistill.engine.optimizers.moves import Add, Decay, Factor, Move
from revdistill.engine.optimizers.optimizer import Optimizer
from revdistill.engine.optimizers.schedules import check_cycled
from revdistill.engine.optimizers.sources import GRADIENT, THETA, Read
from revdistill.engine.optimizers.start import AT_REST, Start
from revdistill.engine.optimizers.update import Update
from revdistill.engine.scalars import as_float, is_real


@dataclass(frozen=True, repr=False)
class SGD(Optimizer):
    """torch.optim.SGD's update, after torch.nn.utils.clip_grad_norm_'s where max_norm is given.

        g <- gradient + weight_decay theta
        v <- momentum v + (1 - dampening) g  (v <- g at step 0)
        theta <- theta - lr v                (nesterov: theta <- theta - lr (g + momentum v))

    One difference from torch: where momentum is 0 at some steps only, torch leaves its buffer as it was and ignores
    dampening in those steps; here v <- 0 v + (1 - dampening) g, the limit of a small momentum, which has a derivative.

    Args:
        lr: a float, a tensor of shape () or [T] (T steps), or a dict from each parameter's name to one of these
            (parameter groups); also a tensor [T, E] for parameters stacked over E networks. Tensors may require grad.
            At least 0. In place of a tensor of rates a schedule that is not learned: a function k -> float, or a
            scheduler of torch.optim.lr_scheduler, which is followed from where it is (a copy of it).
        momentum: as lr, but not [T, E]; from 0 to 1. It acts as the nearest n / 2^16.
        dampening: a float from 0 to 1.
        nesterov: a bool. It needs momentum > 0 and dampening 0; `Reversible` cannot walk it back (use `Checkpoint`).
        weight_decay: as lr, but not [T, E]; at least 0.
        max_norm: the gradient of all parameters together is scaled down to this norm where it is longer, before
            anything else is done with it (torch.nn.utils.clip_grad_norm_): a float, a tensor of shape () or [T] that
            may require grad, or None. Stacked networks are clipped each by its own norm, for which it may be [T, E].

    Raises:
        ValueError, TypeError: when unrolled; name the argument, what came and what is accepted.
    """

    lr: Hyperparameter
    momentum: Hyperparameter = 0.9
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: Hyperparameter = 0.0
    max_norm: Value | None = None
    slot_names: ClassVar[Mapping[str, str]] = {"v": "momentum_buffer"}

    @property
    def counts_steps(self) -> bool:
        """The first one is without dampening."""
        return bool(self.dampening)

    def resolve(self, layout: Layout, steps: int, start: Start = AT_REST) -> Update:
        numbers = partial(resolve, layout=layout, steps=steps, taken=start.taken)
        check_cycled(self.lr, self.momentum, "momentum=scheduler")
        lr = numbers("lr", self.lr, stackable=True)
        momentum = quantised(numbers("momentum", self.momentum, stackable=False, upper=1.0), COARSE)
        weight_decay = numbers("weight_decay", self.weight_decay, stackable=False)
        clipping = Clipping.of(self.max_norm, layout, steps, start.taken)
        constant = self._kick_factor(momentum)
        self._check_nesterov(momentum)

        # torch's first step sets v to the gradient, without dampening: it is the one that finds no v
        v = start.slots.get("v")
        at_rest = v is None or (not start.taken and not bool(v.any()))
        kick = Factor(constant, first=1.0 if at_rest else None)
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
        tables = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        return Update(layout, tables, tuple(moves), clipping=clipping)

    def _kick_factor(self, momentum: Table) -> float | Tensor:
        if not is_real(self.dampening):
            raise TypeError(f"dampening must be a float, got {type(self.dampening).__name__}")
        dampening = as_float(self.dampening)
        if not 0 <= dampening <= 1:
            raise ValueError(f"dampening must be between 0 and 1, got {self.dampening}")
        # Like torch, dampening means nothing to a parameter group that has no momentum at all.
        factors = [1.0 - dampening if any(column) else 1.0 for column in zip(*momentum.host, strict=True)]
        if momentum.index is None or len(set(factors)) <= 1:
            return factors[0] if factors else 1.0  # no steps, no factor
        return torch.tensor(factors, dtype=torch.float64, device=momentum.index.device)[momentum.index]

    def _check_nesterov(self, momentum: Table) -> None:
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"nesterov must be a bool, got {type(self.nesterov).__name__}")
        if self.nesterov and (self.dampening or not all(map(all, momentum.host))):
            raise ValueError("nesterov=True needs momentum > 0 at every step and dampening 0, as in torch.optim.SGD")
