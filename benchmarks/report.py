"""Tables and pictures from the JSON in results/: benchmarks/README.md, results/*.png, and the figures of the main
README.

python benchmarks/report.py
"""

from __future__ import annotations

from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib as mpl
import report_attribution
import report_cuda
import report_flipped
import report_images
import report_images_race
import report_language_model
import report_scale
import report_study
import report_tuning
from measuring import HERE, MIB, RESULTS, load
from methods import METHODS
from tables import table, threads_of

mpl.use("Agg")
from matplotlib import pyplot as plt

MAIN_README = HERE.parent / "README.md"
ATTRIBUTION_PAGE = HERE.parent / "docs" / "attribution.md"
OURS = {
    "reversible-default": "C3",
    "reversible": "C0",
    "reversible-graphs": "C9",
    "reversible-replayed": "C5",
    "reversible-compiled": "C4",
    "checkpoint": "C2",
    "storeall": "C1",
}
# columns of the main README's table of speed
COLUMNS = (
    *("reversible-default", "reversible", "reversible-replayed", "reversible-compiled", "storeall"),
    *("autograd-compiled", "higher", "torchopt"),
)
TARGETED = ("tiny", "mlp", "lenet", "convnet")


def title(method: str) -> str:
    """A method's name in tables and pictures."""
    return METHODS[method].title


def where(results: dict[str, Any]) -> str:
    """The machine and the versions in words."""
    machine, versions = results["machine"], results["versions"]
    cores = f"{machine['cores']} cores ({machine['processor']})"
    place = f"{machine['gpu']}, host with {cores}" if "gpu" in machine else f"{cores}, {threads_of(machine)}"
    return f"{place}, Python {versions['python']}, torch {versions['torch']}"


# Speed


def speed_section(results: dict[str, Any]) -> str:
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


def speed_summary(results: dict[str, Any]) -> str:
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


def draw_speed(results: dict[str, Any], path: Path) -> None:
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


# Memory


def memory_of(entry: dict[str, Any], method: str) -> dict[int, int]:
    """Steps -> bytes."""
    return {run["steps"]: run["bytes"] for m in entry["methods"] if m["method"] == method for run in m["runs"]}


def memory_section(results: dict[str, Any]) -> str:
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


def memory_summary(results: dict[str, Any]) -> str:
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


def draw_memory(results: dict[str, Any], path: Path) -> None:
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


# Bits


def bits_section(results: dict[str, Any]) -> str:
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


def draw_bits(results: dict[str, Any], path: Path) -> None:
    """Kept against the bound."""
    figure, ax = plt.subplots(figsize=(4.6, 3.4), layout="constrained")
    lost = [1 - r["momentum"] for r in results["rows"]]
    ax.loglog(lost, [r["ideal"] for r in results["rows"]], "k-", lw=1, label="entropy bound")
    ax.loglog(lost, [r["kept"] for r in results["rows"]], "C0o", label="bit store")
    ax.set_xlabel("1 - momentum")
    ax.set_ylabel("bits per parameter and step")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


# The main README


def headline_summary(results: dict[str, Any]) -> str:
    """The default run and the engine's own checks."""
    run = results["default_run"]
    (name, evaluation), *_ = run["evaluation"].items()
    gradients = [check for check in results["verify"] if check["kind"] == "gradients"]
    worst = max(float(check["found"].split()[-1]) for check in gradients)
    return "\n".join(
        [
            f"On {where(results)}:",
            "",
            f"- `{run['command']}`: {evaluation['mean']:.1%} +- {evaluation['std']:.1%} test accuracy, {name}, "
            f"{evaluation['restarts']} fresh networks, in {run['seconds']:.0f} s.",
            f"- `revdistill verify`: hypergradients against float64 autograd, worst relative error {worst:.1e} "
            f"({len(gradients)} combinations).",
        ]
    )


def fill(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers <!-- NAME ... --> and <!-- /NAME -->."""
    content = path.read_text()
    head, rest = content.split(f"<!-- {name}:", 1)
    opening, rest = rest.split("\n", 1)
    _, tail = rest.split(f"<!-- /{name} -->", 1)
    path.write_text(f"{head}<!-- {name}:{opening}\n{text}\n<!-- /{name} -->{tail}")


SECTIONS = {"speed": ("Speed", speed_section, draw_speed), "memory": ("Memory", memory_section, draw_memory)}


def main() -> None:
    """Write everything that there is JSON for."""
    parts = [(HERE / "introduction.md").read_text().rstrip()]
    for device, suffix, words in (("cpu", "", ""), ("cuda", "-cuda", " on a GPU")):
        for name, (heading, section, draw) in SECTIONS.items():
            results = load(name, device)
            if results:
                draw(results, RESULTS / f"{name}{suffix}.png")
                parts += [f"## {heading}{words}", f"![{heading}{words}](results/{name}{suffix}.png)", section(results)]
    study = load("medvedev2020")
    if study:
        report_study.draw(study, RESULTS)
        parts += ["## The data distillation study (Medvedev 2020)", report_study.section(study)]
    distilled = load("images")
    if distilled:
        if "race" in distilled:
            report_images_race.draw_race(distilled, RESULTS / "images-race.png")
        parts += ["## Images: MNIST and CIFAR-10", report_images.section(distilled)]
    adam, schedules = load("adam"), load("maclaurin2015")
    if adam:
        parts += ["## Adam", report_tuning.adam_section(adam, where(adam))]
    if schedules:
        parts += [
            "## Training schedules (Maclaurin et al. 2015)",
            report_tuning.schedules_section(schedules, where(schedules)),
        ]
    language = load("language_model")
    if language:
        parts += ["## A language model", report_language_model.section(language, where)]
    grid, costs = load("attribution"), load("attribution_cost")
    if grid:
        report_attribution.draw(grid, RESULTS / "attribution.png")
        parts += [
            "## Attribution: which training example did this",
            "![LDS against smoothness](results/attribution.png)",
            report_attribution.section(grid, where(grid)),
        ]
    if costs:
        parts += ["## Attribution: one and 100 queries", report_attribution.cost_section(costs, where(costs))]
    flips = load("flipped")
    if flips:
        parts += ["## Labels that are wrong, and other harm", report_flipped.section(flips, where(flips))]
    bits = load("bits")
    if bits:
        draw_bits(bits, RESULTS / "bits.png")
        parts += ["## Bits", "![Bits per parameter and step](results/bits.png)", bits_section(bits)]
    scale = load("scale")
    if scale:
        parts += ["## More processes than one", report_scale.section(scale, where)]
    gpu = report_cuda.load(RESULTS / "cuda.jsonl")
    if gpu:
        parts += ["## On a GPU", report_cuda.section(gpu)]
    (HERE / "README.md").write_text("\n\n".join(parts) + "\n")
    headline, speed, memory = load("headline"), load("speed"), load("memory")
    if headline:
        fill(MAIN_README, "headline", headline_summary(headline))
    if speed:
        fill(MAIN_README, "speed", f"{speed_summary(speed)}\n\nOn {where(speed)}.")
    if memory:
        fill(MAIN_README, "memory", memory_summary(memory))
    if distilled:
        fill(MAIN_README, "images", report_images.summary(distilled))
    if adam:
        fill(MAIN_README, "adam", report_tuning.adam_summary(adam, where(adam)))
    if schedules:
        fill(MAIN_README, "schedules", report_tuning.schedules_table(schedules))
    if grid and "<!-- attribution:" in MAIN_README.read_text():
        fill(MAIN_README, "attribution", report_attribution.summary(grid, where(grid)))
    if costs and "<!-- attribution-cost:" in MAIN_README.read_text():
        fill(MAIN_README, "attribution-cost", report_attribution.cost_table(costs))
    if flips:
        fill(ATTRIBUTION_PAGE, "flipped", report_flipped.summary(flips, where(flips)))
    if gpu and "<!-- cuda:" in MAIN_README.read_text():
        fill(MAIN_README, "cuda", report_cuda.summary(gpu))
    if study:
        fill(
            MAIN_README,
            "study",
            report_study.beside_the_talk(study, ("ours",)) + "\n\n" + report_study.best_for_all(study),
        )


if __name__ == "__main__":
    main()
