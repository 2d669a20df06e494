"""What is stored of synthetic inputs, and the inputs that it stands for.

Each parametrization has leaves, which are learned and stored, and makes the batches of them, differentiably:

- Pixels: the inputs themselves.
- Packed: an image holds several smaller ones, which are enlarged for training (Kim et al., ICML 2022).
- Bases: images are linear combinations of a few small ones, enlarged likewise (Deng & Russakovsky, NeurIPS 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Leaves = dict[str, Tensor]
MOST_PACKED = 64  # along a side of an image
REDUCED = 2  # bases have half the height and width
# Of the inputs that a few stored numbers may stand for: 2 GiB, and matrices of 16 MiB to enlarge images.
MOST_INPUTS, MOST_SIDE = 2**29, 2**11


class Parametrization(Protocol):
    """How inputs are stored. copies: how many inputs one of the `per_class` makes."""

    @property
    def copies(self) -> int: ...

    def numbers(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How many numbers the inputs have that leaves of these shapes make."""

    def start(self, x: Tensor) -> Leaves:
        """The leaves that are nearest to inputs [s, B x copies, ...], ordered by class."""

    def inputs(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """The inputs [s, B x copies, ...] of the leaves, differentiable in them."""


@dataclass(frozen=True)
class Pixels:
    """x: the inputs themselves, [s, B, ...]."""

    copies = 1

    def numbers(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return math.prod(shapes["x"])

    def start(self, x: Tensor) -> Leaves:
        return {"x": x}

    def inputs(self, leaves: Mapping[str, Tensor]) -> Tensor:
        return leaves["x"]


@dataclass(frozen=True)
class Packed:
    """x: images [s, B, channels, H, W], each of factor x factor smaller ones, row by row.

    They are enlarged to H x W bilinearly, as torch.nn.functional.interpolate does (align_corners=False).
    """

    factor: int

    @property
    def copies(self) -> int:
        return self.factor**2

    def numbers(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return self.copies * math.prod(shapes["x"])

    def start(self, x: Tensor) -> Leaves:
        batches, number, channels, height, width = x.shape
        p, small = self.factor, (height // self.factor, width // self.factor)
        tiles = F.interpolate(x.flatten(0, 1).cpu(), size=small, mode="area")
        tiles = tiles.reshape(batches, number // p**2, p, p, channels, *small)
        whole = tiles.permute(0, 1, 4, 2, 5, 3, 6).reshape(batches, number // p**2, channels, height, width)
        return {"x": whole.contiguous().to(x.device)}

    def inputs(self, leaves: Mapping[str, Tensor]) -> Tensor:
        batches, stored, channels, height, width = leaves["x"].shape
        p = self.factor
        tiles = leaves["x"].reshape(batches, stored, channels, p, height // p, p, width // p)
        tiles = tiles.permute(0, 1, 3, 5, 2, 4, 6).reshape(batches, stored * p**2, channels, height // p, width // p)
        return enlarged(tiles, (height, width))


@dataclass(frozen=True)
class Bases:
    """bases [R, channels, h, w], half the height and width, and coefficients [s, B, R].

    An image is the sum of the bases, each times its coefficient, enlarged bilinearly.

    count: R.
    shape: of the images, (channels, H, W).
    """

    count: int
    shape: tuple[int, ...]
    copies = 1

    def numbers(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return math.prod(shapes["coefficients"][:2]) * math.prod(self.shape)

    def start(self, x: Tensor) -> Leaves:
        """The R principal components of the reduced inputs (not centred), of root mean square 1.

        Raises:
            ValueError: there are more bases than inputs, or than numbers in a basis: fewer make the same images.
        """
        batches, number, channels, height, width = x.shape
        small = (height // REDUCED, width // REDUCED)
        # float64 on the CPU: the same on every device
        rows = F.interpolate(x.flatten(0, 1).cpu().double(), size=small, mode="area").flatten(1)
        if self.count > min(rows.shape):
            raise ValueError(
                f"bases is {self.count}, but {rows.shape[0]:,} synthetic images, of {rows.shape[1]:,} numbers at half "
                f"their size, need no more than {min(rows.shape):,}; accepted is an integer from 1 to that"
            )
        left, values, right = torch.linalg.svd(rows, full_matrices=False)
        scale, r = math.sqrt(rows.shape[1]), self.count
        bases = (right[:r] * scale).reshape(r, channels, *small)
        coefficients = (left[:, :r] * (values[:r] / scale)).reshape(batches, number, r)
        return {
            "bases": bases.float().contiguous().to(x.device),
            "coefficients": coefficients.float().contiguous().to(x.device),
        }

    def inputs(self, leaves: Mapping[str, Tensor]) -> Tensor:
        bases, coefficients = leaves["bases"], leaves["coefficients"]
        small = (coefficients @ bases.flatten(1)).reshape(*coefficients.shape[:2], *bases.shape[1:])
        return enlarged(small, self.shape[1:])


def enlarged(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """images [s, B, channels, h, w] at the height and width `size`, bilinearly: torch's interpolate
    (align_corners=False) as two products with matrices, as the derivative of its own adds up in any order on CUDA.
    """
    down, across = (_interpolation(a, b).to(images) for a, b in zip(images.shape[-2:], size, strict=True))
    return down @ images @ across.T


def _interpolation(small: int, large: int) -> Tensor:
    """[large, small], what interpolate does along one side."""
    eye = torch.eye(small, dtype=torch.float64)
    return F.interpolate(eye[None], size=large, mode="linear", align_corners=False)[0].T.contiguous()


def chosen(shape: tuple[int, ...], stored: int, pack: int, bases: int | None) -> Parametrization:
    """The parametrization that a configuration asks for.

    Args:
        shape: of an input.
        stored: how many there are, those that are packed into one counted once.
        pack: how many images along each side of a stored one; 1 for none.
        bases: R, or None.

    Raises:
        ValueError: it does not go with the inputs.
    """
    if pack == 1 and bases is None:
        return Pixels()
    name, value, divisor = ("pack", pack, pack) if bases is None else ("bases", bases, REDUCED)
    if len(shape) != 3:
        raise ValueError(f"{name} is {value}, but the inputs have shape {list(shape)}; it is for images")
    if any(side % divisor for side in shape[1:]):
        raise ValueError(
            f"{name} is {value}, but images are {shape[1]} x {shape[2]}, which {divisor} does not divide"
            + (f"; accepted is {_divisors(shape)}" if bases is None else "")
        )
    form = Packed(pack) if bases is None else Bases(bases, shape)
    reason = too_large(stored * form.copies * math.prod(shape), shape)
    if reason:
        raise ValueError(f"{name} is {value}, which stands for {reason}")
    return form


def too_large(numbers: int, shape: tuple[int, ...]) -> str | None:
    """Why inputs are too large to be made of fewer numbers; None where they are not.

    Args:
        numbers: of all inputs.
        shape: of one, (channels, H, W).
    """
    if max(shape[1:]) > MOST_SIDE:
        return f"images of {shape[1]:,} x {shape[2]:,}; at most {MOST_SIDE:,} x {MOST_SIDE:,} are accepted"
    return f"inputs of {numbers:,} numbers; at most {MOST_INPUTS:,} are accepted" if numbers > MOST_INPUTS else None


def form_of(shapes: Mapping[str, tuple[int, ...]], pack: int) -> Parametrization:
    """The parametrization of leaves of these shapes."""
    if "bases" in shapes:
        count, channels, height, width = shapes["bases"]
        return Bases(count, (channels, REDUCED * height, REDUCED * width))
    return Packed(pack) if pack > 1 else Pixels()


def _divisors(shape: tuple[int, ...]) -> str:
    side = math.gcd(*shape[1:])
    return ", ".join(str(d) for d in range(1, side + 1) if side % d == 0)
