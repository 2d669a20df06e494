"""Differentiable siamese augmentation (Zhao & Bilen, ICML 2021): one random transformation of synthetic and real images
alike.
"""

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
    """One of these transformations, of random strength: images [N, C, H, W] -> [N, C, H, W], all changed alike.

    Args:
        names: keys of AUGMENTATIONS, of which one is drawn.
        generator: draws the name and the strength.
    """
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
    """A shift; the border is repeated where the image has moved away."""
    return _affine([[1.0, 0.0, 2 * CROP * (2 * random[0] - 1)], [0.0, 1.0, 2 * CROP * (2 * random[1] - 1)]])


def _scale(random: list[float]) -> Transform:
    low, high = 1 / SCALE, SCALE
    return _affine([[low + random[0] * (high - low), 0.0, 0.0], [0.0, low + random[1] * (high - low), 0.0]])


def _rotate(random: list[float]) -> Transform:
    angle = math.radians((2 * random[0] - 1) * ROTATE)
    return _affine([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])


def _affine(matrix: list[list[float]]) -> Transform:
    """Bilinear sampling at the points that the matrix takes the pixels to; outside, the border is repeated.

    The same as torch's grid_sample (padding_mode="border", align_corners=False). But its derivative adds up by atomics
    on CUDA, in any order, so that no run could be repeated there. Here all images are sampled at the same points, and
    each pixel is a weighted bag of four.
    """

    def apply(images: Tensor) -> Tensor:
        number, channels, height, width = images.shape
        theta = torch.tensor(matrix, dtype=torch.float64)
        points = F.affine_grid(theta[None], [1, 1, height, width], align_corners=False).reshape(-1, 2)  # in -1 to 1
        (left, right, x), (top, bottom, y) = _between(points[:, 0], width), _between(points[:, 1], height)
        four = torch.stack([row * width + column for row in (top, bottom) for column in (left, right)], dim=1)
        weights = torch.stack([v * u for v in (1 - y, y) for u in (1 - x, x)], dim=1)
        pixels = images.permute(2, 3, 0, 1).reshape(height * width, number * channels)
        found = F.embedding_bag(four.to(pixels.device), pixels, per_sample_weights=weights.to(pixels), mode="sum")
        return found.reshape(height, width, number, channels).permute(2, 3, 0, 1)

    return apply


def _between(places: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where places in -1 to 1 lie along a side of so many pixels.

    Returns:
        The pixel before each place, the pixel after it, and the distance from the former.
    """
    exact = ((places + 1) * side / 2 - 0.5).clamp(0, side - 1)
    before = exact.floor()
    return before.long(), (before.long() + 1).clamp(max=side - 1), exact - before


def _flip(random: list[float]) -> Transform:
    return (lambda images: images.flip(3)) if random[0] < 0.5 else (lambda images: images)


def _cutout(random: list[float]) -> Transform:
    """A square is set to 0, the mean of normalized images."""

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
