"""Tables and a picture of times, from results/speed.json."""

from __future__ import annotations

from statistics import geometric_mean
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from methods import METHODS
from tables import table, title, where

from revdistill.outer.drawing import BLUE, INK, SMALL, WIDTH, styled

# columns of the main README's table of speed
COLUMNS = (
    *("reversible-default", "reversible", "reversible-replayed", "reversible-compiled", "storeall"),
    *("autograd-compiled", "higher", "torchopt"),
)
OURS = (
    *("reversible", "reversible-default", "reversible-graphs", "reversible-replayed", "reversible-compiled"),
    *("checkpoint", "storeall", "storeall-compiled"),
)
CUT = 5.0  # bars are cut here
TARGETED = ("tiny", "mlp", "lenet", "convnet")


def section(results: dict[str, Any]) -> str:
    """Every task's methods."""
    parts = [f"Measured on {where(results)}. Ratios are medians over rounds in which the methods take turns."]
    if results["integer_work"]:
        work = results["integer_work"]
        parts.append(
            f"Fixed-point work of one step, forward and back together: {work['ns_per_parameter']:.1f} ns per parameter "
            f"({work['parameters']:,} parameters)."
        )
    parts.append(targets_table(results))
    for entry in results["tasks"]:
        rows = []
        for m in sorted(entry["methods"], key=lambda m: m["ratio_to_autograd"]):
            training = f"{m['ratio_to_training']:.1f}" if m["ratio_to_training"] else "-"
            off = "-" if m["disagreement"] is None else f"{m['disagreement']:.0e}"
            rows.append([title(m["method"]), f"{m['ms_per_step']:.2f}", f"{m['ratio_to_autograd']:.2f}", training, off])
        header = ["method", "ms per step", "x plain autograd", "x a training step", "difference from autograd"]
        parts.append(f"### {entry['title']} (T = {entry['steps']}, {entry['rounds']} rounds)\n\n" + table(header, rows))
        skipped = [f"{title(name)}: {reason}" for name, reason in entry["skipped"].items()]
        if skipped:
            parts.append("Skipped: " + "; ".join(skipped) + ".")
    return "\n\n".join(parts)


def ratios(results: dict[str, Any], method: str) -> dict[str, float]:
    """Task -> time as a multiple of plain autograd's."""
    found = {}
    for entry in results["tasks"]:
        for m in entry["methods"]:
            if m["method"] == method:
                found[entry["task"]] = m["ratio_to_autograd"]
    return found


def targets_table(results: dict[str, Any]) -> str:
    """What was aimed at, and what was reached."""
    rows = []
    titles = {entry["task"]: entry["title"] for entry in results["tasks"]}
    for task, (eager, compiled) in results["targets"].items():
        found = {m: ratios(results, m).get(task) for m in ("reversible", "reversible-default", "reversible-compiled")}
        if None not in found.values():
            plain, graphs, fused = found.values()
            rows.append([titles[task], *(f"{v:.2f}" for v in (eager, plain, graphs, compiled, fused) if v is not None)])
    header = ["plain autograd = 1", "aimed at, eager", "reached", "with graphs kept", "aimed at, compiled", "reached"]
    return table(header, rows)


def summary(results: dict[str, Any]) -> str:
    """The table of the main README: multiples of plain autograd."""
    columns = [c for c in COLUMNS if ratios(results, c)]
    rows = []
    for entry in results["tasks"]:
        cells = [ratios(results, c).get(entry["task"]) for c in columns]
        rows.append([f"{entry['title']}, T = {entry['steps']}", *(f"{c:.2f}" if c else "-" for c in cells)])
    means, measured = [], [entry["task"] for entry in results["tasks"] if entry["task"] in TARGETED]
    for column in columns:
        found = ratios(results, column)
        means.append(
            f"{geometric_mean([found[t] for t in measured]):.2f}" if all(t in found for t in measured) else "-"
        )
    rows.append([f"geometric mean of the first {len(measured)}", *means])
    return table(["one hypergradient, plain autograd = 1", *map(title, columns)], rows)


@styled
def picture(results: dict[str, Any]) -> Figure:
    """A group of bars per task."""
    entries = results["tasks"]
    names = [name for name in METHODS if name not in ("training", "autograd") and ratios(results, name)][::-1]
    size = (WIDTH, 0.27 * len(names) + 1.0)
    figure, axes = plt.subplots(1, len(entries), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for ax, entry in zip(axes[0], entries, strict=True):
        found = {m["method"]: m["ratio_to_autograd"] for m in entry["methods"]}
        for i, name in enumerate(names):
            if name in found:
                ax.barh(i, min(found[name], CUT), color=BLUE if name in OURS else "#9a9a9a")
                cut = " (cut)" if found[name] > CUT else ""
                place = max(min(found[name], CUT), 1.0) + 0.12  # beside the line at 1, not on it
                ax.text(place, i, f"{found[name]:.2f}{cut}", va="center", fontsize=SMALL)
        ax.axvline(1, color=INK, lw=0.9)
        ax.set_title(entry["title"], fontsize=SMALL + 0.5)
        ax.set_xlim(0, CUT + 2.3)
    axes[0][0].set_yticks(range(len(names)), [title(n) for n in names])
    figure.supxlabel("time of one hypergradient, plain autograd = 1 (the line); blue: revdistill", fontsize=9)
    return figure
