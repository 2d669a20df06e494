"""Tables and a picture of times, from results/speed.json."""

from __future__ import annotations

from pathlib import Path
from statistics import geometric_mean
from typing import Any

from matplotlib import pyplot as plt
from methods import METHODS
from report_memory import OURS
from tables import table, title, where

# columns of the main README's table of speed
COLUMNS = (
    *("reversible-default", "reversible", "reversible-replayed", "reversible-compiled", "storeall"),
    *("autograd-compiled", "higher", "torchopt"),
)
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


def draw(results: dict[str, Any], path: Path) -> None:
    """A group of bars per task."""
    entries = results["tasks"]
    size = (3.1 * len(entries), 4.2)
    figure, axes = plt.subplots(1, len(entries), figsize=size, layout="constrained", squeeze=False, sharey=True)
    names = [name for name in METHODS if name not in ("training", "autograd") and ratios(results, name)]
    for ax, entry in zip(axes[0], entries, strict=True):
        found = {m["method"]: m["ratio_to_autograd"] for m in entry["methods"]}
        for i, name in enumerate(reversed(names)):
            if name in found:
                ax.barh(i, min(found[name], 5), color="C0" if name in OURS or name == "storeall-compiled" else "0.6")
                ax.text(min(found[name], 5), i, f" {found[name]:.2f}", va="center", fontsize=7)
        ax.axvline(1, color="k", lw=0.8)
        ax.set_title(entry["title"], fontsize=7)
        ax.set_xlim(0, 6)
    axes[0][0].set_yticks(range(len(names)), [title(n) for n in reversed(names)], fontsize=8)
    figure.supxlabel("time of one hypergradient, plain autograd = 1 (blue: revdistill)", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
