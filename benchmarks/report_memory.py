"""Tables and a picture of memory, from results/memory.json."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from measuring import MIB
from tables import table, title, where

from revdistill.outer.drawing import COLOURS, FAINT, WIDTH, styled

# Lines of the picture: ours in colours, autograd in black, others in grey with dashes and markers of their own.
LINES: dict[str, dict[str, Any]] = {
    "reversible": {"color": COLOURS[0], "marker": "o", "lw": 2.2},
    "reversible-default": {"color": COLOURS[1], "marker": "o"},
    "reversible-graphs": {"color": COLOURS[4], "marker": "o"},
    "reversible-replayed": {"color": COLOURS[5], "marker": "o"},
    "reversible-compiled": {"color": COLOURS[5], "marker": "s"},
    "checkpoint": {"color": COLOURS[2], "marker": "o"},
    "storeall": {"color": COLOURS[3], "marker": "o"},
    "storeall-compiled": {"color": COLOURS[3], "marker": "s"},
    "autograd": {"color": "black", "marker": "o", "lw": 2.2},
    "autograd-compiled": {"color": "black", "marker": "s"},
    "backprop": {"color": FAINT, "marker": "s", "ls": "--"},
    "torch-checkpoint-1": {"color": FAINT, "marker": "^", "ls": ":"},
    "torch-checkpoint-sqrt": {"color": FAINT, "marker": "v", "ls": "-."},
    "replay": {"color": FAINT, "marker": "D", "ls": "--"},
    "higher": {"color": FAINT, "marker": "x", "ls": ":"},
    "torchopt": {"color": FAINT, "marker": "+", "ls": "-."},
}
LEAST = 0.05  # MiB: a logarithm needs some


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


@styled
def picture(results: dict[str, Any]) -> Figure:
    """Memory against T, a panel per task; a legend names every line."""
    entries = results["tasks"]
    across = 2 if len(entries) > 1 else 1
    down = -(-len(entries) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(WIDTH, 2.3 * down + 1.1), layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for ax in axes.flat[len(entries) :]:
        ax.axis("off")
    named: dict[str, Any] = {}
    for ax, entry in zip(axes.flat, entries, strict=False):
        for m in entry["methods"]:
            found = memory_of(entry, m["method"])
            if found:
                points = [max(b / MIB, LEAST) for b in found.values()]
                (line,) = ax.loglog(list(found), points, markersize=4.5, **LINES[m["method"]])
                named.setdefault(m["method"], line)
        ax.set_title(entry["title"])
        ax.grid()
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    for ax in axes[:, 0]:
        ax.set_ylabel("extra peak memory, MiB")
    for ax in axes[-1]:  # not supxlabel: a legend outside would lie on it
        ax.set_xlabel("training steps differentiated through")
    shown = [name for name in LINES if name in named]
    figure.legend([named[name] for name in shown], [title(name) for name in shown], loc="outside lower center", ncols=4)
    return figure
