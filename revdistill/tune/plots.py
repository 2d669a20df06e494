"""The picture of a schedule."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from revdistill.outer.files import replacing
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.tune.schedule import Schedule

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

FILE_NAME = "schedule.png"


def draw(directory: Path, schedule: Schedule, start: Schedule) -> Path:
    """Write the picture to the directory."""
    path = directory / FILE_NAME
    figure = schedule_figure(schedule, start)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)
    return path


def schedule_figure(schedule: Schedule, start: Schedule) -> Figure:
    """Rates and momenta over the steps, weight decays and initial scales as bars.

    Args:
        schedule: drawn with a line for each group.
        start: drawn dashed.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), width_ratios=(3, 3, 2), layout="constrained")
    steps = np.arange(1, schedule.steps + 1)
    labels = ("learning rate", OPTIMIZERS[schedule.optimizer].momentum_name)
    for ax, name, label in zip(axes, ("lr", "momentum"), labels, strict=False):
        for g, group in enumerate(schedule.groups):
            ax.plot(steps, getattr(schedule, name)[:, g], linewidth=1.1, label=group)
        ax.plot(steps, getattr(start, name)[:, 0], "k--", linewidth=0.8, label="start")
        ax.set_xlabel("step")
        ax.set_title(label, fontsize=11)
        ax.grid(alpha=0.25)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=8)
    positions = np.arange(len(schedule.groups))
    axes[2].bar(
        positions - 0.2, schedule.weight_decay / np.maximum(start.weight_decay, 1e-30), 0.4, label="weight decay"
    )
    axes[2].bar(positions + 0.2, schedule.init_scale, 0.4, label="initial scale")
    axes[2].axhline(1, color="k", linestyle="--", linewidth=0.8)
    axes[2].set_xticks(positions, schedule.groups, rotation=30, fontsize=8)
    axes[2].set_title("as multiples of the start", fontsize=11)
    axes[2].legend(fontsize=8)
    return figure
