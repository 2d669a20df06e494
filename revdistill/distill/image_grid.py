"""The picture of distilled images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import MaxNLocator

from revdistill.distill.artifact import Artifact
from revdistill.outer.drawing import SMALL, WIDTH, plain, styled

MAX_ROWS, MAX_COLUMNS, MAX_RATES = 10, 20, 3
MAX_LABELLED = 10  # columns beside each other that leave room for labels
SECOND = 0.05  # the second class of a soft label is named from this weight on
CELL = 0.6  # inches of an image
BAR = 0.52  # inches of the colour bar, with what stands under it


@styled
def images(artifact: Artifact) -> Figure:
    """The synthetic images: a column for each class, a row for each image of a class in a batch, step sizes beside it.

    As Wang et al. 2018, figure 3. All images have one scale, which a bar shows where they have one channel. Over each
    is its soft label: the class of most weight, and the second where it has 0.05 or more.
    """
    per_class, columns = _per_class(artifact), spread(artifact.x.shape[1] // _per_class(artifact), MAX_COLUMNS)
    rows = [(batch, i) for batch in range(artifact.batches) for i in range(per_class)]
    rows = [rows[i] for i in spread(len(rows), MAX_ROWS)]
    labelled = artifact.has_soft_labels and len(columns) <= MAX_LABELLED
    x = artifact.x
    if artifact.whitening is not None:  # as they are seen
        x = artifact.whitening.undo(torch.from_numpy(x).flatten(0, 1)).reshape(x.shape).numpy()
    low, high = _limits(x)
    figure, grid = _canvas(artifact, len(rows), len(columns), labelled)
    for i, (batch, index) in enumerate(rows):
        first = i == 0 or rows[i - 1][0] != batch  # that is shown of its batch
        for j, column in enumerate(columns):
            position = column * per_class + index
            ax = figure.add_subplot(grid[i, j], xticks=[], yticks=[])
            image = np.clip((x[batch, position] - low) / max(high - low, 1e-12), 0, 1)
            shown = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
            ax.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if i == 0:
                ax.set_title(_column_class(artifact, column, per_class), pad=16 if labelled else 5)
            if j == 0 and first:
                ax.set_ylabel(f"batch {batch + 1}", rotation=0, ha="right", va="center")
            if labelled:
                text = label_text(artifact.y[batch, position], artifact.classes)
                ax.text(0.5, 1.05, text, transform=ax.transAxes, ha="center", va="bottom", fontsize=SMALL)
        if first:
            _rates(ax, artifact, batch)
    if x.shape[2] == 1:
        _bar(figure, low, high, len(columns))
    many = "epoch" if artifact.epochs == 1 else f"each of {artifact.epochs} epochs"
    shown, total = len(rows) * len(columns), artifact.x.shape[0] * artifact.x.shape[1]
    over = "; over each: soft label" if labelled else ""
    height = figure.get_figheight()
    title = f"{shown} of {total} distilled images{over}; right: step size in {many}"
    figure.suptitle(title, y=1 - 0.1 / height, va="top")
    return figure


def _canvas(artifact: Artifact, rows: int, columns: int, labelled: bool) -> tuple[Figure, GridSpec]:
    """A figure of a width that is readable, and a place for each image."""
    epochs = min(artifact.epochs, MAX_RATES)
    left, top, right = 0.75, 0.62, 0.15 + 0.42 * epochs + 0.25 * (artifact.epochs > epochs)  # inches
    bottom = 0.1 + BAR * (artifact.x.shape[2] == 1)
    cell = min(CELL, (WIDTH - left - right) / columns)
    gap = 0.16 if labelled else 0.04
    width, height = left + cell * columns + right, top + (cell + gap) * rows + bottom
    width = max(width, 4.6)  # the title's
    figure = plt.figure(figsize=(width, height))
    grid = figure.add_gridspec(
        rows,
        columns,
        left=left / width,
        right=(left + cell * columns) / width,
        top=1 - (top + (gap if labelled else 0)) / height,
        bottom=bottom / height,
        wspace=0.06,
        hspace=gap / cell,
    )
    return figure, grid


def _limits(x: np.ndarray) -> tuple[float, float]:
    """The values that are black and white in all images: but for one in a hundred, those that there are; as far from 0
    where both sides are much alike, so that the middle grey is the data's mean.
    """
    low, high = (float(q) for q in np.quantile(x, [0.005, 0.995]))
    most = max(abs(low), abs(high))
    return (-most, most) if low < 0 < high and min(-low, high) >= most / 2 else (low, high)


def label_text(weights: np.ndarray, classes: Sequence[object]) -> str:
    """The class of most weight with it, and the second where it has SECOND or more: `3 .62 8 .21`.

    Args:
        weights: [C], which add up to 1.
        classes: their names, or [] where these are numbers. Names are left out where they are long: the column has it.
    """
    order = np.argsort(-weights, kind="stable")
    shown = [int(c) for c in order[:2] if c == order[0] or weights[c] >= SECOND]
    names = [plain(classes[c]) if classes and len(str(classes[c])) <= 2 else str(c) for c in shown]
    return " ".join(f"{name} {_share(float(weights[c]))}" for name, c in zip(names, shown, strict=True))


def _share(weight: float) -> str:
    text = f"{weight:.2f}"
    return text[1:] if text.startswith("0") else text


def _rates(ax: Axes, artifact: Artifact, batch: int) -> None:
    """The step sizes of a batch, beside its last image."""
    epochs = min(artifact.epochs, MAX_RATES)
    shown = [f"{rate:.3f}" for rate in artifact.lr.reshape(artifact.epochs, -1)[:epochs, batch]]
    text = "  ".join(shown) + ("  ..." if artifact.epochs > epochs else "")
    ax.annotate(text, (1.12, 0.5), xycoords="axes fraction", va="center", annotation_clip=False)


def _bar(figure: Figure, low: float, high: float, columns: int) -> None:
    """The values of black and white: 0 is the mean of the real data, 1 their standard deviation."""
    width, height = figure.get_size_inches()
    extent = min(max(1.2, CELL * columns / 2), width - 3.2)
    ax = figure.add_axes((0.75 / width, (BAR - 0.12) / height, extent / width, 0.1 / height))
    ticks = MaxNLocator(3 if extent < 2 else 5)
    bar = figure.colorbar(
        ScalarMappable(Normalize(low, high), "gray"),
        cax=ax,
        orientation="horizontal",
        ticks=ticks,
    )
    bar.ax.tick_params(labelsize=SMALL, pad=2, length=2)
    ax.annotate(
        "value, real data's mean 0, deviation 1",
        (1.03, 0.5),
        xycoords="axes fraction",
        va="center",
        fontsize=SMALL,
        annotation_clip=False,
    )


def _per_class(artifact: Artifact) -> int:
    """How many images of a class a batch has, where batches are ordered by class; otherwise 1."""
    size = artifact.x.shape[1]
    classes = artifact.y.shape[2] if artifact.has_soft_labels else len(np.unique(artifact.y))
    return size // classes if size % classes == 0 else 1


def spread(count: int, most: int) -> list[int]:
    """At most `most` positions, evenly over range(count), both ends included."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, most)).round())]


def _column_class(artifact: Artifact, column: int, per_class: int) -> str:
    """The class of a column's images: that of their mean label, as a single learned label may favour another class."""
    y = artifact.y[:, column * per_class : (column + 1) * per_class]
    votes = y.mean((0, 1)) if artifact.has_soft_labels else np.bincount(y.ravel())
    number = int(votes.argmax())
    return plain(artifact.classes[number]) if artifact.classes else str(number)
