"""Tables and a picture of memory, from results/memory.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from measuring import MIB
from tables import table, title, where

OURS = {
    "reversible-default": "C3",
    "reversible": "C0",
    "reversible-graphs": "C9",
    "reversible-replayed": "C5",
    "reversible-compiled": "C4",
    "checkpoint": "C2",
    "storeall": "C1",
}


def memory_of(entry: dict[str, Any], method: str) -> dict[int, int]:
    """Steps -> bytes."""
    return {run["steps"]: run["bytes"] for m in entry["methods"] if m["method"] == method for run in m["runs"]}


def section(results: dict[str, Any]) -> str:
    """Every task's methods, and the longest unrolls."""
    parts = [
        f"Measured on {where(results)}: MiB above what was there before, at the peak; each figure in a fresh process. "
        "A dash: not run, for the reason in the last column."
    ]
    for entry in results["tasks"]:
        steps = sorted({s for m in entry["methods"] for s in memory_of(entry, m["method"])})
        rows = []
        for m in entry["methods"]:
            found = memory_of(entry, m["method"])
            cells = [f"{found[s] / MIB:.1f}" if s in found else "-" for s in steps]
            rows.append([title(m["method"]), *cells, *(fits(m, budget) for budget in (0, 1, 2)), m["skipped"] or ""])
        header = ["method", *(f"T = {s:,}" for s in steps), "1 GB", "4 GB", "16 GB", "stopped because"]
        parts.append(f"### {entry['title']}\n\n" + table(header, rows))
    parts.append(
        "The columns 1, 4 and 16 GB: the longest unroll that fits, extrapolated on a straight line through the two "
        "longest runs; "
        "*measured* where it was run."
    )
    return "\n\n".join(parts)


def fits(method: dict[str, Any], index: int) -> str:
    """The longest unroll for one budget, in words."""
    if not method.get("longest"):
        return "-"
    found = method["longest"][index]
    if found["steps"] is None:
        return "no rise seen"
    steps = float(f"{found['steps']:.2g}")
    return f"{found['steps']:,} *measured*" if found["measured_bytes"] else f"about {steps:,.0f}"


def summary(results: dict[str, Any]) -> str:
    """The table of the main README."""
    rows = []
    for entry in results["tasks"]:
        for method in ("reversible", "autograd"):
            found = memory_of(entry, method)
            cells = [f"{found[s] / MIB:,.0f} MiB" if s in found else "-" for s in (10, 100, 1_000, 10_000)]
            m = next(m for m in entry["methods"] if m["method"] == method)
            rows.append([entry["title"] if method == "reversible" else "", title(method), *cells, fits(m, 1)])
    return table(
        ["extra peak memory", "", "T = 10", "T = 100", "T = 1,000", "T = 10,000", "longest in 4 GB, extrapolated"], rows
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Memory against T, a panel per task."""
    entries = results["tasks"]
    figure, axes = plt.subplots(
        1, len(entries), figsize=(3.2 * len(entries), 3.4), layout="constrained", squeeze=False, sharey=True
    )
    for ax, entry in zip(axes[0], entries, strict=True):
        for m in entry["methods"]:
            found = memory_of(entry, m["method"])
            if not found:
                continue
            color = OURS.get(m["method"], "k" if m["method"] == "autograd" else "0.75")
            label = title(m["method"]) if m["method"] in OURS or m["method"] == "autograd" else None
            ax.loglog(
                list(found), [max(b / MIB, 0.05) for b in found.values()], marker="o", ms=3, color=color, label=label
            )
        ax.set_title(entry["title"], fontsize=8)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("extra peak memory, MiB")
    figure.supxlabel("training steps differentiated through", fontsize=9)
    axes[0][0].legend(fontsize=6)
    figure.savefig(path, dpi=130)
    plt.close(figure)
