"""The architectures by name, and a user's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from revdistill.engine import RevdistillError

Factory = Callable[[tuple[int, ...], int], nn.Module]


def _outputs(classes: int) -> int:
    return 1 if classes == 2 else classes  # the study's networks: one logit for two classes


def _mlp(inputs: int, hidden: list[int], outputs: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), activation()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def linear_net(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The study's LinearNet: one linear layer."""
    return _mlp(prod(input_shape), [], _outputs(classes))


def non_linear_net(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The study's NonLinearNet: one hidden layer of 10, ReLU."""
    return _mlp(prod(input_shape), [10], _outputs(classes))


def more_non_linear_net(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The study's MoreNonLinearNet: three hidden layers of 10, ReLU."""
    return _mlp(prod(input_shape), [10, 10, 10], _outputs(classes))


def mlp(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two hidden layers of 100, ReLU."""
    return _mlp(prod(input_shape), [100, 100], classes)


def mlp_gelu(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The same with GELU, which is smooth: what leaving out an example does is nearer to what its derivative says."""
    return _mlp(prod(input_shape), [100, 100], classes, nn.GELU)


class LeNet(nn.Module):
    """LeNet as in Wang et al. 2018: two 5 x 5 convolutions with max pooling, fully connected 120, 84, classes."""

    def __init__(self, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        channels, height, width = _image("LeNet", input_shape, 12)
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


class AlexCifarNet(nn.Module):
    """The AlexNet-like network of Wang et al. 2018 for 32 x 32 images: two 5 x 5 convolutions of 64, then 384, 192,
    classes.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        channels, height, width = _image("AlexCifarNet", input_shape, 4)
        normalise = partial(nn.LocalResponseNorm, 4, alpha=0.001 / 9.0, beta=0.75, k=1.0)
        pool = partial(nn.MaxPool2d, kernel_size=3, stride=2, padding=1)
        first, second = nn.Conv2d(channels, 64, 5, padding=2), nn.Conv2d(64, 64, 5, padding=2)
        self.features = nn.Sequential(first, nn.ReLU(), pool(), normalise(), second, nn.ReLU(), normalise(), pool())
        features = 64 * _halved(height, 2) * _halved(width, 2)
        self.classifier = nn.Sequential(
            nn.Linear(features, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


class ConvNet3(nn.Module):
    """The field's standard ConvNet: three blocks of 3 x 3 convolution (128), instance norm, ReLU and 2 x 2 average
    pooling.
    """

    WIDTH = 128

    def __init__(self, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        channels, height, width = _image("ConvNet-3", input_shape, 8)
        padding = 3 if (height, width) == (28, 28) else 1  # as in the field: images of 28 x 28 are padded to 32 x 32
        height, width = height + 2 * (padding - 1), width + 2 * (padding - 1)
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [
                nn.Conv2d(channels, self.WIDTH, 3, padding=padding),
                nn.GroupNorm(
                    self.WIDTH, self.WIDTH
                ),  # a group for each channel: instance norm, with learned scale and shift
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
            channels, padding = self.WIDTH, 1
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(self.WIDTH * (height // 8) * (width // 8), classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


def _image(name: str, input_shape: tuple[int, ...], least: int) -> tuple[int, ...]:
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise ValueError(f"{name} needs images of at least {least} x {least}, got inputs of shape {list(input_shape)}")
    return input_shape


def _halved(side: int, times: int) -> int:
    """After poolings of stride 2 that round up."""
    for _ in range(times):
        side = (side + 1) // 2
    return side


ARCHITECTURES: dict[str, Factory] = {
    "LinearNet": linear_net,
    "NonLinearNet": non_linear_net,
    "MoreNonLinearNet": more_non_linear_net,
    "MLP": mlp,
    "MLP-GELU": mlp_gelu,
    "LeNet": LeNet,
    "AlexCifarNet": AlexCifarNet,
    "ConvNet-3": ConvNet3,
}


def canonical(name: str) -> str:
    """The name as it is registered, whatever the case of its letters; a `package.module:function` stays as it is.

    Raises:
        ValueError: there is no such architecture, or it cannot be imported.
    """
    for known in ARCHITECTURES:
        if known.lower() == name.lower():
            return known
    if ":" in name:
        _factory(name)
        return name
    raise ValueError(
        f"unknown architecture {name!r}; accepted are {', '.join(ARCHITECTURES)} and package.module:function"
    )


def build(name: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A new network of the named architecture.

    Args:
        name: a key of ARCHITECTURES, or `package.module:function`.
        input_shape: of one sample.
        classes: how many there are.

    Raises:
        ValueError: the architecture does not fit these, or is no torch.nn.Module.
    """
    factory = ARCHITECTURES.get(name) or _factory(name)
    try:
        net = factory(input_shape, classes)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"architecture {name!r} does not fit inputs {list(input_shape)} and {classes} classes: {error}"
        ) from error
    except RevdistillError:
        raise
    except Exception as error:  # the user's own code raises what it likes
        raise ValueError(
            f"architecture {name!r} failed for inputs {list(input_shape)} and {classes} classes: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"architecture {name!r} returned {type(net).__name__}; it must return a torch.nn.Module")
    return net


def _factory(name: str) -> Factory:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"architecture {name!r}: cannot import {module_name!r} ({error})") from error
    except Exception as error:  # the user's own code raises what it likes
        raise ValueError(
            f"architecture {name!r}: importing {module_name!r} failed ({type(error).__name__}: {error})"
        ) from error
    factory = getattr(module, attribute, None)
    if factory is None:
        raise ValueError(f"architecture {name!r}: module {module_name!r} has no {attribute!r}")
    if not callable(factory):
        raise ValueError(f"architecture {name!r} is not callable as factory(input_shape, classes)")
    return factory  # type: ignore[no-any-return]
