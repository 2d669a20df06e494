"""Inputs that are stored in another form: what they stand for, by loops over single images, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from revdistill.distill import parametrization
from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.distill.parametrization import Bases, Packed, Pixels, chosen, form_of
from revdistill.distill.plots import images
from revdistill.distill.synthetic import Synthetic
from revdistill.outer.data import Dataset

DRAW = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=DRAW, dtype=torch.float64)


def bilinear(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image[None], size=(height, width), mode="bilinear", align_corners=False)[0]


def area(image: Tensor, height: int, width: int) -> Tensor:
    """Means of equal rectangles."""
    rows, columns = image.shape[1] // height, image.shape[2] // width
    found = torch.empty(len(image), height, width, dtype=image.dtype)
    for i in range(height):
        for j in range(width):
            found[:, i, j] = image[:, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].mean((1, 2))
    return found


def test_packed_images_are_their_tiles_enlarged() -> None:
    """Row by row, for images that are no squares; and the derivatives."""
    x, form = drawn(2, 3, 2, 6, 9).requires_grad_(), Packed(3)
    expected = [
        [
            bilinear(image[:, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3], 6, 9)
            for image in batch
            for i in range(3)
            for j in range(3)
        ]
        for batch in x
    ]
    found = form.inputs({"x": x})
    torch.testing.assert_close(found, torch.stack([torch.stack(batch) for batch in expected]), rtol=1e-12, atol=1e-12)
    assert form.numbers({"x": tuple(x.shape)}) == found.numel()
    part = x[:1, :1, :1, :, :6].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: form.inputs({"x": x}), part)
    torch.testing.assert_close(form.inputs({"x": x.float()}), found.float())  # of its leaf's dtype


def test_packed_images_start_as_real_ones_reduced() -> None:
    x = drawn(2, 8, 3, 4, 6)
    stored = Packed(2).start(x)["x"]
    assert stored.shape == (2, 2, 3, 4, 6)
    for batch in range(2):
        for k in range(8):
            i, j = divmod(k % 4, 2)
            tile = stored[batch, k // 4, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
            torch.testing.assert_close(tile, area(x[batch, k], 2, 3), rtol=1e-12, atol=1e-12)


def test_bases_make_their_combinations_enlarged() -> None:
    bases, coefficients = drawn(3, 2, 2, 3).requires_grad_(), drawn(2, 4, 3).requires_grad_()
    form = form_of({"bases": tuple(bases.shape), "coefficients": tuple(coefficients.shape)}, 1)
    assert form == Bases(3, (2, 4, 6))
    found = form.inputs({"bases": bases, "coefficients": coefficients})
    assert found.shape == (2, 4, 2, 4, 6)
    for batch in range(2):
        for i in range(4):
            small = sum(coefficients[batch, i, r] * bases[r] for r in range(3))
            assert isinstance(small, Tensor)
            torch.testing.assert_close(found[batch, i], bilinear(small, 4, 6), rtol=1e-12, atol=1e-12)
    shapes = {"bases": tuple(bases.shape), "coefficients": tuple(coefficients.shape)}
    assert form.numbers(shapes) == found.numel()
    few = [bases[:2, :1].detach().requires_grad_(), coefficients[:1, :2, :2].detach().requires_grad_()]
    small = Bases(2, (1, 4, 6))
    assert torch.autograd.gradcheck(lambda b, c: small.inputs({"bases": b, "coefficients": c}), few)


def test_bases_start_as_what_is_nearest() -> None:
    """As many as there are images give the reduced images; fewer their best approximation, by the singular values."""
    x = drawn(2, 3, 1, 4, 4).float()
    reduced = torch.stack([torch.stack([area(image, 2, 2) for image in batch]) for batch in x])
    rows = reduced.flatten(2).flatten(0, 1)
    for r, left in ((4, 0.0), (2, torch.linalg.svdvals(rows)[2:].square().sum().sqrt().item())):
        leaves = Bases(r, (1, 4, 4)).start(x)
        found = (leaves["coefficients"] @ leaves["bases"].flatten(1)).flatten(0, 1)
        assert float((found - rows).norm()) == pytest.approx(left, abs=1e-5)
        assert torch.allclose(leaves["bases"].square().mean((1, 2, 3)), torch.ones(r))
    enlarged = Bases(4, (1, 4, 4)).inputs(Bases(4, (1, 4, 4)).start(x))
    assert torch.allclose(enlarged[1, 2], bilinear(reduced[1, 2], 4, 4), atol=1e-5)
    with pytest.raises(
        ValueError, match=r"bases is 5, but 6 synthetic images, of 4 .* need no more than 4; accepted is"
    ):
        Bases(5, (1, 4, 4)).start(x)


REFUSED = {
    "vectors": (((2,), 2, 2, None), r"pack is 2, but the inputs have shape \[2\]; it is for images"),
    "vectors of bases": (((2,), 2, 1, 3), r"bases is 3, but the inputs have shape \[2\]; it is for images"),
    "sides": (((1, 8, 12), 2, 3, None), "pack is 3, but images are 8 x 12, which 3 .*; accepted is 1, 2, 4$"),
    "odd sides": (((1, 8, 7), 2, 1, 3), "bases is 3, but images are 8 x 7, which 2 does not divide"),
    "too many": (((1, 64, 64), 33, 64, None), "pack is 64, which stands for inputs of 553,648,128 numbers; at most"),
    "too long": (((1, 2, 4096), 1, 2, None), "pack is 2, which stands for images of 2 x 4,096; at most 2,048 x 2,048"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(name: str) -> None:
    given, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        chosen(*given)


def test_pack_and_bases_are_two_ways() -> None:
    with pytest.raises(ValueError, match="bases is 4; accepted is none with pack"):
        Config(pack=2, bases=4)
    assert chosen((2,), 1, 1, None) == Pixels()
    assert isinstance(chosen((1, 4, 4), 1, 2, None), Packed)


def constant_images(classes: int = 3) -> Dataset:
    """Images that all have their class's number at each place."""
    y = torch.arange(classes).repeat(4)
    x = y.float()[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    parts = {f"{name}_{part}": t for part in ("validation", "test") for name, t in (("x", x), ("y", y))}
    normalization = {"mean": [0.0], "std": [1.0]}
    return Dataset("constant", x, y, classes=classes, normalization=normalization, **parts)


def test_images_are_ordered_by_class() -> None:
    """The tiles of a stored image are of one class, and its labels say which; so do the titles of the pictures."""
    data = constant_images()
    config = Config(architectures=("LinearNet",), steps=2, epochs=1, per_class=2, pack=2, noise=0.0)
    made = Synthetic(config, data)
    assert made.leaves["x"].shape == (2, 6, 1, 4, 4)
    assert torch.equal(made.labels(), torch.arange(3).repeat_interleave(8).expand(2, -1))
    assert torch.allclose(made.x, made.labels().float()[:, :, None, None, None].expand_as(made.x), atol=1e-6)
    with_bases = Synthetic(replace(config, pack=1, bases=1), data)
    labels = with_bases.labels().float()[:, :, None, None, None]
    assert torch.allclose(with_bases.x, labels.expand_as(with_bases.x), atol=1e-5)


def test_columns_of_packed_images_are_named_by_their_class() -> None:
    config = Config(architectures=("LinearNet",), steps=1, epochs=1, pack=2, learn_labels=True, noise=0.0)
    artifact = Distiller(config, constant_images()).artifact()
    figure = images(artifact)
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == ["0", "1", "2"]
    grey = [[float(ax.images[0].get_array().mean()) for ax in figure.axes[row : row + 3]] for row in range(0, 12, 3)]
    assert all(row == pytest.approx([0, 0.5, 1], abs=1e-6) for row in grey)
    assert artifact.numbers == {"inputs": 3 * 16, "labels": 12 * 3}


def test_what_a_few_numbers_may_stand_for_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made, as it could not be read from its file at the end."""
    monkeypatch.setattr(parametrization, "MOST_INPUTS", 2 * 3 * 4 * 16 - 1)
    config = Config(architectures=("LinearNet",), steps=2, epochs=1, pack=2)
    with pytest.raises(ValueError, match="pack is 2, which stands for inputs of 384 numbers; at most 383"):
        Distiller(config, constant_images())
    assert Synthetic(replace(config, pack=1), constant_images()).x.numel() == 96
