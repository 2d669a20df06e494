"""Schedules that are not learned: a function of the step, or one of torch.optim.lr_scheduler's."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from revdistill.engine.scalars import as_float, is_real

_PAIR = "betas"


def is_schedule(value: object) -> bool:
    """Whether it gives a number for each step."""
    if isinstance(value, (Tensor, nn.Module, type)):  # callable, but no function of the step
        return False
    return isinstance(value, (LRScheduler, ReduceLROnPlateau)) or callable(value)


def numbers(label: str, schedule: Any, steps: int, taken: int) -> list[float]:
    """A hyperparameter's value at each step.

    Args:
        label: the argument's name, as in messages: "lr", "betas[0]", "lr['0.weight']".
        schedule: a function k -> float of the training's step, from `taken` on; or a scheduler of torch.optim, from
            where it is now.
        steps: how many values.
        taken: steps that the training has behind it.

    Raises:
        TypeError, ValueError: name the argument.
    """
    if isinstance(schedule, ReduceLROnPlateau):
        raise TypeError(
            f"{label} is a ReduceLROnPlateau, which waits for a metric of each step; accepted are schedulers that are "
            "functions of the step, a function k -> float, or a tensor"
        )
    if isinstance(schedule, LRScheduler):
        _check_position(label, schedule, taken)
        return _of_scheduler(label, schedule, steps)
    return [_number(label, k, schedule(k)) for k in range(taken, taken + steps)]


def _number(label: str, k: int, value: object) -> float:
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{label}({k}) returned a tensor that requires grad, but a schedule given as a function is not "
            "differentiated; give a tensor [steps]"
        )
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if not is_real(value):
        raise TypeError(f"{label}({k}) returned {type(value).__name__}; a schedule must return a float for each step")
    if not math.isfinite(as_float(value)):
        raise ValueError(f"{label}({k}) returned {value}; it must be finite")
    return float(value)


def _check_position(label: str, scheduler: LRScheduler, taken: int) -> None:
    """A training that goes on has its scheduler at its step: the same one given to each piece would begin anew."""
    inner: Any = scheduler
    while not hasattr(inner, "last_epoch"):  # ChainedScheduler
        inner = inner._schedulers[0]
    if taken and inner.last_epoch != taken:
        raise ValueError(
            f"{label} is a scheduler at its step {inner.last_epoch}, but the state that came in goes on from step "
            f"{taken}: call its step() until it is there too, or give a function k -> float, which is asked for the "
            "training's step"
        )


def _of_scheduler(label: str, scheduler: LRScheduler, steps: int) -> list[float]:
    name, position = label.partition("[")[0], None
    if name == _PAIR:  # betas[0], betas[0]['weight']
        position = int(label[len(name) + 1])
    of: Callable[[dict[str, Any]], Any] = lambda group: group[name] if position is None else group[name][position]  # noqa: E731
    if name not in scheduler.optimizer.param_groups[0]:
        raise ValueError(f"{label} is a scheduler of an optimizer that has no {name}")
    own = _copied(scheduler)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer makes no steps
        for _ in range(steps):
            values = {float(of(group)) for group in own.optimizer.param_groups}
            if len(values) > 1:
                raise ValueError(
                    f"{label} is a scheduler with parameter groups of different values ({sorted(values)}); give a dict "
                    "from parameter name to a tensor [steps], a function k -> float, or a scheduler of one group"
                )
            found.append(values.pop())
            own.step()
    return found


def _copied(scheduler: LRScheduler) -> LRScheduler:
    """A scheduler to be run through: the caller's stays where it is, and no parameter is copied."""
    stand_in: dict[int, Any] = {}
    for group in scheduler.optimizer.param_groups:
        for parameter in group["params"]:
            stand_in[id(parameter)] = torch.zeros(())
    for state in scheduler.optimizer.state.values():
        stand_in |= {id(value): torch.zeros(()) for value in state.values() if isinstance(value, Tensor)}
    return copy.deepcopy(scheduler, stand_in)


def check_cycled(lr: object, momentum: object, argument: str) -> None:
    """Check that a scheduler that cycles momentum too (OneCycleLR and CyclicLR, unless told not to) is asked for both.

    Args:
        lr: as the user gave it.
        momentum: likewise.
        argument: how momentum is given, for the message.

    Raises:
        ValueError: its momenta would be lost.
    """
    names = [*lr] if isinstance(lr, Mapping) else [*momentum] if isinstance(momentum, Mapping) else [None]
    for name in names:
        schedule, own = (of.get(name) if isinstance(of, Mapping) else of for of in (lr, momentum))
        if _cycles_momentum(schedule) and own is not schedule:
            raise ValueError(
                f"lr is a {type(schedule).__name__} that changes momentum too, which {argument.split('=')[0]} does not "
                f"follow: give {argument} as well, or make it with cycle_momentum=False"
            )


def _cycles_momentum(schedule: object) -> bool:
    own = isinstance(schedule, LRScheduler) and bool(getattr(schedule, "cycle_momentum", False))
    return own or any(map(_cycles_momentum, getattr(schedule, "_schedulers", ())))
