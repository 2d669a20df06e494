"""The three tables of the README's front, of at most eight rows each: memory and time, attribution, distillation."""

from __future__ import annotations

from typing import Any

import report_attribution
import report_images
from attribution import OURS as ATTRIBUTE
from leave_out import INPUTS
from measuring import MIB
from report_memory import fits, memory_of
from report_speed import ratios
from tables import table, where

MOST_ROWS = 8
STEPS = (100, 1_000, 10_000)
WAYS = {"reversible": "Reversible", "autograd": "plain autograd"}
# of the image table, those that others have figures of, and the smallest
DISTILLED = (
    *("mnist_lenet_10", "mnist_convnet_10", "mnist_convnet_100", "mnist_2018_100", "mnist_fixed_10"),
    *("cifar10_alexcifarnet_100", "cifar10_convnet_10", "cifar10_convnet_100"),
)


def memory(memory: dict[str, Any], speed: dict[str, Any]) -> str:
    """Each task by the engine, with no graphs kept, and by plain autograd: time, memory and the longest training."""
    rows = []
    for entry in memory["tasks"]:
        for method, name in WAYS.items():
            found = memory_of(entry, method)
            ratio = 1.0 if method == "autograd" else ratios(speed, method).get(entry["task"])
            longest = fits(next(m for m in entry["methods"] if m["method"] == method), 1)
            rows.append(
                [
                    entry["title"] if method == "reversible" else "",
                    name,
                    *(f"{found[s] / MIB:,.0f} MiB" if s in found else "-" for s in STEPS),
                    f"{longest} steps" if longest != "-" else "-",
                    f"{ratio:.2f}" if ratio else "-",
                ]
            )
    header = ["one hypergradient", "", *(f"T = {s:,}" for s in STEPS), "longest in 4 GB, extrapolated", "time"]
    found = ratios(speed, "reversible-default")
    titles = [entry["title"].split(",")[0] for entry in speed["tasks"] if entry["task"] in found]
    default = [f"{ratio:.2f}" for ratio in found.values()]
    return (
        f"{table(header, rows)}\n\n"
        "Extra peak memory, and time as a multiple of plain autograd's at T = 100; a dash: not run. These are of "
        "`rd.Reversible(graph_bytes=0)`. By default the graphs of the last steps are kept besides, in up to 256 MiB: "
        f"it takes {_and(default)} times as long as autograd on {_and(titles)}. On {where(memory)}."
    )


def _and(words: list[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def attribution(results: dict[str, Any]) -> str:
    """The trainings at the smaller rates: our LDS at all drops, and the best of the others at the smallest."""
    cells = [cell for cell in results["cells"] if cell["lr"] in (0.01, 0.001) and cell["inputs"] == INPUTS[0]]
    rows = []
    for cell in cells:
        rival = report_attribution.best_rival(cell, 0)
        rows.append(
            [
                report_attribution.cell_title(cell),
                f"{cell['smoothness']:.2f}",
                *(f"{row['methods'][ATTRIBUTE]['lds']:.3f}" for row in cell["drops"]),
                f"{rival[1]:.3f} ({report_attribution.TITLES[rival[0]]})" if rival else "-",
            ]
        )
    drops = [f"{row['drop']:.0%}" for row in results["cells"][0]["drops"]]
    settings = results["settings"]
    header = [
        f"{settings['examples']:,} MNIST images, {settings['queries']} queries",
        "smoothness",
        *(f"LDS, {drop} left out" for drop in drops),
        f"best other way, {drops[0]}",
    ]
    return (
        f"{table(header, rows)}\n\n"
        "LDS: the rank correlation of predicted and true losses over trainings without random subsets; 1 is perfect. "
        f"{report_attribution.verdict(results)} On {where(results)}."
    )


def distillation(results: dict[str, Any]) -> str:
    """Some rows of the image table, each with its artifact; those that were not distilled are left out."""
    rows = []
    for name in (name for name in DISTILLED if name in results["rows"]):
        row = report_images.row_of(name)
        kept = results["rows"][name]
        rows.append(
            [
                row.title,
                row.published,
                report_images.figure_of(results, name),
                report_images.numbers(kept),
                report_images.time(kept),
                report_images.artifact_link(name),
            ]
        )
    header = ["test accuracy", "published, %", "ours", "numbers stored", "distilled in", "artifact"]
    return (
        f"{table(header, rows)}\n\n"
        "Fresh networks, trained with torch.optim on the artifact alone; soft labels. "
        "[The commands](benchmarks/README.md#which-artifact-and-which-command) that give these figures. "
        + " ".join(report_images.about_cifar10(results))
    ).rstrip()
