"""Tables and a picture of attribution's figures, from results/attribution.json and results/attribution_cost.json."""

from __future__ import annotations

from typing import Any

from attribution import OURS
from attribution_cost import WAYS
from attribution_rivals import RIVALS
from leave_out import INPUTS
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from measuring import MIB
from tables import table

from revdistill.outer.drawing import COLOURS, WIDTH, styled

TITLES = {OURS: "rd.attribute"} | {name: rival.title for name, rival in RIVALS.items()}


def cell_title(cell: dict[str, Any]) -> str:
    """In words."""
    eps = "" if cell["optimizer"] == "SGD" or cell["eps"] == 1e-8 else f", eps {cell['eps']:g}"
    inputs = "" if cell["inputs"] == INPUTS[0] else f", {cell['inputs']} inputs"
    return f"{cell['architecture']}, {cell['activation']}, {cell['optimizer']} {cell['lr']:g}{eps}{inputs}"


def methods_of(results: dict[str, Any]) -> list[str]:
    """Those that were run, in the order of the columns."""
    return [name for name in TITLES if name in results["cells"][0]["seconds"]]


def lds(cell: dict[str, Any], i: int, method: str) -> str:
    """Of one way at the i-th drop; bold where none is better, a dash where it was not run."""
    found = {name: one["lds"] for name, one in cell["drops"][i]["methods"].items()}
    if method not in found:
        return "-"
    value = f"{found[method]:.3f}"
    return f"**{value}**" if found[method] == max(found.values()) else value


def best_rival(cell: dict[str, Any], i: int) -> tuple[str, float] | None:
    """The name of the best of the others, and its LDS."""
    others = {name: one["lds"] for name, one in cell["drops"][i]["methods"].items() if name != OURS}
    return max(others.items(), key=lambda item: item[1]) if others else None


def protocol(results: dict[str, Any], where: str) -> str:
    """What was done, in a paragraph."""
    s = results["settings"]
    counts = sorted({row["retrainings"] for cell in results["cells"] for row in cell["drops"]})
    said = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"`python benchmarks/attribution.py`, on {where}: {s['examples']:,} MNIST images, batches of {s['batch']}, "
        f"{s['epochs']} epochs ({s['steps']} steps), {s['queries']} test images as queries, {said} retrainings without "
        "random subsets of 1, 5 and 10 % (each table says how many), in plain torch. LDS: Spearman's rank correlation "
        "of predicted and true losses over the retrainings, the mean over the queries."
    )


def verdict(results: dict[str, Any]) -> str:
    """Who wins, and whether smoothness foretold it."""
    cells = results["cells"]
    places = [
        (cell, i)
        for cell in cells
        for i in range(len(cell["drops"]))
        if (rival := best_rival(cell, i)) and rival[1] >= cell["drops"][i]["methods"][OURS]["lds"]
    ]
    total = sum(len(cell["drops"]) for cell in cells)
    lost = "; ".join(
        f"{cell_title(cell)} at {cell['drops'][i]['drop']:.0%} ({TITLES[best_rival(cell, i)[0]]})"  # type: ignore[index]
        for cell, i in places
    )
    won = f"rd.attribute has the highest LDS in {total - len(places)} of {total}" + (
        f", and not in: {lost}." if lost else "."
    )
    missing = "".join(f" {TITLES[name]} is left out: {why}." for name, why in results["missing"].items())
    told = ", ".join(f"{rho:.2f} at {float(drop):.0%}" for drop, rho in results["foretold"].items())
    return f"{won}{missing} Rank correlation over the {len(cells)} trainings of smoothness and LDS: {told}."


def section(results: dict[str, Any], where: str) -> str:
    """Everything in benchmarks/README.md."""
    parts = [protocol(results, where), verdict(results)]
    names = methods_of(results)
    for i, drop in enumerate(row["drop"] for row in results["cells"][0]["drops"]):
        rows = []
        for cell in results["cells"]:
            row = cell["drops"][i]
            mine = row["methods"][OURS]
            rows.append(
                [
                    cell_title(cell),
                    str(row["retrainings"]),
                    f"{cell['smoothness']:.2f}",
                    *(lds(cell, i, name) for name in names),
                    f"{mine['interval'][0]:.3f} to {mine['interval'][1]:.3f}",
                    f"{mine['mean_loss']:.3f}",
                ]
            )
        header = [
            "training",
            "retrainings",
            "smoothness",
            *(TITLES[n] for n in names),
            "95 % of rd.attribute",
            "mean loss",
        ]
        parts.append(f"### {drop:.0%} left out\n\n" + table(header, rows))
    rows = [[cell_title(cell), *(f"{cell['seconds'][n]:.0f}" for n in names)] for cell in results["cells"]]
    parts.append(
        "Seconds for the scores of all queries, with the training that they are of:\n\n"
        + table(["training", *(TITLES[n] for n in names)], rows)
    )
    return "\n\n".join(parts)


@styled
def picture(results: dict[str, Any]) -> Figure:
    """LDS against smoothness, each way in a colour and with a marker of its own."""
    names = methods_of(results)
    drops = results["cells"][0]["drops"]
    figure, axes = plt.subplots(1, len(drops), figsize=(WIDTH, 3.2), layout="constrained", sharey=True, squeeze=False)
    for i, (ax, row) in enumerate(zip(axes[0], drops, strict=True)):
        for name, color, marker in zip(names, COLOURS, "os^vDP", strict=False):
            points = [(cell["smoothness"], cell["drops"][i]["methods"][name]["lds"]) for cell in results["cells"]]
            ax.scatter(*zip(*points, strict=True), s=24, c=color, marker=marker, label=TITLES[name])
        ax.set_title(f"{row['drop']:.0%} left out")
        ax.set_xlabel("smoothness of the training")
        ax.grid()
    axes[0][0].set_ylabel("LDS, mean over the queries")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    return figure


# One and 100 queries


def cost_section(results: dict[str, Any], where: str) -> str:
    """Time and memory of one and of many queries."""
    s = results["settings"]
    return (
        f"`python benchmarks/attribution_cost.py`, on {where}: MLP 784-{s['width']}-10, batch {s['batch']}, SGD(0.01, "
        f"0.9); before, all ways agreed to {max(results['apart'].values()):.0e} in float64.\n\n" + cost_table(results)
    )


def cost_table(results: dict[str, Any]) -> str:
    """Each figure in a fresh process; what was not run says why."""
    found = {(row["way"], row["queries"], row["steps"]): row for row in results["rows"]}
    steps = sorted({key[2] for key in found})
    rows = []
    for name, way in WAYS.items():
        for queries in sorted({key[1] for key in found if key[0] == name}):
            rows.append([way.title, str(queries), *(_cost(found[name, queries, t]) for t in steps)])
    return table(["derivatives of queries by examples' weights", "queries", *(f"T = {t:,}" for t in steps)], rows)


def _cost(row: dict[str, Any]) -> str:
    if "seconds" not in row:
        return f"not run: {row.get('skipped') or row['error']}"
    return f"{row['seconds']:.1f} s, {row['bytes'] / MIB:,.0f} MiB"
