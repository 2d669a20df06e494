"""A table and a picture of the bit store, from results/bits.json."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tables import table, where

from revdistill.outer.drawing import BLUE, INK, styled


def section(results: dict[str, Any]) -> str:
    """The bit store against its bound."""
    rows = []
    for r in results["rows"]:
        rows.append(
            [
                f"{r['momentum']:g}",
                f"{r['steps']:,}",
                f"{r['ideal']:.5f}",
                f"{r['kept']:.5f}",
                f"{r['kept'] / r['ideal']:.3f}",
            ]
        )
    return (
        f"Measured on {where(results)}: bits spilled per parameter and step, over {results['parameters']:,} "
        "parameters; every bit "
        f"came back. The last {results['head_bits']} bits or fewer stay in the head, which counts as state.\n\n"
        + table(["momentum", "steps", "log2(1 / momentum)", "kept", "ratio"], rows)
    )


@styled
def picture(results: dict[str, Any]) -> Figure:
    """Kept against the bound."""
    figure, ax = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    lost = [1 - r["momentum"] for r in results["rows"]]
    ax.loglog(lost, [r["ideal"] for r in results["rows"]], color=INK, lw=1, label="log2(1 / momentum)")
    ax.loglog(lost, [r["kept"] for r in results["rows"]], color=BLUE, marker="o", ls="", label="kept by the bit store")
    ax.set_xlabel("1 - momentum")
    ax.set_ylabel("bits per parameter and step")
    ax.grid(which="both")
    ax.legend()
    return figure
