"""The pictures, from arrays that are made up: who is in them, and what is written beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from matplotlib import pyplot as plt

from revdistill.attribute import plots
from revdistill.attribute.check import Check
from revdistill.attribute.config import AttributeConfig
from revdistill.attribute.experiment import Experiment
from revdistill.attribute.found import Scored
from revdistill.outer.data import load
from tests.outer.legible import illegible


def scored(e: Experiment) -> Scored:
    generator = np.random.default_rng(0)
    queries, n = len(e.queries), len(e.examples)
    return Scored(generator.normal(size=(queries, n)), np.arange(1.0, queries + 1), np.ones(n), 0.5)


def texts(figure: plt.Figure) -> list[str]:
    found = [ax.get_title() for ax in figure.axes] + [text.get_text() for text in figure.texts]
    assert illegible(figure) == []
    plt.close(figure)
    return found


def test_queries_and_examples_that_are_shown() -> None:
    assert plots.shown(np.array([1.0, 5.0, 3.0, 2.0, 4.0]), 3) == [1, 2, 0]
    assert plots.shown(np.array([1.0, 5.0]), 6) == [1, 0]
    assert plots.extremes(np.array([0.5, -2.0, 0.0, 3.0, -1.0]), 2) == ([1, 4], [3, 0])
    assert plots.extremes(np.array([0.0, 1.0]), 2) == ([], [1])


def test_images_have_their_labels_and_scores() -> None:
    e = Experiment(AttributeConfig(examples=30, queries=2, flip=0.5), load("digits"))
    found = scored(e)
    best = int(found.scores[0].argmin())
    worst = int(found.scores[0].argmax())
    titles = texts(plots.images(e, found))
    for i in (best, worst):
        star = "*" if e.flipped[i] else ""
        assert f"{int(e.y[i])}{star}: {found.scores[0, i]:+.1g}" in titles
    assert f"{int(e.data.y_test[e.queries[1]])}: loss 2" in titles
    pixels = plots._pixels(e.x.numpy(), e.data)
    from sklearn.datasets import load_digits

    raw = load_digits().images[e.data.rows[e.examples.numpy()]] / 16
    assert np.allclose(pixels[:, 0], raw, atol=1e-5)


def test_points_and_features() -> None:
    e = Experiment(AttributeConfig(dataset="blobs", arch="LinearNet", examples=30, queries=7), load("blobs"))
    titles = texts(plots.points(e, scored(e)))
    assert sum(title.startswith("class ") for title in titles) == 6
    figure = plots.features(e, scored(e))
    (table,) = figure.axes[0].tables
    cells = {key: cell.get_text().get_text() for key, cell in table.get_celld().items()}
    first = plots.shown(scored(e).losses, 3)[0]
    assert cells[1, 0] == "query"
    assert cells[1, 3] == f"{float(e.data.x_test[e.queries[first]][0]):.3g}"
    assert [cells[r, 0] for r in range(2, 8)] == ["helpful"] * 3 + ["harmful"] * 3
    plt.close(figure)


def test_scores_and_check() -> None:
    harm, wrong = np.linspace(-1, 1, 50), np.arange(50) > 45
    figure = plots.distribution(harm, wrong)
    assert sum(patch.get_height() for patch in figure.axes[0].patches) == 50
    plt.close(figure)
    scores, dropped = torch.randn(3, 20), torch.rand(9, 20) < 0.3
    losses = torch.ones(3)
    actual = (losses[:, None] - scores @ dropped.T.float()).T
    check = Check.of(scores, losses, dropped, actual, drop=0.3, seed=0, smoothness=1.0)
    figure = plots.scatter(check, losses.numpy())
    for ax in figure.axes:
        x, y = ax.collections[0].get_offsets().T
        assert np.allclose(x, y, atol=1e-5)
    assert any("LDS 1.000" in text for text in texts(figure))
    assert figure.get_suptitle().startswith("LDS 1.000")


def test_of_a_class_that_nobody_is_left_of() -> None:
    """Fewer helpful or harmful examples than columns, and a query whose scores are all 0."""
    e = Experiment(AttributeConfig(examples=4, queries=1), load("digits"))
    found = replace(scored(e), scores=np.array([[0.0, 0.0, 1.0, 0.0]]))
    assert len([t for t in texts(plots.images(e, found)) if t.endswith("+1")]) == 1
    moons = Experiment(AttributeConfig(dataset="moons", arch="LinearNet", examples=4, queries=1), load("moons"))
    texts(plots.points(moons, replace(scored(moons), scores=np.zeros((1, 4)))))
