"""The study's pictures, from results/medvedev2020.json."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from report_study import DATA, by_place, momentum_parts
from stacked import STUDIED, frame

from revdistill.distill.strategies import strategy1
from revdistill.outer.drawing import COLOURS, INK, SMALL, WIDTH, styled

OF_DATA = dict(zip(DATA, COLOURS, strict=False))


def pictures(results: dict[str, Any]) -> dict[str, Figure]:
    """Name -> picture, of all parts that there are."""
    parts = results["parts"]
    if not {"ours", "faithful", "original"} <= set(parts):
        return {}
    found = {"data": data(parts), "points": points(parts), "boundaries": boundaries(parts), "rates": rates(parts)}
    return found | ({"momentum": momentum(results)} if len(momentum_parts(results)) > 1 else {})


@styled
def data(parts: dict[str, Any]) -> Figure:
    """Train and test scatter."""
    real = parts["original"]["figures"]["real"]
    figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained", sharex=True, sharey=True)
    for ax, suffix, heading in ((axes[0], "", "train"), (axes[1], "_test", "test")):
        x = np.array(real[f"x{suffix}"])
        ax.scatter(x[:, 0], x[:, 1], c=real[f"y{suffix}"], s=4, cmap="coolwarm")
        ax.set_title(f"{heading}, {len(x)} points")
    return figure


@styled
def points(parts: dict[str, Any]) -> Figure:
    """Rows: what they are distilled for (ours); columns: steps."""
    real, found = parts["original"]["figures"]["real"], parts["ours"]["figures"]["points"]
    x = np.array(real["x"])
    figure, axes = plt.subplots(4, 4, figsize=(WIDTH, 7.2), layout="constrained", sharex=True, sharey=True)
    for row, name in zip(axes, DATA, strict=True):
        points = np.array(found[name])
        for ax, step in zip(row, (1, 14, 27, 40), strict=True):
            ax.scatter(x[:, 0], x[:, 1], c=real["y"], s=2, cmap="coolwarm", alpha=0.12)
            labels = np.arange(2).repeat(points.shape[1] // 2)
            ax.scatter(
                points[step - 1, :, 0], points[step - 1, :, 1], c=labels, s=28, cmap="coolwarm", edgecolor=INK, lw=0.6
            )
            ax.set_title(f"{name}, step {step}", fontsize=SMALL + 0.5)
    return figure


@styled
def boundaries(parts: dict[str, Any]) -> Figure:
    """Rows: original data, own distilled data, data distilled for all; columns: architectures."""
    real = parts["original"]["figures"]["real"]
    x, y = np.array(real["x_test"]), np.array(real["y_test"])
    extent = frame(torch.tensor(real["x"]))
    rows = {
        "original data": [parts["original"]["figures"]["boundaries"][n] for n in STUDIED],
        "own distilled data": [parts["ours"]["figures"]["boundaries"][n] for n in STUDIED],
        "data distilled for all": [parts["ours"]["figures"]["boundaries"][f"all, {n}"] for n in STUDIED],
    }
    figure, axes = plt.subplots(3, 3, figsize=(WIDTH, 6.2), layout="constrained", sharex=True, sharey=True)
    for row, (heading, grids) in zip(axes, rows.items(), strict=True):
        for ax, name, values in zip(row, STUDIED, grids, strict=True):
            ax.imshow(values, origin="lower", extent=extent, cmap="coolwarm", vmin=0, vmax=1, alpha=0.6, aspect="auto")
            ax.scatter(x[:, 0], x[:, 1], c=y, s=3, cmap="coolwarm")
            ax.set_title(f"{name}, {heading}", fontsize=SMALL + 0.5)
    return figure


@styled
def rates(parts: dict[str, Any]) -> Figure:
    """Both settings, and strategy 1 on the talk's scale."""
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.0), layout="constrained")
    for ax, setting in zip(axes, ("faithful", "ours"), strict=False):
        for name in DATA:
            ax.semilogy(parts[setting]["figures"]["rates"][name], color=OF_DATA[name], lw=1, label=name)
        ax.set_title(f"{setting}: learned step sizes")
        ax.yaxis.set_major_formatter(_number)
        if setting == "ours":  # less than a decade
            ax.yaxis.set_minor_formatter(_number)
        ax.set_xlabel("step")
        ax.legend()
    axes[2].plot(strategy1([0.0] * 200, 40), color=INK, lw=1)
    axes[2].set_title("strategy 1")
    axes[2].set_xlabel("step")
    return figure


@styled
def momentum(results: dict[str, Any]) -> Figure:
    """Accuracy of own data and of data for all, against momentum."""
    parts = momentum_parts(results)
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2), layout="constrained", sharey=True)
    for name in STUDIED:
        for ax, source in ((axes[0], name), (axes[1], "all")):
            found = [by_place(p["cells"])[p["cells"][0]["setting"], source, "raw", name] for _, p in parts]
            means, stds = [c["mean"] for c in found], [c["std"] for c in found]
            ax.errorbar(
                [label for label, _ in parts], means, stds, color=OF_DATA[name], marker="o", capsize=3, label=name
            )
    axes[0].set_title("distilled for the network's own architecture")
    axes[1].set_title("distilled for all three")
    axes[0].set_ylabel("test accuracy")
    for ax in axes:
        ax.set_xlabel("momentum")
        ax.grid()
    axes[1].legend()
    return figure


def _number(value: float, _: int | None = None) -> str:
    return f"{value:g}"
