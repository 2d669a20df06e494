"""Tables and pictures of distilled MNIST and CIFAR-10, from results/images.json and the artifacts beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from image_cells import (
    COLUMNS,
    HELD_OUT_IMAGES,
    MOMENTUM,
    NETWORKS,
    RATES,
    STEPS,
    TEST_IMAGES,
)
from image_rows import BASELINES, CUDA, HARD, ROWS, SCHEDULES, TITLES, Baseline, Row, row_of
from measuring import RESULTS
from report_images_lines import lines_table
from report_images_race import in_words, race_in_words, starts_and_windows
from tables import table, threads_of

CLASSES = 10
BASELINE_TITLES = {"real": "random real images", "kmeans": "centroids (k-means)"}
# Papers' figures for ConvNet-3 at 10 and 100 images in all, in per cent. Deng & Russakovsky: without bases.
PUBLISHED: dict[str, dict[tuple[str, int], str]] = {
    "DC (Zhao et al. 2021)": {
        ("mnist", 10): "91.7",
        ("mnist", 100): "97.4",
        ("cifar10", 10): "28.3",
        ("cifar10", 100): "44.9",
    },
    "DSA (Zhao & Bilen 2021)": {
        ("mnist", 10): "88.7",
        ("mnist", 100): "97.8",
        ("cifar10", 10): "28.8",
        ("cifar10", 100): "52.1",
    },
    "IDC (Kim et al. 2022)": {
        ("mnist", 10): "94.2",
        ("mnist", 100): "98.4",
        ("cifar10", 10): "50.6",
        ("cifar10", 100): "67.5",
    },
    "Deng & Russakovsky 2022, without bases": {("cifar10", 10): "about 49", ("cifar10", 100): "about 62"},
    "RaT-BPTT (Feng et al. 2023)": {("cifar10", 10): "53", ("cifar10", 100): "69"},
    "AT-BPTT++ (2026)": {("cifar10", 10): "55.7", ("cifar10", 100): "74.9"},
}
ABOUT_SETTINGS = (
    "Settings were chosen on held-out training data, by runs of two to five minutes: 16 for LeNet, 9 for ConvNet-3 on "
    "MNIST, 2 for the 10 steps of 2018, 7 for ConvNet-3 on CIFAR-10. Most images that bases make of MNIST can be read "
    "by a person."
)
ABOUT_BASELINES = (
    f"Random images (other ones for each network) and centroids: rate and number of steps chosen on held-out data, "
    f"measured on {TEST_IMAGES:,} of the test images."
)
ABOUT_TIMES = "The times are on the wall, of a machine that did other work as well: no more than that is needed."


def summary_table(results: dict[str, Any]) -> str:
    """A line for each row: others, ours with hard and with soft labels, real images and centroids."""
    lines = []
    for name in _rows(results):
        row, hard = row_of(name), name + HARD
        versions = [each for each in (name, name + CUDA) if each in results["rows"]]
        kept = results["rows"].get(name) or results["rows"].get(name + CUDA) or results["rows"].get(hard)
        cells = [_versions(results, hard), _versions(results, name)]
        if hard in results["rows"]:  # soft labels' time stands at the end of the line
            cells[0] += f", in {results['rows'][hard]['seconds'] / 60:.0f} min"
        cells += [_worst(results, f"{row.config.dataset}_{row.budget}_{kind}", row) for kind in ("random", "kmeans")]
        times = [time(results["rows"][each]) for each in versions]
        lines.append([_linked(name, row.title), row.published, *cells, numbers(kept), "; ".join(times) or "-"])
    header = ["test accuracy", "published", "ours, hard labels", "ours, soft labels", "random images", "centroids"]
    return table([*header, "numbers stored", "distilled in"], lines)


def _linked(name: str, text: str) -> str:
    """The text as a link to a row's artifact, as from the repository's root, where there is one."""
    return f"[{text}](benchmarks/results/{name}.h5)" if (RESULTS / f"{name}.h5").exists() else text


def _rows(results: dict[str, Any]) -> list[str]:
    """Names of rows of which any version was distilled."""
    return [
        name
        for name in ROWS
        if not name.endswith(HARD) and any(name + e in results["rows"] for e in ("", HARD, CUDA, HARD + CUDA))
    ]


def _versions(results: dict[str, Any], name: str) -> str:
    """What was distilled on a CPU, and on a GPU."""
    found = [_worst(results, name, row_of(name))] if name in results["rows"] else []
    if name + CUDA in results["rows"]:
        found.append(_worst(results, name + CUDA, row_of(name)) + " (GPU)")
    return "; ".join(found) or "-"


def _worst(results: dict[str, Any], name: str, row: Row) -> str:
    """On the network that the row is for; of several the worst."""
    found = _own(results, name, row)
    if len(found) < len(row.made_for):
        return "-"
    worst = min(found, key=lambda network: found[network]["mean"])
    if len(found) > 1:
        return f"{_figure(found[worst], name not in BASELINES)} ({worst}, the worst)"
    return _figure(found[worst], name not in BASELINES) + (f" ({worst})" if worst not in row.made_for else "")


def _own(results: dict[str, Any], name: str, row: Row) -> dict[str, dict[str, Any]]:
    """What the networks that a row is for reached; where these were not measured, the narrow ones of its distilling."""
    cells = results["cells"].get(name, {})
    pairs = zip(row.made_for, row.config.architectures, strict=True)
    chosen = [usual if usual in cells else narrow for usual, narrow in pairs]
    return {network: cells[network] for network in chosen if network in cells}


def _figure(cell: dict[str, Any], all_images: bool = True) -> str:
    """In words, with the number of networks where it is not the usual one; all_images: and of images where these are
    not all.
    """
    more = [] if cell["restarts"] in (1, NETWORKS) else [f"{cell['restarts']} networks"]
    more += [f"{TEST_IMAGES:,} images"] if all_images and cell["test_images"] == TEST_IMAGES else []
    return in_words(cell) + (f" ({', '.join(more)})" if more else "")


def numbers(row: dict[str, Any]) -> str:
    """How many numbers a row's artifact stores, in words."""
    inputs, labels = row["numbers"]["inputs"], row["numbers"]["labels"]
    return f"{inputs:,}" + (f" + {labels:,} of labels" if labels else "")


def time(row: dict[str, Any]) -> str:
    """Minutes, and what they were on."""
    on = row["machine"].get("gpu") or threads_of(row["machine"])
    return f"{row['seconds'] / 60:.0f} min, {on}"


def full_table(results: dict[str, Any]) -> str:
    """A line for each row that was distilled, and how its networks were trained."""
    lines = []
    for name, row in results["rows"].items():
        about, cells = row_of(name), results["cells"].get(name, {})
        own = {n: cells[n] for n in dict.fromkeys((*about.config.architectures, *about.made_for)) if n in cells}
        ours = [_figure(found) + (f" ({network})" if len(own) > 1 else "") for network, found in own.items()]
        schedules = [found["schedule"] for found in own.values()]
        how = ", ".join(dict.fromkeys(schedule.replace("strategy", "strategy ") for schedule in schedules))
        title = about.title + (", on a GPU" if name.endswith(CUDA) else "")
        lines.append([_linked(name, name), title, about.published, about.target, ", ".join(ours) or "-", how or "-"])
        lines[-1] += [numbers(row), f"{row['config']['outer_steps']:,} steps, {time(row)}"]
    header = ["row", "", "published, %", "aimed at, %", "ours", "schedule", "numbers stored", "distilled in"]
    return table(header, lines)


def figure_of(results: dict[str, Any], name: str) -> str:
    """What a row's network reached, of several the worst, in words."""
    return _worst(results, name, row_of(name))


def artifact_link(name: str) -> str:
    """To a row's artifact, as from the repository's root."""
    return f"[{name}.h5](benchmarks/results/{name}.h5)"


def across_networks(results: dict[str, Any]) -> list[str]:
    """For each dataset and budget a table of sets of data by networks."""
    budgets: dict[tuple[str, int], list[str]] = {}
    for name in results["cells"]:
        about = BASELINES[name] if name in BASELINES else row_of(name)
        dataset = about.dataset if isinstance(about, Baseline) else about.config.dataset
        budgets.setdefault((dataset, about.budget), []).append(name)
    parts = []
    for (dataset, budget), names in budgets.items():
        lines = [[_set(results, name), *(_cell(results, name, network) for network in COLUMNS)] for name in names]
        parts.append(table([f"{TITLES[dataset]}, {budget // CLASSES} per class", *COLUMNS], lines))
    return parts


def _set(results: dict[str, Any], name: str) -> str:
    if name in BASELINES:
        return BASELINE_TITLES[BASELINES[name].start]
    config = results["rows"][name]["config"]
    labels = "soft" if config["learn_labels"] else "hard"
    more = {"mnist_2018_100": ", 10 steps x 3 epochs", "mnist_fixed_10": ", one initialisation"}.get(name, "")
    networks = ", ".join(config["architectures"])
    return f"for {networks}{more}, {labels} labels" + (", on a GPU" if name.endswith(CUDA) else "")


def _cell(results: dict[str, Any], name: str, network: str) -> str:
    found = results["cells"][name].get(network)
    if found is None:
        return "-"
    own = name not in BASELINES and network in row_of(name).made_for
    return f"**{_figure(found)}**" if own else _figure(found, all_images=False)


def published_table(results: dict[str, Any]) -> str:
    """What papers report for ConvNet-3, ours below."""
    columns = [(dataset, budget) for dataset in TITLES for budget in (10, 100)]
    lines = [[work, *(figures.get(column, "-") for column in columns)] for work, figures in PUBLISHED.items()]
    for label, of in (
        ("ours, hard labels", lambda d, b: _versions(results, f"{d}_convnet_{b}{HARD}")),
        ("ours, soft labels", lambda d, b: _versions(results, f"{d}_convnet_{b}")),
        *(
            (
                BASELINE_TITLES[start],
                lambda d, b, kind=kind: _worst(results, f"{d}_{b}_{kind}", ROWS[f"{d}_convnet_{b}"]),
            )
            for kind, start in (("random", "real"), ("kmeans", "kmeans"))
        ),
    ):
        lines.append([label, *(of(*column) for column in columns)])
    titles = [f"{TITLES[dataset]}, {budget // CLASSES} per class" for dataset, budget in columns]
    return table(["ConvNet-3", *titles], lines)


def about_cells(results: dict[str, Any]) -> str:
    """How the tables were measured."""
    cells = [cell for name, found in results["cells"].items() if name in BASELINES for cell in found.values()]
    tried = _listed(sorted({cell["tried"] for cell in cells}) or [len(RATES) * len(STEPS)], "or")
    return (
        f"Each figure: {NETWORKS} fresh networks (one for a fixed initialisation; or as many as brackets say), trained "
        "by torch.optim. Bold: the networks that the data were distilled for, on all test images; the others, and "
        f"those of real images and centroids, on {TEST_IMAGES:,} test images, always the same. How a network is "
        f"trained is chosen on {HELD_OUT_IMAGES:,} held-out training images, with networks other than those that are "
        f"measured: on distilled data out of up to {len(SCHEDULES)} ways (the learned steps; strategies 2 and 3, which "
        f"go on to 50 epochs), on real images and centroids out of {tried} (rates and numbers of steps, momentum "
        f"{MOMENTUM:g}, one image of each class a step). Random images are others for each network. Numbers stored: "
        "those of the images, and of soft labels; step sizes come on top."
    )


def _listed(values: Sequence[float], last: str) -> str:
    *first, end = (f"{value:g}" for value in values)
    return f"{', '.join(first)} {last} {end}" if first else end


def section(results: dict[str, Any]) -> str:
    """The images in benchmarks/README.md."""
    machine = results["machine"]
    parts = [
        f"`python benchmarks/images.py --data-dir DIR`, and again with `--measure`, on {machine['cores']} cores "
        f"({machine['processor']}). Each row's settings are in results/images.json, and in the artifact of its name in "
        "results/ where it has soft labels.",
        full_table(results),
        "### Which artifact, and which command\n\n" + lines_table(results),
        about_cells(results),
        ABOUT_SETTINGS,
        ABOUT_TIMES,
        *about_narrow(results),
        *about_cifar10(results),
        *across_networks(results),
        "What papers report, in per cent, beside ours:\n\n" + published_table(results),
    ]
    if "race" in results:
        parts += [race_in_words(results), "![accuracy against time](results/images-race.png)"]
    if "starts_and_windows" in results:
        parts.append(starts_and_windows(results))
    for name in results["rows"]:
        if HARD not in name:
            title = row_of(name).title + (", on a GPU" if name.endswith(CUDA) else "")
            parts.append(f"{title}:\n\n![{title}](results/{name}.png)")
    return "\n\n".join(parts)


def summary(results: dict[str, Any]) -> str:
    """The images in the main README."""
    parts = [
        summary_table(results),
        ABOUT_BASELINES + " " + ABOUT_TIMES,
        *about_narrow(results),
        *about_cifar10(results),
    ]
    if "race" in results:
        parts.append(race_in_words(results))
    return "\n\n".join(parts)


def about_narrow(results: dict[str, Any]) -> list[str]:
    """Where rows were distilled for narrow networks."""
    narrow = {name for row in results["rows"].values() for name in row["config"]["architectures"] if ":" in name}
    if not narrow:
        return []
    usual = ", ".join(sorted({name.partition(":")[0] for name in narrow}))
    return [
        f"What is for {usual} was distilled, on a CPU, for narrow ones ({', '.join(sorted(narrow))}), and is measured "
        "on the usual one."
    ]


def about_cifar10(results: dict[str, Any]) -> list[str]:
    """Where there is a row of it."""
    if not any(row["config"]["dataset"] == "cifar10" for row in results["rows"].values()):
        return []
    return [
        "The CIFAR-10 images used here had been stored as JPEG: their rows compare with published ones only roughly."
    ]
