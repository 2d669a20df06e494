"""The optimizers that a network can be trained with, by name: all that the outer loops, the files, `evaluate` and the
command line know of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from revdistill.engine import SGD, Adam, AdamW, Optimizer, RMSprop

Value = float | Tensor | Mapping[str, Tensor]  # as the engine's optimizers take it: one, or one per parameter
Group = dict[str, Any]  # a parameter group of torch.optim
ADAM_BETA2, ADAM_EPS = 0.999, 1e-8
RMSPROP_ALPHA, RMSPROP_EPS = 0.99, 1e-8


@dataclass(frozen=True)
class Family:
    """One optimizer, as the engine differentiates through it and as torch.optim has it, with the same constants.

    title: in sentences.
    engine: (lr, momentum, weight_decay) -> what `rd.unroll` takes.
    plain: (parameter groups, lr) -> torch.optim's; the groups have their weight decays, and get lr and momentum at each
        step.
    set_momentum: (parameter group of torch.optim, momentum) -> None.
    momentum_name: what the optimizer calls the number that a schedule has as `momentum`.
    momentum_below_one: whether that number must be below 1; otherwise it may be 1.
    takes_rates_of_sgd: whether step sizes found for SGD mean the same here, such as those of `strategy1`.
    with_eps: eps -> the same optimizer with this eps in the place of its constant; None where it has no eps.
    """

    title: str
    engine: Callable[[Any, Any, Any], Optimizer]
    plain: Callable[[list[Group], float], torch.optim.Optimizer]
    set_momentum: Callable[[Group, float], None]
    momentum_name: str = "momentum"
    momentum_below_one: bool = True
    takes_rates_of_sgd: bool = False
    with_eps: Callable[[float], Family] | None = None


def set_momentum(group: Group, momentum: float) -> None:
    """Where torch.optim calls it `momentum`."""
    group["momentum"] = momentum


def _set_beta1(group: Group, momentum: float) -> None:
    group["betas"] = (momentum, ADAM_BETA2)


def _adam(ours: type[Adam | AdamW], eps: float = ADAM_EPS) -> Family:
    theirs = getattr(torch.optim, ours.__name__)
    return Family(
        title=ours.__name__,
        engine=lambda lr, beta1, decay: ours(lr, (beta1, ADAM_BETA2), eps, decay),
        plain=lambda groups, lr: theirs(groups, lr=lr, eps=eps),
        set_momentum=_set_beta1,
        momentum_name="beta1",
        with_eps=partial(_adam, ours),
    )


def _rmsprop(eps: float = RMSPROP_EPS) -> Family:
    return Family(
        title="RMSprop",
        engine=lambda lr, momentum, decay: RMSprop(lr, RMSPROP_ALPHA, eps, decay, momentum),
        plain=lambda groups, lr: torch.optim.RMSprop(groups, lr=lr, alpha=RMSPROP_ALPHA, eps=eps),
        set_momentum=set_momentum,
        with_eps=_rmsprop,
    )


OPTIMIZERS: dict[str, Family] = {
    "sgd": Family(
        title="SGD",
        engine=lambda lr, momentum, decay: SGD(lr, momentum, weight_decay=decay),
        plain=lambda groups, lr: torch.optim.SGD(groups, lr=lr),
        set_momentum=set_momentum,
        momentum_below_one=False,
        takes_rates_of_sgd=True,
    ),
    "adam": _adam(Adam),
    "adamw": _adam(AdamW),
    "rmsprop": _rmsprop(),
}
DEFAULT = "sgd"  # also of files that name none


def accepted() -> str:
    """The names, for messages: "sgd or adam"."""
    *others, last = OPTIMIZERS
    return f"{', '.join(others)} or {last}"
