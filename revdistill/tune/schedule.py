"""RUN/schedule.h5 and schedule.json: a training schedule, and a scheduler that follows it in a torch.optim loop."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import revdistill
from revdistill.engine.showing import brief, shares
from revdistill.outer.files import replacing
from revdistill.outer.hdf5 import Reader, reading, writing
from revdistill.outer.optimizers import OPTIMIZERS, accepted

FORMAT_VERSION = 1
FILE_NAME, JSON_NAME = "schedule.h5", "schedule.json"
ALL = "all"  # the one group of a schedule that does not tell layers apart
_ARRAYS = {"lr": 2, "momentum": 2, "weight_decay": 1, "init_scale": 1}


@dataclass(frozen=True)
class Schedule:
    """A schedule of T steps for G groups of parameters: one group "all", or one per layer.

    Args:
        lr: float32 [T, G].
        momentum: float32 [T, G]; beta1 where the optimizer is "adam" or "adamw" (with beta2 0.999 and eps 1e-8).
        weight_decay: float32 [G].
        init_scale: float32 [G], multiplies the initial weights, not the biases.
        optimizer: a name of OPTIMIZERS.
        groups: the names of the groups; a layer has the name of its module, such as "fc1" for "fc1.weight" and
            "fc1.bias".
        config: everything needed to tune again.
        comparison: what fresh networks reach with the starting and with the learned schedule.
    """

    lr: np.ndarray
    momentum: np.ndarray
    weight_decay: np.ndarray
    init_scale: np.ndarray
    optimizer: str
    groups: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        found = [f"{name} {brief(getattr(self, name))}" for name in _ARRAYS]
        of = f" of {len(self.groups)} layers" if self.groups != [ALL] else ""
        reached = shares(self.comparison, "accuracy")
        return f"Schedule({self.steps} steps of {self.optimizer}{of}; {'; '.join(found)}" + (
            f"; test accuracy {reached})" if reached else ")"
        )

    @property
    def steps(self) -> int:
        """T, the number of training steps."""
        return len(self.lr)

    def group_of(self, parameter: str) -> int:
        """The number of a parameter's group.

        Raises:
            ValueError: the schedule has none for a parameter of this name.
        """
        layer = layer_of(parameter)
        if self.groups == [ALL]:
            return 0
        if layer not in self.groups:
            raise ValueError(
                f"the schedule has nothing for parameter {parameter!r}; it has layers {', '.join(self.groups)}"
            )
        return self.groups.index(layer)

    def scale_(self, net: nn.Module) -> None:
        """Multiply the weights of a freshly initialised network by `init_scale`, in place."""
        with torch.no_grad():
            for name, p in net.named_parameters():
                if p.ndim >= 2:
                    p.mul_(float(self.init_scale[self.group_of(name)]))

    def make_optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        """The torch.optim optimizer of the schedule, with its parameter groups, for `ScheduleLR` to lead."""
        members: list[list[Tensor]] = [[] for _ in self.groups]
        for name, p in net.named_parameters():
            if p.requires_grad:
                members[self.group_of(name)].append(p)
        groups = [{"params": ps, "weight_decay": float(w)} for ps, w in zip(members, self.weight_decay, strict=True)]
        return OPTIMIZERS[self.optimizer].plain(groups, 1.0)  # LambdaLR multiplies this rate by the schedule's

    def to_dict(self) -> dict[str, Any]:
        """In the types of JSON."""
        arrays = {name: getattr(self, name).astype(float).tolist() for name in _ARRAYS}
        return arrays | {name: getattr(self, name) for name in ("optimizer", "groups", "config", "comparison")}


def layer_of(parameter: str) -> str:
    """The module that a parameter belongs to: "features.0" for "features.0.weight"."""
    return parameter.rpartition(".")[0] or parameter


class ScheduleLR(torch.optim.lr_scheduler.LambdaLR):
    """torch's LambdaLR along a schedule. It sets the momentum (or beta1) of each step too; after step T the last values
    stay.

    Call `step()` after each `optimizer.step()`.

    Args:
        optimizer: made by `Schedule.make_optimizer`, or any of the same kind with as many groups and rate 1.
        schedule: to follow.

    Raises:
        ValueError: the optimizer has not as many parameter groups as the schedule.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        if len(optimizer.param_groups) != len(schedule.groups):
            raise ValueError(
                f"the optimizer has {len(optimizer.param_groups)} parameter groups, but the schedule "
                f"{len(schedule.groups)} "
                f"({', '.join(schedule.groups)}); Schedule.make_optimizer makes one that fits"
            )
        self._schedule = schedule
        super().__init__(optimizer, [partial(self._rate, group=g) for g in range(len(schedule.groups))])

    def _rate(self, k: int, group: int) -> float:
        return float(self._schedule.lr[min(k, self._schedule.steps - 1), group])

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the coming step; its momenta are set on the way."""
        k = min(self.last_epoch, self._schedule.steps - 1)
        family = OPTIMIZERS[self._schedule.optimizer]
        for group, momentum in zip(self.optimizer.param_groups, self._schedule.momentum[k], strict=True):
            family.set_momentum(group, float(momentum))
        return list(super().get_lr())


def schedule_lr(path: str | Path, net: nn.Module) -> tuple[torch.optim.Optimizer, ScheduleLR]:
    """An optimizer and its scheduler that train a fresh network along the schedule of a file.

    Then, for each batch: loss.backward(); optimizer.step(); optimizer.zero_grad(); scheduler.step().

    Args:
        path: schedule.h5, or the directory that holds it.
        net: freshly initialised; its weights are scaled in place.

    Returns:
        The optimizer and the scheduler.

    Raises:
        ArtifactError: names the file and what is wrong with it.
        ValueError: the network has layers that the schedule does not know.
    """
    schedule = read(Path(path))
    schedule.scale_(net)
    optimizer = schedule.make_optimizer(net)
    return optimizer, ScheduleLR(optimizer, schedule)


def write(directory: Path, schedule: Schedule) -> None:
    """Write schedule.h5 and schedule.json to the directory, each whole or not at all. Raises OSError."""
    with writing(directory / FILE_NAME) as file:
        for name in _ARRAYS:
            file.create_dataset(name, data=getattr(schedule, name))
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["revdistill_version"] = revdistill.__version__
        file.attrs["optimizer"] = schedule.optimizer
        for name in ("groups", "config", "comparison"):
            file.attrs[name] = json.dumps(getattr(schedule, name))
    with replacing(directory / JSON_NAME) as temporary:
        temporary.write_text(json.dumps(schedule.to_dict(), indent=1) + "\n")


def read(path: Path) -> Schedule:
    """The schedule of a file, or of the directory that holds it.

    Raises:
        ArtifactError: names the file and what is wrong with it.
    """
    with reading(path / FILE_NAME if path.is_dir() else path) as file:
        file.check_version(FORMAT_VERSION)
        arrays = {name: file.array(name, "float32", ndim=ndim) for name, ndim in _ARRAYS.items()}
        schedule = Schedule(
            **arrays,
            optimizer=file.text("optimizer"),
            groups=file.json("groups", list),
            config=file.json("config", dict),
            comparison=file.json("comparison", dict),
        )
        _check(file, schedule)
        return schedule


def _check(file: Reader, s: Schedule) -> None:
    if not s.groups or not all(isinstance(name, str) for name in s.groups) or len(set(s.groups)) != len(s.groups):
        raise file.fail("attribute 'groups' must list different names")
    steps, groups = s.lr.shape
    if (
        not steps
        or groups != len(s.groups)
        or s.momentum.shape != s.lr.shape
        or not s.weight_decay.shape == s.init_scale.shape == (groups,)
    ):
        raise file.fail(
            f"'lr' has shape {list(s.lr.shape)}, which does not go with {len(s.groups)} groups or the other arrays"
        )
    if s.optimizer not in OPTIMIZERS:
        raise file.fail(f"attribute 'optimizer' is {s.optimizer!r}; expected {accepted()}")
    if (s.lr < 0).any() or (s.momentum < 0).any() or (s.momentum >= 1).any() or (s.weight_decay < 0).any():
        raise file.fail("'lr' and 'weight_decay' must be at least 0, 'momentum' at least 0 and below 1")
