"""Pictures of learned training schedules, from results/maclaurin_drawn.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from revdistill.outer.drawing import INK, WIDTH, styled

START = {"color": INK, "linestyle": "--", "linewidth": 0.9}


@styled
def schedule(drawn: dict[str, Any]) -> Figure:
    """Rates per layer and step, momenta, initial scales, and how the held-out loss fell."""
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.2), width_ratios=(3, 2), layout="constrained")
    (rates, scales), (momenta, curve) = axes
    values = {name: np.array(drawn[name]) for name in ("lr", "momentum", "scale")}
    for i, rate in enumerate(np.exp(values["lr"]).T):
        rates.semilogy(rate, label=f"layer {i + 1}")
    rates.axhline(np.exp(drawn["start"]["lr"]), label="start", **START)
    rates.set(title="learned rates", xlabel="step")
    rates.yaxis.set_major_formatter(_number)
    rates.yaxis.set_minor_formatter(_number)
    rates.legend(ncols=2)
    momenta.plot(1 / (1 + np.exp(-values["momentum"])))
    momenta.axhline(1 / (1 + np.exp(-drawn["start"]["momentum"])), **START)
    momenta.set(title="learned momenta", xlabel="step")
    scales.bar(np.arange(1, len(values["scale"]) + 1), np.exp(values["scale"]))
    scales.axhline(1, **START)
    scales.set(title="initial scales, start = 1", xlabel="layer")
    curve.plot(drawn["curve"])
    curve.set(title="held-out loss", xlabel="outer step")
    for ax in axes.flat:
        ax.grid()
    return figure


@styled
def penalties(drawn: dict[str, Any]) -> Figure:
    """The penalty of each weight, an image per class, one scale for all."""
    shown = np.array(drawn["log10"]).reshape(10, 28, 28)
    figure, axes = plt.subplots(2, 5, figsize=(WIDTH, 3.6), layout="constrained")
    for c, ax in enumerate(axes.flat):
        image = ax.imshow(shown[c], cmap="magma", vmin=shown.min(), vmax=shown.max(), interpolation="nearest")
        ax.set(title=str(c), xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, label="log10 of the penalty")
    return figure


@styled
def images(drawn: dict[str, Any]) -> Figure:
    """Ten training images before and after, one scale for all, about 0: the mean of the real images."""
    both = np.array([drawn["start"], drawn["learned"]])
    most = float(np.quantile(np.abs(both), 0.995))
    figure, axes = plt.subplots(2, 10, figsize=(WIDTH, 2.2), layout="constrained")
    for row, pictures in zip(axes, both, strict=True):
        for c, ax in enumerate(row):
            image = ax.imshow(pictures[c], cmap="gray", vmin=-most, vmax=most, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
    for c, ax in enumerate(axes[0]):
        ax.set_title(str(c))
    axes[0, 0].set_ylabel("start")
    axes[1, 0].set_ylabel("learned")
    figure.colorbar(image, ax=axes, label="value", aspect=12)
    return figure


@styled
def long(drawn: dict[str, Any]) -> Figure:
    """Norms of dL/dtheta_k on the way back at several rates, and the rates that were learned."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2), layout="constrained")
    for found in drawn["norms"]:
        label = f"rate {found['rate']}" + (f", clip_back {found['clip_back']:g}" if found["clip_back"] else "")
        axes[0].semilogy(found["steps"], found["norms"], label=label, linewidth=1.1)
    axes[0].set(xlabel="step k", title="norm of dL/dtheta_k on the way back")
    axes[0].legend()
    axes[1].semilogy(drawn["rates"], linewidth=0.9)
    axes[1].axhline(drawn["start"], label="start", **START)
    axes[1].set(xlabel="step k", title=f"rates learned over {len(drawn['rates']):,} steps")
    axes[1].yaxis.set_major_formatter(_number)
    axes[1].yaxis.set_minor_formatter(_number)
    axes[1].legend()
    for ax in axes:
        ax.grid()
    return figure


def _number(value: float, _: int | None = None) -> str:
    return f"{value:g}"


DRAW: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "schedule": schedule,
    "penalties": penalties,
    "images": images,
    "long": long,
}


def pictures(results: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """(name, picture) of every experiment that there is."""
    for name, drawn in results["experiments"].items():
        yield f"maclaurin_{name}", DRAW[name](drawn)
