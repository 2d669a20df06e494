"""Pictures of an attribution: who helped and who harmed, how scores lie, and whether they are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from revdistill.attribute.check import Check
from revdistill.attribute.experiment import Experiment
from revdistill.attribute.found import Scored
from revdistill.attribute.result import Result
from revdistill.outer.data import Dataset
from revdistill.outer.drawing import BLUE, FAINT, INK, RED, SMALL, WIDTH, figure_files, plain, styled

FOLDER = "plots"
QUERIES, EACH = 6, 5  # queries that are shown, and the most helpful and most harmful examples of each
TABLE_QUERIES, TABLE_EACH, FEATURES = 3, 3, 10  # likewise as a table, and how many features it has
HELPS, HARMS = BLUE, RED


def draw_all(directory: Path, experiment: Experiment, result: Result) -> list[Path]:
    """Write every picture that fits the attribution to directory/plots.

    Args:
        directory: of the attribution.
        experiment: what was attributed.
        result: what was found.

    Returns:
        The files.
    """
    data = experiment.data
    if data.is_image:
        drawn = images(experiment, result.scored)
    elif data.input_shape == (2,):
        drawn = points(experiment, result.scored)
    else:
        drawn = features(experiment, result.scored)
    figures = {"examples": drawn, "scores": distribution(result.scored.harm, experiment.flipped.numpy())}
    if result.check is not None:
        figures["check"] = scatter(result.check, result.scored.losses)
    return figure_files(directory / FOLDER, figures)


def shown(losses: np.ndarray, count: int) -> list[int]:
    """Queries to show: evenly from the one with the largest loss to the one with the smallest, both included."""
    order = np.argsort(-losses, kind="stable")
    return [
        int(order[i]) for i in np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    ]


def extremes(scores: np.ndarray, count: int) -> tuple[list[int], list[int]]:
    """The most helpful examples of a query (scores below 0), and the most harmful (above 0), the strongest first."""
    order = np.argsort(scores, kind="stable")
    helpful = [int(i) for i in order[:count] if scores[i] < 0]
    return helpful, [int(i) for i in order[::-1][:count] if scores[i] > 0]


@styled
def images(experiment: Experiment, scored: Scored) -> Figure:
    """A row for each of some queries: itself, its most helpful and its most harmful training images."""
    data, queries = experiment.data, shown(scored.losses, QUERIES)
    x, x_query = (_pixels(t.cpu().numpy(), data) for t in (experiment.x, data.x_test[experiment.queries]))
    columns = 1 + 2 * EACH
    figure, axes = plt.subplots(
        len(queries),
        columns + 2,  # a gap between the parts
        figsize=(WIDTH, 0.95 * len(queries) + 0.7),
        width_ratios=[1.3, 0.2, *[1] * EACH, 0.25, *[1] * EACH],
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.axis("off")
    for row, q in zip(axes, queries, strict=True):
        own = int(data.y_test[experiment.queries[q]])
        _image(row[0], x_query[q], f"{plain(data.class_names[own])}: loss {scored.losses[q]:.2g}", INK)
        for start, chosen, colour in zip((2, 3 + EACH), extremes(scored.scores[q], EACH), (HELPS, HARMS), strict=True):
            for ax, i in zip(row[start:], chosen, strict=False):
                title = f"{plain(data.class_names[int(experiment.y[i])])}{_mark(experiment, i)}: "
                _image(ax, x[i], f"{title}{scored.scores[q, i]:+.1g}", colour)
    for column, title in ((0, "query"), (2 + EACH // 2, "most helpful"), (3 + EACH + EACH // 2, "most harmful")):
        axes[0, column].annotate(title, (0.5, 1.45), xycoords="axes fraction", ha="center", annotation_clip=False)
    figure.suptitle(
        "test images, and the training images that most lowered and most raised their loss" + _explained(experiment),
    )
    return figure


def _image(ax: Any, pixels: np.ndarray, title: str, colour: str) -> None:
    ax.imshow(pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0], cmap="gray", vmin=0, vmax=1)
    ax.set_title(title, fontsize=SMALL, color=colour, pad=2)


def _pixels(x: np.ndarray, data: Dataset) -> np.ndarray:
    """Images as they were before they were normalised, from 0 to 1: one channel or three."""
    low, high = data.value_range
    values = (_raw(x, data) - low) / max(high - low, 1e-12)
    return np.clip(values if values.shape[1] in (1, 3) else values[:, :1], 0, 1)


def _raw(x: np.ndarray, data: Dataset) -> np.ndarray:
    """Samples as they were before they were normalised."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    mean, std = (np.array(data.normalization[key], np.float32).reshape(shape) for key in ("mean", "std"))
    found: np.ndarray = x * std + mean
    return found


def _mark(experiment: Experiment, example: int) -> str:
    return "*" if experiment.flipped[example] else ""


def _explained(experiment: Experiment) -> str:
    return "; * label flipped on purpose" if experiment.config.flip else ""


@styled
def points(experiment: Experiment, scored: Scored) -> Figure:
    """The training points in the plane, coloured by what they did to each of some queries."""
    queries = shown(scored.losses, QUERIES)
    across = min(3, len(queries))
    down = -(-len(queries) // across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(min(3.6, WIDTH / across) * across, 2.5 * down + 0.4),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    data = experiment.data
    x, y = _raw(experiment.x.cpu().numpy(), data), experiment.y.cpu().numpy()
    tested = _raw(data.x_test[experiment.queries].cpu().numpy(), data)
    for ax in axes.flat[len(queries) :]:
        ax.axis("off")
    for ax, q in zip(axes.flat, queries, strict=False):
        scores = scored.scores[q]
        most = float(np.abs(scores).max()) or 1.0
        order = np.argsort(np.abs(scores), kind="stable")  # the strongest on top
        for label in range(data.classes):
            own = order[y[order] == label]
            drawn = ax.scatter(
                *x[own].T,
                c=scores[own],
                cmap="coolwarm",
                vmin=-most,
                vmax=most,
                s=14,
                marker="os^Dvp<>hP"[label % 10],
                linewidths=0.2,
                edgecolors=INK,
            )
        ax.scatter(*tested[q], marker="*", s=160, color="gold", edgecolors=INK, zorder=3)
        name = plain(data.class_names[int(data.y_test[experiment.queries[q]])])
        ax.set_title(f"class {name}: loss {scored.losses[q]:.2g}")
        figure.colorbar(drawn, ax=ax, format="%.0e").ax.tick_params(labelsize=SMALL)
    figure.suptitle("training points by score for a test point (star); red: harmful, blue: helpful; shapes: classes")
    return figure


@styled
def features(experiment: Experiment, scored: Scored) -> Figure:
    """A table for some queries: their features, and those of their most helpful and most harmful examples."""
    data, queries = experiment.data, shown(scored.losses, TABLE_QUERIES)
    x = _raw(experiment.x.cpu().numpy(), data)
    tested = _raw(data.x_test[experiment.queries].cpu().numpy(), data)
    count = min(FEATURES, x.shape[1])
    rows, colours = [], []
    for q in queries:
        name = plain(data.class_names[int(data.y_test[experiment.queries[q]])])
        rows.append(["query", name, f"loss {scored.losses[q]:.3g}", *_numbers(tested[q, :count])])
        colours.append("0.9")
        helpful, harmful = extremes(scored.scores[q], TABLE_EACH)
        for what, chosen, colour in (("helpful", helpful, "#dbe9f6"), ("harmful", harmful, "#fbdcdc")):
            for i in chosen:
                name = plain(data.class_names[int(experiment.y[i])]) + _mark(experiment, i)
                rows.append([what, name, f"{scored.scores[q, i]:+.2g}", *_numbers(x[i, :count])])
                colours.append(colour)
    figure, ax = plt.subplots(
        figsize=(min(WIDTH, 0.85 * (count + 3) + 0.4), 0.19 * (len(rows) + 1) + 0.6), layout="constrained"
    )
    ax.axis("off")
    header = ["", "class", "score", *(f"feature {i + 1}" for i in range(count))]
    cells = [[colour] * len(header) for colour in colours]
    table = ax.table(rows, colLabels=header, cellColours=cells, loc="center", cellLoc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(SMALL)
    for cell in table.get_celld().values():
        cell.set(linewidth=0.5, edgecolor=FAINT)
    more = "" if count == x.shape[1] else f" (the first {count} of {x.shape[1]} features)"
    figure.suptitle(f"test samples, their most helpful and harmful training samples{more}" + _explained(experiment))
    return figure


def _numbers(values: np.ndarray) -> list[str]:
    return [f"{value:.3g}" for value in values]


@styled
def distribution(harm: np.ndarray, flipped: np.ndarray) -> Figure:
    """A histogram of the examples' mean scores; of those whose labels were flipped beside that of the others."""
    figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    parts = [(harm[~flipped], FAINT, "others" if flipped.any() else "")]
    parts += [(harm[flipped], HARMS, "labels flipped on purpose")] if flipped.any() else []
    edges = np.histogram_bin_edges(harm, 60).tolist()
    for values, colour, label in parts:
        ax.hist(values, edges, color=colour, alpha=0.7, label=label or None)
    ax.set_yscale("log")
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set_xlabel("mean score over the queries (above 0: harmful)")
    ax.set_ylabel("training examples")
    if flipped.any():
        ax.legend()
    return figure


@styled
def scatter(check: Check, losses: np.ndarray) -> Figure:
    """What leaving out subsets was predicted to change, and what it changed; the LDS in the title."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.9), layout="constrained")
    predicted, actual = (values - losses[:, None] for values in (check.predicted, check.actual))
    each = (
        ("each query", predicted, actual, 4, 0.25),
        ("mean over the queries", predicted.mean(0), actual.mean(0), 18, 0.8),
    )
    for ax, (title, x, y, size, alpha) in zip(axes, each, strict=True):
        ax.axline((0, 0), slope=1, color=FAINT, linewidth=0.8)
        ax.scatter(x.ravel(), y.ravel(), s=size, alpha=alpha, linewidths=0)
        ax.set_title(title)
        ax.set_xlabel("predicted change of the loss")
        ax.set_ylabel("true change")
        ax.ticklabel_format(scilimits=(-2, 2))
        ax.grid()
    low, high = check.interval
    figure.suptitle(
        f"LDS {check.mean:.3f} ({low:.3f} to {high:.3f}); of the mean loss {check.mean_query:.3f}: "
        f"{check.actual.shape[1]} trainings, each without {100 * check.drop:.3g} % of the examples",
    )
    return figure
