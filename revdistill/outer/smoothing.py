"""Networks without the kinks of ReLU: each as a softplus, which has all derivatives (as Feng et al. 2023 distil)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

BETA = 60.0  # of the softplus: within 0.012 of the ReLU
# What torch.relu, F.relu, Tensor.relu, their in-place forms and TorchScript's all come to.
_RELUS = {torch.ops.aten.relu, torch.ops.aten.relu_}


def smoothed(net: nn.Module, beta: float) -> nn.Module:
    """The network with each nn.ReLU in it replaced by nn.Softplus(beta); its parameters keep their names.

    Args:
        net: is changed.
        beta: of log(1 + exp(beta x)) / beta.
    """
    for module in list(net.modules()):
        for name, child in module._modules.items():  # one that has two names is replaced under both
            if _is_relu(child):
                module._modules[name] = nn.Softplus(beta)
    return nn.Softplus(beta) if _is_relu(net) else net


def _is_relu(module: nn.Module | None) -> bool:
    """A class derived from it may do something else."""
    return type(module) is nn.ReLU


class NotSmoothError(Exception):
    """A network has a ReLU that is no module of type torch.nn.ReLU."""


@contextmanager
def without_relu() -> Iterator[None]:
    """NotSmoothError at the end where a ReLU was called inside: one that `smoothed` could not replace would be left in
    silence.
    """
    with torch.enable_grad(), _Watch() as watch:  # without gradients, torch fuses whole layers, ReLU and all
        yield
    if watch.seen:
        raise NotSmoothError


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.seen |= func.overloadpacket in _RELUS
        return func(*args, **(kwargs or {}))
