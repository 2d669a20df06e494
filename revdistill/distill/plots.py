"""Pictures of a run: what was distilled, with which rates, and how the outer loop went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from revdistill.distill.artifact import Artifact
from revdistill.distill.evaluation import train_plainly
from revdistill.outer import models
from revdistill.outer.data import Dataset
from revdistill.outer.drawing import figure_files, plain
from revdistill.outer.networks import NetworkStack, predictions
from revdistill.outer.optimizers import OPTIMIZERS

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

MAX_IMAGE_ROWS, MAX_IMAGE_COLUMNS, MAX_RATE_COLUMNS = 10, 20, 4
MAX_DRAWN = 1e100  # beyond it matplotlib overflows
GRID = 200  # points per side of a decision picture
_COLOURS = plt.get_cmap("tab10")


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


def images(artifact: Artifact) -> Figure:
    """The synthetic images: a column for each class, a row for each image of a class in a batch, step sizes beside it.

    As Wang et al. 2018, figure 3.
    """
    per_class, columns = _per_class(artifact), _spread(artifact.x.shape[1] // _per_class(artifact), MAX_IMAGE_COLUMNS)
    rows = [(batch, i) for batch in range(artifact.batches) for i in range(per_class)]
    rows = [rows[i] for i in _spread(len(rows), MAX_IMAGE_ROWS)]
    epochs = min(artifact.epochs, MAX_RATE_COLUMNS)
    cell, left, top, right = 0.6, 0.85, 0.75, 0.1 + 0.5 * epochs + 0.3 * (artifact.epochs > epochs)  # inches
    width, height = left + cell * len(columns) + right, top + cell * len(rows) + 0.1
    figure = plt.figure(figsize=(width, height))
    grid = figure.add_gridspec(
        len(rows),
        len(columns),
        left=left / width,
        right=1 - right / width,
        top=1 - top / height,
        bottom=0.1 / height,
        wspace=0.06,
        hspace=0.06,
    )
    x = artifact.x
    if artifact.whitening is not None:  # as they are seen
        x = artifact.whitening.undo(torch.from_numpy(x).flatten(0, 1)).reshape(x.shape).numpy()
    low, high = np.quantile(x, [0.005, 0.995])
    for i, (batch, index) in enumerate(rows):
        for j, column in enumerate(columns):
            position = column * per_class + index
            ax = figure.add_subplot(grid[i, j], xticks=[], yticks=[])
            image = np.clip((x[batch, position] - low) / max(high - low, 1e-12), 0, 1)
            ax.imshow(image.transpose(1, 2, 0) if len(image) == 3 else image[0], cmap="gray", vmin=0, vmax=1)
            if i == 0:
                ax.set_title(_column_class(artifact, column, per_class), fontsize=9)
            if j == 0 and index == 0:
                ax.set_ylabel(f"batch {batch + 1}", rotation=0, ha="right", va="center", fontsize=8)
        if index == 0:
            rates_here = [f"{rate:.3f}" for rate in artifact.lr.reshape(artifact.epochs, -1)[:epochs, batch]]
            text = "   ".join(rates_here) + ("   ..." if artifact.epochs > epochs else "")
            ax.annotate(text, (1.12, 0.5), xycoords="axes fraction", va="center", fontsize=8, annotation_clip=False)
    many = "epoch" if artifact.epochs == 1 else f"each of {artifact.epochs} epochs"
    shown, total = len(rows) * len(columns), artifact.x.shape[0] * artifact.x.shape[1]
    figure.suptitle(
        f"{shown} of {total} distilled images; right: step size in {many}", fontsize=10, y=1 - 0.1 / height, va="top"
    )
    return figure


def _per_class(artifact: Artifact) -> int:
    """How many images of a class a batch has, where batches are ordered by class; otherwise 1."""
    size = artifact.x.shape[1]
    classes = artifact.y.shape[2] if artifact.has_soft_labels else len(np.unique(artifact.y))
    return size // classes if size % classes == 0 else 1


def _spread(count: int, most: int) -> list[int]:
    """At most `most` positions, evenly over range(count), both ends included."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, most)).round())]


def _column_class(artifact: Artifact, column: int, per_class: int) -> str:
    """The class of a column's images: that of their mean label, as a single learned label may favour another class."""
    y = artifact.y[:, column * per_class : (column + 1) * per_class]
    votes = y.mean((0, 1)) if artifact.has_soft_labels else np.bincount(y.ravel())
    number = int(votes.argmax())
    return plain(artifact.classes[number]) if artifact.classes else str(number)


def _hard(y: np.ndarray) -> np.ndarray:
    return y.argmax(-1) if y.ndim == 3 else y


def points(artifact: Artifact, data: Dataset) -> Figure:
    """The synthetic points of four batches, spread over the sequence, over the faded real data."""
    s = artifact.batches
    shown = _spread(s, 4)
    figure, axes = plt.subplots(
        1, len(shown), figsize=(3.2 * len(shown), 3.3), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    y = _hard(artifact.y)
    for ax, batch in zip(axes[0], shown, strict=True):
        ax.scatter(*data.x.T, c=_COLOURS(data.y.numpy()), s=5, alpha=0.15, linewidths=0)
        ax.scatter(*artifact.x[batch].T, c=_COLOURS(y[batch]), s=45, edgecolors="black", linewidths=0.8)
        ax.set_title(f"batch {batch + 1} of {s}", fontsize=10)
    figure.suptitle(f"synthetic points over the real data{_whitened(artifact)}", fontsize=11)
    return figure


def decisions(artifact: Artifact, data: Dataset, architectures: list[str]) -> Figure:
    """What a fresh network of each architecture decides after training on the distilled data."""
    count = len(architectures)
    figure, axes = plt.subplots(
        1, count, figsize=(3.8 * count, 3.6), squeeze=False, sharex=True, sharey=True, layout="constrained"
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
        ax.set_title(f"{name}: test accuracy {accuracy:.1%}", fontsize=10)
    figure.suptitle(
        f"one fresh network trained on the distilled data,\nits decisions over the test data{_whitened(artifact)}",
        fontsize=11,
    )
    return figure


def _whitened(artifact: Artifact) -> str:
    return "" if artifact.whitening is None else ", whitened"


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
            ax.axvline(epoch * artifact.batches + 0.5, color="grey", linewidth=0.6, linestyle=":")
        ax.set_ylabel(name)
        ax.grid(alpha=0.25)
    axes[0, 0].set_title(f"learned step sizes; {artifact.epochs} epochs of {artifact.batches} batches", fontsize=11)
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


def outer(metrics: list[dict[str, Any]]) -> Figure:
    """Loss on real data and held-out accuracy over the outer steps."""
    figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    losses = [(step, loss) for step, loss in _logged(metrics, "loss") if loss > 0]
    ax.plot(*zip(*losses, strict=True), color=_COLOURS(0), linewidth=1) if losses else None
    ax.set_xlabel("outer step")
    ax.set_ylabel("loss on real data after training", color=_COLOURS(0))
    if losses:
        ax.set_yscale("log")
    ax.grid(alpha=0.25)
    accuracies = _logged(metrics, "held_out_accuracy")
    if accuracies:
        right = ax.twinx()
        right.plot(*zip(*accuracies, strict=True), color=_COLOURS(1), marker="o", markersize=3)
        right.set_ylabel("held-out accuracy", color=_COLOURS(1))
    return figure
