"""Distilled MNIST against time, and from several starts: what report_images.py says of it."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tables import table

from revdistill.outer.drawing import FAINT, styled

# Accuracy after so many seconds of the public reference code, one core of a machine like ours, 20 fresh networks.
REFERENCE_CODE = {
    "4 networks": [(141, 0.641), (417, 0.749), (825, 0.781), (1379, 0.797), (1815, 0.803)],
    "1 network": [(69, 0.665), (204, 0.749), (337, 0.774), (809, 0.786), (900, 0.752)],
}
STARTS = {"real": "real images", "kmeans": "centroids of a class's images"}
WANTED = 0.795  # what Wang et al. report


def in_words(found: dict[str, Any]) -> str:
    """Per cent, with the spread where there is one."""
    return f"{found['mean']:.1%}" + (f" +- {found['std']:.1%}" if found["restarts"] > 1 else "")


def race_in_words(results: dict[str, Any]) -> str:
    """When it got where Wang et al. 2018 are."""
    curve = results["race"]["curve"]
    reached = next((point for point in curve if point["mean"] >= WANTED), None)
    end = curve[-1]
    reference = next(seconds for seconds, accuracy in REFERENCE_CODE["4 networks"] if accuracy >= WANTED)
    how = f"{WANTED:.1%} after {reached['seconds']:.0f} s" if reached else f"not yet {WANTED:.1%}"
    config = results["race"]["config"]
    return (
        f"100 images in 10 steps x 3 epochs on one core (momentum {config['momentum']}, soft labels, from "
        f"{STARTS[config['start']]}): {how}, "
        f"{end['mean']:.1%} +- {end['std']:.1%} after {end['seconds']:.0f} s, 20 fresh networks each time. The "
        "public reference "
        f"code (gradient descent, hard labels, from noise) took {reference:,} s to {WANTED:.1%} on a core of such a "
        "machine; that "
        "was measured outside this repository."
    )


def starts_and_windows(results: dict[str, Any]) -> str:
    """The same time with each start and window."""
    compared = results["starts_and_windows"]
    config, found = compared["config"], compared["found"]
    steps = config["steps"] * config["epochs"]
    cells: dict[str, dict[str, str]] = {}
    for one in found:
        back = "all steps" if one["window"] is None else f"the last {one['window']} of a random number"
        cells.setdefault(f"from {STARTS[one['start']]}", {})[back] = (
            f"{in_words(one)} ({one['outer_steps']} outer steps)"
        )
    backs = list(dict.fromkeys(back for row in cells.values() for back in row))
    return (
        f"LeNet, 100 MNIST images, T = {steps}, after {found[0]['seconds']:.0f} s of distilling on one core, Adam's "
        "rate constant; "
        "the way back is through\n\n"
        + table(["", *backs], [[start, *(row[back] for back in backs)] for start, row in cells.items()])
    )


@styled
def picture(results: dict[str, Any]) -> Figure:
    """Accuracy against the time that distilling took."""
    figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    curve = results["race"]["curve"]
    ax.errorbar(
        *zip(*((p["seconds"], p["mean"], p["std"]) for p in curve), strict=True),
        label="revdistill",
        marker=".",
        capsize=2,
    )
    for name, points in REFERENCE_CODE.items():
        ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"reference code, {name} an outer step")
    ax.axhline(WANTED, color=FAINT, linewidth=0.9, linestyle=":", label=f"Wang et al. 2018: {WANTED:.1%}")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    ax.set_xlabel("seconds of distilling, one core")
    ax.set_ylabel("test accuracy of fresh networks")
    ax.set_title("MNIST, LeNet, 100 images, 10 steps x 3 epochs")
    ax.grid()
    ax.legend()
    return figure
