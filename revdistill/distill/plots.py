"""Pictures of a run: what was distilled, with which rates, and how the outer loop went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from revdistill.distill.artifact import Artifact
from revdistill.distill.evaluation import train_plainly
from revdistill.distill.image_grid import images, spread
from revdistill.outer import models
from revdistill.outer.data import Dataset
from revdistill.outer.drawing import BLUE, FAINT, RED, WIDTH, figure_files, styled
from revdistill.outer.networks import NetworkStack, predictions
from revdistill.outer.optimizers import OPTIMIZERS

MAX_DRAWN = 1e100  # beyond it matplotlib overflows
GRID = 200  # points per side of a decision picture
_COLOURS = plt.get_cmap("tab10")  # of classes


def draw_all(directory: Path, artifact: Artifact, data: Dataset | None, metrics: list[dict[str, Any]]) -> list[Path]:
    """Write every picture that fits the run to directory/plots.

    Args:
        directory: of the run.
        artifact: its result.
        data: the real data, `fitted` to the artifact, which are drawn where they are points in the plane; None
            otherwise.
        metrics: the entries of its log.

    Returns:
        The files.
    """
    figures: dict[str, Figure] = {"rates": rates(artifact)}
    if metrics:
        figures["outer"] = outer(metrics)
    if artifact.x.ndim == 5:
        figures["images"] = images(artifact)
    elif data is not None and data.input_shape == (2,):
        figures["points"] = points(artifact, data)
        names = [name for name in artifact.architectures if not models.is_own(name)]
        if names:
            figures["decisions"] = decisions(artifact, data, names)
    return figure_files(directory / "plots", figures)


def _hard(y: np.ndarray) -> np.ndarray:
    return y.argmax(-1) if y.ndim == 3 else y


@styled
def points(artifact: Artifact, data: Dataset) -> Figure:
    """The synthetic points of four batches, spread over the sequence, over the faded real data."""
    s = artifact.batches
    shown = spread(s, 4)
    figure, axes = plt.subplots(
        1,
        len(shown),
        figsize=_row(len(shown)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    y = _hard(artifact.y)
    for ax, batch in zip(axes[0], shown, strict=True):
        ax.scatter(*data.x.T, c=_COLOURS(data.y.numpy()), s=5, alpha=0.15, linewidths=0)
        ax.scatter(*artifact.x[batch].T, c=_COLOURS(y[batch]), s=45, edgecolors="black", linewidths=0.8)
        ax.set_title(f"batch {batch + 1} of {s}")
    figure.suptitle(f"synthetic points over the real data{_whitened(artifact)}")
    return figure


@styled
def decisions(artifact: Artifact, data: Dataset, architectures: list[str]) -> Figure:
    """What a fresh network of each architecture decides after training on the distilled data."""
    count = len(architectures)
    figure, axes = plt.subplots(
        1,
        count,
        figsize=_row(count),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    low, high = data.x.amin(0) - 0.4, data.x.amax(0) + 0.4
    grid_x, grid_y = np.meshgrid(*(np.linspace(float(a), float(b), GRID) for a, b in zip(low, high, strict=True)))
    grid = torch.from_numpy(np.stack([grid_x, grid_y], -1).reshape(-1, 2).astype(np.float32))
    for ax, name in zip(axes[0], architectures, strict=True):
        stack = NetworkStack(name, 1, data.input_shape, data.classes, torch.device("cpu"))
        params = stack.sample(artifact.seed)
        train_plainly(artifact, stack, params, artifact.lr.tolist(), artifact.momentum.tolist())
        with torch.no_grad():
            decided = predictions(stack.logits(params, grid))[0].reshape(GRID, GRID).numpy()
            accuracy = float(stack.accuracies(params, data.x_test, data.y_test)[0])
        levels = np.arange(data.classes + 1) - 0.5
        ax.contourf(
            grid_x, grid_y, decided, levels=levels, colors=[_COLOURS(c) for c in range(data.classes)], alpha=0.25
        )
        ax.scatter(*data.x_test.T, c=_COLOURS(data.y_test.numpy()), s=7, linewidths=0)
        ax.set_title(f"{name}: test accuracy {accuracy:.1%}")
    figure.suptitle(
        f"one fresh network trained on the distilled data,\nits decisions over the test data{_whitened(artifact)}",
    )
    return figure


def _row(count: int) -> tuple[float, float]:
    """Inches of a figure of so many panels beside each other."""
    each = min(3.6, WIDTH / count)
    return each * count, each + 0.6


def _whitened(artifact: Artifact) -> str:
    return "" if artifact.whitening is None else ", whitened"


@styled
def rates(artifact: Artifact) -> Figure:
    """Learned step sizes over the inner steps, and momenta where they vary."""
    varies = float(np.ptp(artifact.momentum)) > 0
    figure, axes = plt.subplots(
        1 + varies, 1, figsize=(7, 3.2 + 1.8 * varies), squeeze=False, sharex=True, layout="constrained"
    )
    labels = ("step size", OPTIMIZERS[artifact.optimizer].momentum_name)
    for ax, values, name in zip(axes[:, 0], (artifact.lr, artifact.momentum), labels, strict=False):
        ax.plot(np.arange(1, artifact.inner_steps + 1), values, marker=".", markersize=3, linewidth=1)
        for epoch in range(1, artifact.epochs):
            ax.axvline(epoch * artifact.batches + 0.5, color=FAINT, linewidth=0.8, linestyle=":")
        ax.set_ylabel(name)
        ax.grid()
    axes[0, 0].set_title(f"learned step sizes; {artifact.epochs} epochs of {artifact.batches} batches")
    axes[-1, 0].set_xlabel("inner step")
    return figure


def _logged(metrics: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of all entries whose value can be drawn."""
    found = [(m["step"] + 1, m.get(key)) for m in metrics]
    return [
        (step, float(v))
        for step, v in found
        if isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < MAX_DRAWN
    ]


@styled
def outer(metrics: list[dict[str, Any]]) -> Figure:
    """Loss on real data and held-out accuracy over the outer steps."""
    figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    losses = [(step, loss) for step, loss in _logged(metrics, "loss") if loss > 0]
    ax.plot(*zip(*losses, strict=True), color=BLUE, linewidth=1) if losses else None
    ax.set_xlabel("outer step")
    ax.set_ylabel("loss on real data after training", color=BLUE)
    if losses:
        ax.set_yscale("log")
    ax.grid()
    accuracies = _logged(metrics, "held_out_accuracy")
    if accuracies:
        right = ax.twinx()
        right.plot(*zip(*accuracies, strict=True), color=RED, marker="o", markersize=3)
        right.set_ylabel("held-out accuracy", color=RED)
    return figure
