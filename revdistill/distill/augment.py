"""Differentiable siamese augmentation (Zhao & Bilen, ICML 2021): one random transformation of synthetic and real images alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Transform = Callable[[Tensor], Tensor]

# strengths as in the paper
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP, CUTOUT = 0.125, 0.5  # shares of the side
SCALE, ROTATE = 1.2, 15.0  # a factor; degrees


def draw(names: Sequence[str], generator: torch.Generator) -> Transform:
    """One of the transformations by name with random strength: images [N, C, H, W] -> [N, C, H, W], the same for all of them."""
    chosen = names[int(torch.randint(len(names), (), generator=generator))]
    return AUGMENTATIONS[chosen](torch.rand(3, generator=generator).tolist())


def _color(random: list[float]) -> Transform:
    brightness = (random[0] - 0.5) * BRIGHTNESS
    saturation, contrast = random[1] * SATURATION, random[2] + CONTRAST

    def apply(images: Tensor) -> Tensor:
        images = images + brightness
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * saturation + grey
        mean = images.mean((1, 2, 3), keepdim=True)
        return (images - mean) * contrast + mean

    return apply


def _crop(random: list[float]) -> Transform:
    """A shift; what comes in repeats the border."""
    return _affine([[1.0, 0.0, 2 * CROP * (2 * random[0] - 1)], [0.0, 1.0, 2 * CROP * (2 * random[1] - 1)]])


def _scale(random: list[float]) -> Transform:
    low, high = 1 / SCALE, SCALE
    return _affine([[low + random[0] * (high - low), 0.0, 0.0], [0.0, low + random[1] * (high - low), 0.0]])


def _rotate(random: list[float]) -> Transform:
    angle = math.radians((2 * random[0] - 1) * ROTATE)
    return _affine([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])


def _affine(matrix: list[list[float]]) -> Transform:
    def apply(images: Tensor) -> Tensor:
        theta = torch.tensor(matrix, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    return apply


def _flip(random: list[float]) -> Transform:
    return (lambda images: images.flip(3)) if random[0] < 0.5 else (lambda images: images)


def _cutout(random: list[float]) -> Transform:
    """A square becomes 0, the mean of normalized images."""

    def apply(images: Tensor) -> Tensor:
        sides = images.shape[2:]
        masks = []
        for side, where in zip(sides, random, strict=False):
            centre, half = where * side, CUTOUT * side / 2
            positions = torch.arange(side, device=images.device) + 0.5
            masks.append((positions - centre).abs() < half)
        return images * ~(masks[0][:, None] & masks[1])

    return apply


AUGMENTATIONS: dict[str, Callable[[list[float]], Transform]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
