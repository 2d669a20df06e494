"""The architectures by name, and a user's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

Factory = Callable[[tuple[int, ...], int], nn.Module]


def _outputs(classes: int) -> int:
    return 1 if classes == 2 else classes  # the study's networks: one logit for two classes


def _relu_mlp(inputs: int, hidden: list[int], outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def linear_net(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The study's LinearNet: one linear layer."""
    return _relu_mlp(prod(input_shape), [], _outputs(classes))


def non_linear_net(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The study's NonLinearNet: one hidden layer of 10, ReLU."""
    return _relu_mlp(prod(input_shape), [10], _outputs(classes))


def more_non_linear_net(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The study's MoreNonLinearNet: three hidden layers of 10, ReLU."""
    return _relu_mlp(prod(input_shape), [10, 10, 10], _outputs(classes))


def mlp(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two hidden layers of 100, ReLU."""
    return _relu_mlp(prod(input_shape), [100, 100], classes)


class LeNet(nn.Module):
    """LeNet as in Wang et al. 2018: two 5 x 5 convolutions with max pooling, fully connected 120, 84, classes."""

    def __init__(self, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        if len(input_shape) != 3 or min(input_shape[1:]) < 12:
            raise ValueError(f"LeNet needs images of at least 12 x 12, got inputs of shape {list(input_shape)}")
        channels, height, width = input_shape
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        features = 16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2)
        self.fc1 = nn.Linear(features, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))  # type: ignore[no-any-return]


ARCHITECTURES: dict[str, Factory] = {
    "LinearNet": linear_net,
    "NonLinearNet": non_linear_net,
    "MoreNonLinearNet": more_non_linear_net,
    "MLP": mlp,
    "LeNet": LeNet,
}


def canonical(name: str) -> str:
    """The registered name whatever its case, or a `package.module:function` as it is; ValueError otherwise."""
    for known in ARCHITECTURES:
        if known.lower() == name.lower():
            return known
    if ":" in name:
        _factory(name)
        return name
    raise ValueError(f"unknown architecture {name!r}; accepted are {', '.join(ARCHITECTURES)} and package.module:function")


def build(name: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A new network: `factory(input_shape, classes)`. Errors: ValueError where it does not fit or is no module."""
    factory = ARCHITECTURES.get(name) or _factory(name)
    try:
        net = factory(input_shape, classes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"architecture {name!r} does not fit inputs {list(input_shape)} and {classes} classes: {error}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"architecture {name!r} returned {type(net).__name__}; it must return a torch.nn.Module")
    return net


def _factory(name: str) -> Factory:
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ValueError(f"architecture {name!r}: cannot import {module_name!r} ({error})") from error
    except AttributeError:
        raise ValueError(f"architecture {name!r}: module {module_name!r} has no {attribute!r}") from None
    if not callable(factory):
        raise ValueError(f"architecture {name!r} is not callable as factory(input_shape, classes)")
    return factory  # type: ignore[no-any-return]
