"""The study's tables and pictures, from results/medvedev2020.json."""

from __future__ import annotations

from typing import Any

from stacked import STUDIED, UNSEEN
from tables import table

DATA = (*STUDIED, "all")
STRATEGIES = {"raw": "raw steps", "strategy1": "strategy 1", "strategy2": "strategy 2", "strategy3": "strategy 3"}
PICTURES = {
    "data": "Train and test data",
    "points": "Synthetic points of steps 1, 14, 27 and 40 over the real data",
    "boundaries": "Decision boundaries, first restart: trained on original data, on distilled data along its own steps",
    "rates": "Learned step sizes, mean over restarts, beside strategy 1",
}

# The talk's own figures (D. Medvedev, 2020): (data, schedule, test) -> mean, std.
TALK = {
    ("original", "raw"): ((0.766, 0.089), (0.877, 0.006), (0.995, 0.015)),
    ("LinearNet", "raw"): ((0.871, 0.003), (0.869, 0.004), (0.864, 0.006)),
    ("NonLinearNet", "raw"): ((0.808, 0.014), (0.941, 0.043), (0.691, 0.182)),
    ("MoreNonLinearNet", "raw"): ((0.825, 0.014), (0.879, 0.013), (0.906, 0.054)),
    ("LinearNet", "strategy1"): ((0.867, 0.005), (0.860, 0.008), (0.860, 0.010)),
    ("NonLinearNet", "strategy1"): ((0.808, 0.010), (0.937, 0.039), (0.985, 0.015)),
    ("MoreNonLinearNet", "strategy1"): ((0.818, 0.012), (0.911, 0.059), (0.926, 0.055)),
    ("all", "raw"): ((0.859, 0.005), (0.881, 0.004), (0.867, 0.122)),
    ("all", "strategy1"): ((0.851, 0.007), (0.970, 0.028), (0.986, 0.014)),
}

Cells = dict[tuple[str, str, str, str], dict[str, Any]]


def by_place(cells: list[dict[str, Any]]) -> Cells:
    """(setting, data, schedule, test) -> cell."""
    return {(c["setting"], c["data"], c["schedule"], c["test"]): c for c in cells}


def in_words(mean: float, std: float) -> str:
    """As the talk writes it."""
    return f"{mean:.3f} +- {std:.3f}"


def grid(cells: Cells, setting: str, data: str, schedule: str, tests: tuple[str, ...]) -> list[str]:
    """One row of a table."""
    found = [cells.get((setting, data, schedule, test)) for test in tests]
    return [in_words(c["mean"], c["std"]) if c else "-" for c in found]


def beside_the_talk(results: dict[str, Any], settings: tuple[str, ...] = ("ours", "faithful")) -> str:
    """Every cell that the talk has: the talk's, and those of our settings."""
    cells = by_place(results["cells"])
    rows = []
    for (data, schedule), talk in TALK.items():
        label = "original data" if data == "original" else f"{data}, {STRATEGIES[schedule]}"
        rows.append([label, "talk", *(in_words(*pair) for pair in talk)])
        for setting in ("faithful",) if data == "original" else settings:
            row = grid(cells, setting, data, schedule, STUDIED)
            rows.append(["", "the same training" if data == "original" else setting, *row])
    return table(["distilled for, trained along", "", *STUDIED], rows)


def best_for_all(results: dict[str, Any]) -> str:
    """The data distilled for all: every schedule, every architecture."""
    cells = by_place(results["cells"])
    rows = [[STRATEGIES[s], *grid(cells, "ours", "all", s, (*STUDIED, *UNSEEN))] for s in STRATEGIES]
    return table(["distilled for all (ours)", *STUDIED, *(f"{name} (unseen)" for name in UNSEEN)], rows)


def section(results: dict[str, Any]) -> str:
    """The study in benchmarks/README.md."""
    machine = results["machine"]
    settings = results["settings"]
    seconds = {name: results["parts"][name]["seconds"] for name in ("faithful", "ours")}
    parts = [
        f"`python benchmarks/medvedev2020.py`: {settings['restarts']} restarts; distilling took "
        f"{seconds['faithful']:.0f} s (faithful) "
        f"and {seconds['ours']:.0f} s (ours), a core each, on {machine['cores']} cores ({machine['processor']}), torch "
        f"{results['versions']['torch']}. Test accuracy, mean and std over restarts, one fresh network each.",
        f"Faithful: {described(settings['faithful'])}. Ours: {described(settings['ours'])}. It "
        "was chosen with other seeds and other test points than those of these tables.",
        beside_the_talk(results),
        best_for_all(results),
        "All schedules, all architectures, ours:",
        every_schedule(results, "ours"),
        "The same, faithful:",
        every_schedule(results, "faithful"),
    ]
    for name, heading in PICTURES.items():
        parts.append(f"![{heading}](results/medvedev2020-{name}.png)")
    if results["datasets"]:
        parts.append(datasets(results))
    if any(name.startswith("momentum-") for name in results["parts"]):
        parts.append(momentum_table(results))
    return "\n\n".join(parts)


def summary(results: dict[str, Any]) -> str:
    """The study's short form: ours beside the talk, and what serves all architectures."""
    return f"{beside_the_talk(results, ('ours',))}\n\n{best_for_all(results)}"


def described(protocol: dict[str, Any]) -> str:
    """A protocol's settings in words."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in protocol.items())


def every_schedule(results: dict[str, Any], setting: str) -> str:
    """Rows: data and schedule; columns: all architectures."""
    cells = by_place(results["cells"])
    rows = [
        [data, STRATEGIES[s], *grid(cells, setting, data, s, (*STUDIED, *UNSEEN))] for data in DATA for s in STRATEGIES
    ]
    return table(["distilled for", "", *STUDIED, *UNSEEN], rows)


def datasets(results: dict[str, Any]) -> str:
    """Circles, blobs, digits."""
    rows = []
    for name, found in results["datasets"].items():
        cells = by_place(found)
        for data in DATA:
            for schedule in ("raw", "strategy1"):
                row = grid(cells, "ours", data, schedule, (*STUDIED, *UNSEEN))
                rows.append([name, data, STRATEGIES[schedule], *row])
    return "### Circles, blobs, digits (ours, first step sizes 0.05, compression 3x)\n\n" + table(
        ["", "distilled for", "", *STUDIED, *UNSEEN], rows
    )


def momentum_table(results: dict[str, Any]) -> str:
    """Accuracy, bits and time against momentum, everything else faithful."""
    rows = []
    for label, part in momentum_parts(results):
        cells = by_place(part["cells"])
        setting = part["cells"][0]["setting"]
        own = [grid(cells, setting, data, "raw", (data,))[0] for data in STUDIED]
        mixed = grid(cells, setting, "all", "raw", STUDIED)
        bits = "-" if part["bits"] is None else f"{part['bits']:.3f}"
        rows.append([label, *own, *mixed, bits, f"{part['seconds']:.0f} s"])
    header = ["momentum", *(f"{name}, own data" for name in STUDIED), *(f"{name}, data for all" for name in STUDIED)]
    text = table([*header, "bits per parameter and step", "time"], rows)
    text += (
        "\n\nMomentum by itself does not distil better under the talk's protocol: 0.9 is within the spread of 0, and "
        "0.99 is worse "
        "where one set has to serve all three. Bits: those spilled; up to 52 per parameter stay in the head, so 0.9 "
        "and 0.99 spill "
        "none in 200 steps."
    )
    picture = "![momentum](results/medvedev2020-momentum.png)"
    return f"### What momentum changes (raw steps, else faithful)\n\n{text}\n\n{picture}"


def momentum_parts(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(momentum in words, part), ascending."""
    named = {
        name.removeprefix("momentum-"): part for name, part in results["parts"].items() if name.startswith("momentum-")
    }
    faithful = [("0", results["parts"]["faithful"])] if "faithful" in results["parts"] else []
    return faithful + sorted(named.items(), key=lambda entry: float(entry[0]))
