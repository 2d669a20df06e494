"""The picture of a schedule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from revdistill.outer.drawing import BLUE, GREEN, INK, WIDTH, save, styled
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.tune.schedule import Schedule

FILE_NAME = "schedule.png"


def draw(directory: Path, schedule: Schedule, start: Schedule) -> Path:
    """Write the picture to the directory."""
    path = directory / FILE_NAME
    save(schedule_figure(schedule, start), path)
    return path


@styled
def schedule_figure(schedule: Schedule, start: Schedule) -> Figure:
    """Rates and momenta over the steps, weight decays and initial scales as bars.

    Args:
        schedule: drawn with a line for each group.
        start: drawn dashed.
    """
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.2), width_ratios=(3, 3, 2), layout="constrained")
    steps = np.arange(1, schedule.steps + 1)
    labels = ("learning rate", OPTIMIZERS[schedule.optimizer].momentum_name)
    for ax, name, label in zip(axes, ("lr", "momentum"), labels, strict=False):
        for g, group in enumerate(schedule.groups):
            ax.plot(steps, getattr(schedule, name)[:, g], linewidth=1.1, label=group)
        ax.plot(steps, getattr(start, name)[:, 0], color=INK, linestyle="--", linewidth=0.9, label="start")
        ax.set_xlabel("step")
        ax.set_title(label)
        ax.grid()
    axes[0].set_yscale("log")
    axes[0].legend()
    positions = np.arange(len(schedule.groups))
    axes[2].bar(
        positions - 0.2,
        schedule.weight_decay / np.maximum(start.weight_decay, 1e-30),
        0.4,
        color=BLUE,
        label="weight decay",
    )
    axes[2].bar(positions + 0.2, schedule.init_scale, 0.4, color=GREEN, label="initial scale")
    axes[2].axhline(1, color=INK, linestyle="--", linewidth=0.8)
    axes[2].set_xticks(positions, schedule.groups, rotation=30)
    axes[2].set_title("as multiples of the start")
    axes[2].legend()
    return figure
