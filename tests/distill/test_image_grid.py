"""The picture of distilled images: one scale for all, labels that say what they are, a bar where it helps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import pyplot as plt

from revdistill.distill.artifact import Artifact
from revdistill.distill.image_grid import images, label_text
from tests.distill.fuzz import artifact as small_artifact
from tests.outer.legible import illegible


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def made(x: np.ndarray, y: np.ndarray, **changes: object) -> Artifact:
    base = small_artifact(True)
    steps = len(x) * base.epochs
    lr, momentum = np.full(steps, 0.1, np.float32), np.full(steps, 0.5, np.float32)
    return replace(base, x=x.astype(np.float32), y=y, lr=lr, momentum=momentum, classes=[], **changes)


@pytest.mark.parametrize(
    ("weights", "classes", "text"),
    [
        ([0.1, 0.9], [], "1 .90 0 .10"),
        ([0.04, 0.96], [], "1 .96"),
        ([0.3, 0.25, 0.45], [], "2 .45 0 .30"),
        ([0.0, 1.0], [], "1 1.00"),
        ([0.2, 0.8], ["a", "$"], r"\$ .80 a .20"),
        ([0.2, 0.8], ["a", "a long name"], "1 .80 a .20"),
    ],
)
def test_labels(weights: list[float], classes: list[str], text: str) -> None:
    assert label_text(np.array(weights), classes) == text


def test_all_images_have_one_scale() -> None:
    """Symmetric about the data's mean where values lie on both sides of it."""
    draw = np.random.default_rng(0).normal(size=(2, 4, 1, 5, 5))
    for x, limits in (
        (draw, lambda x: (-np.abs(np.quantile(x, [0.005, 0.995])).max(), np.abs(np.quantile(x, [0.005, 0.995])).max())),
        (draw + 5, lambda x: tuple(np.quantile(x, [0.005, 0.995]))),
    ):
        artifact = made(x, np.arange(4).repeat(2).reshape(4, 2).T.copy())
        low, high = limits(artifact.x)
        figure = images(artifact)
        shown = [ax.images[0] for ax in figure.axes if ax.images]
        assert len(shown) == 8
        assert {image.get_clim() for image in shown} == {(0, 1)}
        order = [(0, c) for c in range(4)] + [(1, c) for c in range(4)]
        for image, place in zip(shown, order, strict=True):
            expected = np.clip((artifact.x[place][0] - low) / (high - low), 0, 1)
            np.testing.assert_allclose(np.asarray(image.get_array()), expected, atol=1e-5)
        bar = figure.axes[-1]
        assert bar.get_xlim() == pytest.approx((low, high))
        assert illegible(figure) == []


@pytest.mark.parametrize(("channels", "classes", "labels", "bars"), [(1, 3, 6, 1), (3, 3, 6, 0), (1, 12, 0, 1)])
def test_labels_and_a_bar_where_they_fit(channels: int, classes: int, labels: int, bars: int) -> None:
    """Colours have no bar, and more than ten columns leave no room for labels."""
    x = np.random.default_rng(1).normal(size=(2, classes, channels, 5, 5))
    y = np.eye(classes, dtype=np.float32)[None].repeat(2, 0) * 0.5 + 0.5 / classes
    y[1, 0] = np.eye(classes)[1]  # learned to favour another class
    figure = images(made(x, y))
    texts = [text.get_text() for ax in figure.axes if ax.images for text in ax.texts]
    shares = [text for text in texts if (text.count(".") == 2 and "0.1" not in text) or text == "1 1.00"]
    assert len(shares) == labels
    if labels:
        assert shares[0] == "0 .67 1 .17"
        assert shares[classes] == "1 1.00"
    assert sum(not ax.images for ax in figure.axes) == bars
    assert illegible(figure) == []


def test_every_batch_that_is_shown_is_named() -> None:
    """Regression: of four images of a class in a batch some are left out, and with them were their batches' names."""
    artifact = made(np.random.default_rng(2).normal(size=(4, 8, 1, 5, 5)), np.arange(2).repeat(4)[None].repeat(4, 0))
    names = [label for ax in images(artifact).axes if (label := ax.get_ylabel())]
    assert names == [f"batch {i}" for i in (1, 2, 3, 4)]
