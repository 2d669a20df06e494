"""ZCA whitening, against its formula in float64; in a file, and in what is evaluated from it."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from revdistill.cli import main as command

from revdistill.distill import distillation, plots
from revdistill.distill.artifact import read
from revdistill.distill.config import Config
from revdistill.distill.distillation import Distillation
from revdistill.distill.distiller import Distiller
from revdistill.distill.evaluation import evaluate
from revdistill.outer import whitening
from revdistill.outer.data import load
from revdistill.outer.networks import NetworkStack
from revdistill.outer.random_streams import evaluation_seed
from revdistill.outer.whitening import Whitening


def samples(number: int = 300, features: int = 12, seed: int = 0) -> np.ndarray:
    """Correlated, with a mean, of variances from 4 to nearly nothing."""
    draw = np.random.default_rng(seed)
    turned = np.linalg.qr(draw.normal(size=(features, features)))[0]
    return (draw.normal(size=(number, features)) * np.linspace(2, 0.05, features)) @ turned + draw.normal(size=features)


def eigen(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Variances from the largest, their directions as rows, and what is added to variances."""
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    return values[::-1], vectors.T[::-1], 0.1 * float(values.mean())


def test_with_all_variance_it_is_the_inverse_square_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """(covariance + eps)^(-1/2), of samples and of others."""
    monkeypatch.setattr(whitening, "VARIANCE", 1.0 - 1e-15)
    x, other = samples(), samples(seed=1)
    values, directions, eps = eigen(x)
    w = directions.T @ np.diag((values + eps) ** -0.5) @ directions
    found = Whitening.of(torch.from_numpy(x).float().reshape(-1, 3, 2, 2))
    assert found.components.shape == (12, 12)
    for rows in (x, other):
        white = found.apply(torch.from_numpy(rows).float().reshape(-1, 3, 2, 2))
        assert white.shape == (300, 3, 2, 2)
        np.testing.assert_allclose(white.flatten(1), (rows - x.mean(0)) @ w, rtol=1e-4, atol=1e-4)


def test_what_is_left_over_has_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the definition says, and in chunks."""
    monkeypatch.setattr(whitening, "CHUNK", 7)
    x = samples()
    values, directions, eps = eigen(x)
    shares = np.cumsum(values) / values.sum()
    kept = next(r for r in range(1, 13) if shares[r - 1] >= 0.99)
    assert 1 < kept < 12
    found = Whitening.of(torch.from_numpy(x).float())
    assert found.components.shape == (kept, 12)
    rest = (values[kept:].mean() + eps) ** -0.5
    assert found.rest == pytest.approx(rest, rel=1e-4)
    scales = np.full(12, rest)
    scales[:kept] = (values[:kept] + eps) ** -0.5
    expected = (x - x.mean(0)) @ (directions.T @ np.diag(scales) @ directions)
    np.testing.assert_allclose(found.apply(torch.from_numpy(x).float()), expected, rtol=1e-4, atol=1e-4)


def test_it_can_be_undone() -> None:
    x = torch.from_numpy(samples()).float().reshape(-1, 3, 4)
    found = Whitening.of(x)
    torch.testing.assert_close(found.undo(found.apply(x)), x, rtol=1e-4, atol=1e-4)
    turned = x.permute(0, 2, 1).contiguous().permute(0, 2, 1)  # regression: what is not contiguous was lost
    assert torch.equal(found.apply(turned), found.apply(x))
    assert found.apply(x[:0]).shape == (0, 3, 4)


def test_features_that_do_not_vary() -> None:
    """One of them, all of them: 0 at the mean, and finite elsewhere."""
    x = torch.from_numpy(samples()).float()
    x[:, 3] = 7.0
    found = Whitening.of(x)
    assert float(found.apply(x)[:, 3].abs().max()) < 1e-5
    constant = Whitening.of(torch.full((5, 4), 2.5))
    assert torch.equal(constant.apply(torch.full((3, 4), 2.5)), torch.zeros(3, 4))
    assert bool(torch.isfinite(constant.apply(x[:, :4])).all())
    torch.testing.assert_close(constant.undo(constant.apply(x[:, :4])), x[:, :4], rtol=1e-4, atol=1e-4)


def test_too_many_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"zca is True, but inputs have 16,385 features.* at most 16,384: use smaller"):
        Whitening.of(torch.zeros(1, 16385))


def test_evaluated_from_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a training, and afterwards: the accuracies of a plain torch loop, which whitens the test images
    once, by what the file has.
    """
    monkeypatch.setattr(distillation, "RESTARTS", 2)
    data = load("digits")
    config = Config("digits", ("LinearNet",), steps=2, epochs=2, outer_steps=2, batch_size=64, zca=True, momentum=0.5)
    result = Distillation(tmp_path, Distiller(config, data)).run()
    with h5py.File(tmp_path / "distilled.h5") as file:
        x, y, lr, mean, components, scales = (
            torch.from_numpy(file[name][()])
            for name in ("x", "y", "lr", "whitening_mean", "whitening_components", "whitening_scales")
        )
        rest, said = file.attrs["whitening_rest"], json.loads(file.attrs["evaluation"])
        assert json.loads(file.attrs["normalization"]) == data.normalization
    centred = data.x_test.flatten(1) - mean
    white = rest * centred + ((scales - rest) * (centred @ components.T)) @ components
    drawn = NetworkStack("LinearNet", 2, data.input_shape, 10, torch.device("cpu")).sample(evaluation_seed(0))
    accuracies = []
    for number in range(2):
        net = torch.nn.Linear(64, 10)
        with torch.no_grad():
            for own, p in zip(net.parameters(), drawn.values(), strict=True):
                own.copy_(p[number])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.5)
        for k in range(4):
            optimizer.param_groups[0]["lr"] = float(lr[k])
            optimizer.zero_grad()
            F.cross_entropy(net(x[k % 2].flatten(1)), y[k % 2]).backward()
            optimizer.step()
        accuracies.append(float((net(white).argmax(1) == data.y_test).float().mean()))
    assert said["LinearNet"]["accuracies"] == pytest.approx(accuracies, abs=1e-6)
    assert result.evaluation == said
    assert evaluate(read(tmp_path / "distilled.h5"), data, "LinearNet", restarts=2).accuracies == pytest.approx(
        accuracies, abs=1e-6
    )


def test_pictures_of_points_show_both_in_the_same_coordinates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: `train` drew whitened synthetic points over real ones that were not."""
    drawn = []
    monkeypatch.setattr(plots, "draw_all", lambda _, artifact, data, __: drawn.append((artifact, data)) or [])
    quick = ["--steps", "1", "--epochs", "1", "--outer-steps", "1", "--outer-lr", "1e-9", "--arch", "LinearNet"]
    assert command.run(["train", "--dataset", "moons", "--zca", *quick, "--out", str(tmp_path)]) == 0
    ((artifact, data),) = drawn
    nearest = (data.x[:, None] - torch.from_numpy(artifact.x[0])).norm(dim=-1).min(0).values
    assert float(nearest.max()) < 1e-4  # they are two of the real points still
    assert not torch.allclose(data.x, load("moons").x)
