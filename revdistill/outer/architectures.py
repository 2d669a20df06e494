"""The registered networks: the study's, the field's standard ones, and a small residual one.

Each is made by (input_shape, classes); what else it takes, by keyword, are its options.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd, prod

from torch import Tensor, nn

GROUPS = 8  # of norm=group; or as many as the channels have in common with it


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
        self.activation, self.pool = nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.activation(self.conv1(x)))
        x = self.pool(self.activation(self.conv2(x)))
        x = self.activation(self.fc1(x.flatten(1)))
        return self.fc3(self.activation(self.fc2(x)))  # type: ignore[no-any-return]


class AlexCifarNet(nn.Module):
    """The AlexNet-like network of Wang et al. 2018 for 32 x 32 images: two 5 x 5 convolutions of 64, then 384, 192,
    classes.

    width: channels of each convolution.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, *, width: int = 64) -> None:
        super().__init__()
        channels, height, side = _image("AlexCifarNet", input_shape, 4)
        normalise = partial(nn.LocalResponseNorm, 4, alpha=0.001 / 9.0, beta=0.75, k=1.0)
        pool = partial(nn.MaxPool2d, kernel_size=3, stride=2, padding=1)
        first, second = nn.Conv2d(channels, width, 5, padding=2), nn.Conv2d(width, width, 5, padding=2)
        self.features = nn.Sequential(first, nn.ReLU(), pool(), normalise(), second, nn.ReLU(), normalise(), pool())
        features = width * _halved(height, 2) * _halved(side, 2)
        self.classifier = nn.Sequential(
            nn.Linear(features, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


class ConvNet3(nn.Module):
    """The field's standard ConvNet: three blocks of 3 x 3 convolution, normalization, ReLU and 2 x 2 average pooling.

    width: channels of each convolution.
    norm: a name of NORMS.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, *, width: int = 128, norm: str = "instance") -> None:
        super().__init__()
        channels, height, side = _image("ConvNet-3", input_shape, 8)
        padding = 3 if (height, side) == (28, 28) else 1  # as in the field: images of 28 x 28 are padded to 32 x 32
        height, side = height + 2 * (padding - 1), side + 2 * (padding - 1)
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [
                nn.Conv2d(channels, width, 3, padding=padding),
                *_normalization(norm, width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
            channels, padding = width, 1
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * (height // 8) * (side // 8), classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


class ResNet8(nn.Module):
    """The smallest residual network of He et al. 2016 for small images (6n + 2 layers, n = 1), with group norm:
    BatchNorm would make what an image teaches depend on the images beside it.

    width: channels of the first of its three blocks; each further block has twice as many at half the side.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, *, width: int = 16) -> None:
        super().__init__()
        channels, _, _ = _image("ResNet-8", input_shape, 4)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), *_normalization("group", width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            _Residual(width, width), _Residual(width, 2 * width), _Residual(2 * width, 4 * width)
        )
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


class _Residual(nn.Module):
    """Two 3 x 3 convolutions beside a connection that skips them; at half the side where the channels grow."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        stride = 1 if channels == width else 2
        convolution = partial(nn.Conv2d, padding=1, bias=False)
        self.body = nn.Sequential(
            convolution(channels, width, 3, stride=stride),
            *_normalization("group", width),
            nn.ReLU(),
            convolution(width, width, 3),
            *_normalization("group", width),
        )
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(channels, width, 1, stride=stride, bias=False)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.skip(x))  # type: ignore[no-any-return]


NORMS: dict[str, Callable[[int], list[nn.Module]]] = {
    # a group for each channel: instance norm, with learned scale and shift
    "instance": lambda width: [nn.GroupNorm(width, width)],
    "group": lambda width: [nn.GroupNorm(gcd(GROUPS, width), width)],
    "none": lambda width: [],
}


def _normalization(norm: str, width: int) -> list[nn.Module]:
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; accepted is {', '.join(NORMS)}")
    return NORMS[norm](width)


def _image(name: str, input_shape: tuple[int, ...], least: int) -> tuple[int, ...]:
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise ValueError(f"{name} needs images of at least {least} x {least}, got inputs of shape {list(input_shape)}")
    return input_shape


def _halved(side: int, times: int) -> int:
    """After poolings of stride 2 that round up."""
    for _ in range(times):
        side = (side + 1) // 2
    return side
