"""Networks without kinks: each ReLU as a softplus, which has all derivatives (as Feng et al. 2023 distil)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

BETA = 60.0  # of the softplus: within 0.012 of the ReLU
_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_}


def smoothed(net: nn.Module, beta: float) -> nn.Module:
    """The network with each nn.ReLU in it replaced by nn.Softplus(beta); its parameters keep their names.

    Args:
        net: is changed.
        beta: of log(1 + exp(beta x)) / beta.
    """
    for module in list(net.modules()):
        for name, child in module._modules.items():  # one that has two names is replaced under both
            if isinstance(child, nn.ReLU):
                module._modules[name] = nn.Softplus(beta)
    return nn.Softplus(beta) if isinstance(net, nn.ReLU) else net


class NotSmoothError(Exception):
    """A network calls relu as a function."""


@contextmanager
def without_relu() -> Iterator[None]:
    """NotSmoothError where a ReLU is called inside: one that `smoothed` could not replace would be left in silence."""
    with _Watch():
        yield


class _Watch(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _RELUS:
            raise NotSmoothError
        return func(*args, **(kwargs or {}))
