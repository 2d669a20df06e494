"""The options of the outer loop: averaging, decay, rates of their own, windows, growth, augmentation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from revdistill.distill import augment
from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.distill.presets import PRESETS, settings
from revdistill.outer.data import load

SMALL = Config(
    dataset="moons",
    architectures=("NonLinearNet",),
    steps=5,
    epochs=4,
    per_class=2,
    outer_steps=10,
    batch_size=64,
    lr=0.1,
)
MOONS, DIGITS = load("moons"), load("digits")


def test_the_result_is_the_mean_of_the_last_iterates() -> None:
    distiller = Distiller(replace(SMALL, average=0.3), MOONS)
    iterates = []
    for k in range(10):
        distiller.step()
        if k < 7:
            assert torch.equal(distiller.result.x, distiller.synthetic.x)
        else:
            iterates.append(distiller.synthetic.x.detach().clone())
    assert distiller.descent.averaged == 3
    assert torch.allclose(distiller.result.x, torch.stack(iterates).mean(0), atol=1e-6)
    assert not torch.equal(distiller.result.x, distiller.synthetic.x)
    artifact = distiller.artifact()
    assert torch.equal(torch.from_numpy(artifact.x), distiller.result.x)
    assert torch.equal(torch.from_numpy(artifact.lr), distiller.result.lr())


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", [1.0] * 10),
        ("halving", [0.5**k for k in range(10)]),
        ("cosine", [0.5 * (1 + torch.cos(torch.tensor(torch.pi * k / 10)).item()) for k in range(10)]),
    ],
)
def test_the_outer_rate_decays(decay: str, expected: list[float]) -> None:
    distiller = Distiller(replace(SMALL, outer_decay=decay, outer_lr=0.02, outer_lr_rates=0.005), MOONS)
    found = []
    for _ in range(10):
        distiller.step()
        found.append([group["lr"] for group in distiller.descent.optimizer.param_groups])
    assert found == [pytest.approx([0.02 * e, 0.005 * e]) for e in expected]


def test_rates_and_momenta_may_stay_as_they_are() -> None:
    distiller = Distiller(replace(SMALL, outer_lr_rates=0.0, learn_momentum=True), MOONS)
    x = distiller.synthetic.x.detach().clone()
    distiller.step()
    assert torch.allclose(distiller.synthetic.lr(), torch.tensor(0.1))
    assert torch.allclose(torch.as_tensor(distiller.synthetic.momentum()), torch.tensor(0.7))
    assert not torch.equal(distiller.synthetic.x, x)


def test_the_unroll_grows() -> None:
    distiller = Distiller(replace(SMALL, grow=0.5, outer_steps=100), MOONS)
    lengths = [distiller._horizon(k) for k in range(100)]
    assert lengths[0] == 2
    assert lengths == sorted(lengths)
    assert set(lengths) == set(range(2, 21))
    assert lengths[49:] == [20] * 51
    assert lengths[44] < 20
    distiller.step()
    gradient = distiller.synthetic.leaves["raw_lr"].grad
    assert gradient is not None
    assert gradient[:2].all()
    assert not gradient[2:].any()


def test_windows_end_anywhere_and_reach_back_so_far() -> None:
    distiller = Distiller(replace(SMALL, window=6), MOONS)
    lengths = [distiller._horizon(k) for k in range(400)]
    assert set(lengths) == set(range(6, 21))
    for _ in range(4):
        k = distiller.outer_step
        distiller.step()
        gradient = distiller.synthetic.leaves["raw_lr"].grad
        assert gradient is not None
        end = lengths[k]
        assert gradient[end - 6 : end].all()
        assert not gradient[: end - 6].any()
        assert not gradient[end:].any()


def names_in_graph(value: torch.Tensor) -> set[str]:
    """Of all autograd nodes that a value was made by."""
    names, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [parent for parent, _ in node.next_functions]
    return names


IMAGES = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_augmentations_are_siamese_and_differentiable(name: str) -> None:
    for seed in range(5):
        transform = augment.draw([name], torch.Generator().manual_seed(seed))
        images = IMAGES.clone().requires_grad_()
        changed = transform(images)
        assert changed.shape == images.shape
        assert torch.isfinite(changed).all()
        assert torch.allclose(transform(images[2:4]), changed[2:4], atol=1e-6)  # the same for every image
        changed.square().sum().backward()
        assert images.grad is not None
        assert images.grad.abs().sum() > 0
        again = augment.draw([name], torch.Generator().manual_seed(seed))(images)
        assert torch.equal(again, changed)


@pytest.mark.parametrize("name", ["crop", "scale", "rotate"])
@pytest.mark.parametrize("shape", [(2, 3, 9, 14), (5, 1, 8, 8), (1, 2, 1, 6)])
def test_shifts_scales_and_turns_sample_as_torch_does(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...]
) -> None:
    """As grid_sample, images and gradients; but by operators whose derivatives have one order on a GPU, where its have
    none.
    """
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_()
    weights = torch.randn(shape, dtype=torch.float64, generator=draw)
    matrices = []
    for seed in range(5):
        affine = augment._affine
        monkeypatch.setattr(augment, "_affine", lambda matrix: matrices.append(matrix) or affine(matrix))  # noqa: B023
        found = augment.draw([name], torch.Generator().manual_seed(seed))(images)
        monkeypatch.undo()
        theta = torch.tensor(matrices[-1], dtype=torch.float64).expand(len(images), 2, 3)
        grid = F.affine_grid(theta, list(shape), align_corners=False)
        expected = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        mine, theirs = (torch.autograd.grad((y * weights).sum(), images)[0] for y in (found, expected))
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        assert any("GridSampler" in name for name in names_in_graph(expected.sum()))
        assert not any("GridSampler" in name for name in names_in_graph(found.sum()))


def test_augmentations_do_what_they_say() -> None:
    def drawn(name: str) -> list[torch.Tensor]:
        return [augment.draw([name], torch.Generator().manual_seed(seed))(IMAGES) for seed in range(30)]

    assert {bool(torch.equal(a, IMAGES.flip(3))) for a in drawn("flip")} == {True, False}
    for cut in drawn("cutout"):
        share = (cut[0, 0] == 0).float().mean()
        assert 0 < share <= 0.25 + 1e-6
        assert torch.equal(cut[cut != 0], IMAGES[cut != 0])
    flat = torch.full((1, 3, 12, 12), 0.7)
    for name in ("crop", "scale", "rotate"):  # nothing comes in from outside but the border
        assert torch.allclose(augment.draw([name], torch.Generator().manual_seed(1))(flat), flat)
    names = {
        tuple(augment.AUGMENTATIONS)[int(torch.randint(6, (), generator=torch.Generator().manual_seed(s)))]
        for s in range(60)
    }
    assert names == set(augment.AUGMENTATIONS)


def test_synthetic_and_real_images_are_augmented_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    draw = augment.draw

    def noting(*arguments: object) -> augment.Transform:
        transform = draw(*arguments)  # type: ignore[arg-type]

        def noted(images: torch.Tensor) -> torch.Tensor:
            seen.append((transform, len(images)))
            return transform(images)

        return noted

    monkeypatch.setattr(augment, "draw", noting)
    config = Config(steps=2, epochs=2, outer_steps=3, augment=("crop", "scale", "rotate", "cutout"), batch_size=50)
    distiller = Distiller(config, DIGITS)
    distiller.step()
    (first, real), (second, synthetic) = seen
    assert first is second
    assert (synthetic, real) == (20, 50)
    assert distiller.synthetic.x.grad is not None
    distiller.validation_accuracy()
    assert len(seen) == 2  # held-out accuracy is that of training without augmentation, as evaluation does


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_configurations(name: str) -> None:
    config = replace(Config(**settings(name, "", ())), outer_steps=2, batch_size=64, inits=1, epochs=1)
    distiller = Distiller(config, DIGITS)
    for _ in range(2):
        assert distiller.step().diverged is None
