"""Distilled MNIST and CIFAR-10, beside Wang et al. 2018 and what came after.

    python benchmarks/wang2018.py --data-dir DIR            every row of the table; hours on a CPU
    python benchmarks/wang2018.py --data-dir DIR --only mnist_fixed_10 race
    python benchmarks/wang2018.py --data-dir DIR --quick    three outer steps of each row: whether it runs
    python benchmarks/wang2018.py --data-dir DIR --measure  the artifacts in results/ measured again, nothing distilled

Each row is a run in runs/wang2018/ROW that goes on where it was stopped. Writes results/wang2018.json, keeping the rows
that were not run, and each row's artifact and picture; `python benchmarks/report.py` makes the tables.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from measuring import HERE, RESULTS, machine, save, versions
from measuring import load as load_results

from revdistill.distill.artifact import FILE_NAME, Artifact, read
from revdistill.distill.config import Config
from revdistill.distill.distillation import Distillation
from revdistill.distill.distiller import Distiller
from revdistill.distill.evaluation import evaluate
from revdistill.distill.plots import images
from revdistill.distill.presets import settings
from revdistill.outer.data import DATA_DIR, Dataset, load
from revdistill.outer.directory import METRICS, read_metrics

RUNS = HERE.parent / "runs" / "wang2018"
NETWORKS = 10  # fresh ones that an artifact is measured with
RACE_NETWORKS = 20  # as for the reference code's figures
RACE_EVERY = 10.0  # seconds of distilling between two looks
CHOICE_SECONDS = 60.0


@dataclass(frozen=True)
class Row:
    """reference, target: of the table. tests: architectures trained on the result, besides those it was distilled for.

    schedule: how fresh networks are trained on it; where any will do, the learned steps and then the last epoch's again
    and again.
    """

    title: str
    config: Config
    reference: str
    target: str
    tests: tuple[str, ...] = field(default=())
    schedule: str = "raw"


def _row(
    title: str, reference: str, target: str, tests: tuple[str, ...] = (), schedule: str = "raw", **changes: Any
) -> Row:
    fields = {"dataset": "mnist", "architectures": ("LeNet",)} | settings("best", "", ()) | changes
    return Row(title, Config(**fields), reference, target, tests, schedule)


# Short trainings: a weight decay does little in them, and the way back over all of their steps takes little.
_SHORT: dict[str, Any] = {"weight_decay": 0.0, "window": None}
# Real images as the start, larger rates that are learned faster, fewer samples.
_FROM_REAL: dict[str, Any] = {
    "start": "real",
    "batch_size": 256,
    "outer_lr": 0.02,
    "outer_lr_rates": 0.01,
    "clip": 1.0,
    "average": 0.2,
}
# A core's settings for networks of many operations: few outer steps, so larger ones, of fewer real images.
_FEW_STEPS: dict[str, Any] = {"batch_size": 128, "outer_lr": 0.03, "outer_lr_rates": 0.001}
_CONVNET: dict[str, Any] = _FEW_STEPS | _SHORT | {"dataset": "cifar10", "momentum": 0.6, "lr": 0.01, "outer_lr": 0.05}
ROWS = {
    "mnist_random_100_wang": _row(
        "MNIST, LeNet, random init, 100 images, 10 steps x 3 epochs",
        "79.50 +- 8.08",
        ">= 85, std <= 3",
        **_SHORT,
        epochs=3,
        momentum=0.6,
        lr=0.025,
        outer_lr=0.03,
        outer_lr_rates=0.001,
        outer_steps=1600,
    ),
    "mnist_random_100": _row(
        "MNIST, LeNet, random init, 100 images, any schedule",
        "79.50",
        ">= 95",
        tests=("MLP", "ConvNet-3"),
        schedule="strategy3",  # a little better than "raw" on the held-out data too
    ),
    "mnist_fixed_10": _row(
        "MNIST, LeNet, fixed init, 10 images",
        "94",
        ">= 96",
        **_FROM_REAL,
        **_SHORT,
        steps=1,
        epochs=10,
        lr=0.05,
        outer_steps=10_000,
        init="fixed",
    ),
    "mnist_random_10": _row(
        "MNIST, LeNet, random init, 10 images, any schedule",
        "-",
        ">= 85",
        steps=1,
        epochs=100,
        # without it networks keep their random start, and the same ten images do not suit every one of them
        weight_decay=0.04,
        lr=0.017,
        window=40,
        outer_lr=0.03,
        outer_steps=3000,
    ),
    "mnist_all_100": _row(
        "MNIST, LeNet, MLP and ConvNet-3 at once, random init, 100 images",
        "-",
        "-",
        schedule="strategy3",
        architectures=("LeNet", "MLP", "ConvNet-3"),
        **_FEW_STEPS,
        epochs=10,
        window=20,
        outer_steps=200,
    ),
    "cifar10_random_100": _row(
        "CIFAR-10, AlexCifarNet, random init, 100 images",
        "36.79 +- 1.18",
        ">= 45",
        architectures=("AlexCifarNet",),
        **_FEW_STEPS | {"batch_size": 256},
        dataset="cifar10",
        epochs=8,  # with 3, fresh networks are far from done
        weight_decay=0.0,  # with 0.03: the same accuracy
        lr=0.012,
        window=25,
        outer_steps=900,
    ),
    "cifar10_convnet_10": _row(
        "CIFAR-10, ConvNet-3, random init, 10 images",
        "about 49",
        "-",
        architectures=("ConvNet-3",),
        **_CONVNET | {"batch_size": 256},
        steps=1,
        epochs=10,  # by then these ten are fitted
        outer_steps=1100,
    ),
    "cifar10_convnet_100": _row(
        "CIFAR-10, ConvNet-3, random init, 100 images",
        "about 62",
        "-",
        schedule="strategy3",
        architectures=("ConvNet-3",),
        **_CONVNET,
        epochs=3,
        outer_steps=240,
    ),
}
RACE = replace(ROWS["mnist_random_100_wang"].config, **_FROM_REAL | {"outer_lr": 0.05}, lr=0.05, outer_steps=450)
# T = 100, its Adam rates constant: a comparison by time cannot know how many outer steps there will be.
CHOICE = replace(ROWS["mnist_random_100"].config, epochs=10, weight_decay=0.0, lr=0.01, outer_decay="none", average=0.0)


def run_row(name: str, row: Row, data: Dataset, quick: bool) -> dict[str, Any]:
    """Distil, or go on with it; measure fresh networks trained by torch.optim.SGD; keep artifact and picture."""
    config = replace(row.config, outer_steps=3, batch_size=64) if quick else row.config
    directory = RUNS / (f"quick-{name}" if quick else name)
    if quick:
        shutil.rmtree(directory, ignore_errors=True)
    if not (directory / FILE_NAME).exists():
        resume = Distillation.started_in(directory)
        Distillation(directory, Distiller(config, data), resume=resume).run()
    artifact = read(directory / FILE_NAME)
    seconds = [line["seconds"] for line in read_metrics(directory / METRICS)]
    if not quick:
        shutil.copy(directory / FILE_NAME, RESULTS / f"{name}.h5")
        images(artifact).savefig(RESULTS / f"{name}.png", dpi=100)
    return {
        "title": row.title,
        "reference": row.reference,
        "target": row.target,
        "config": config.to_dict(),
        "seconds": seconds[-1],
        "evaluation": measure(artifact, row, data, 2 if quick else NETWORKS, known=artifact.evaluation),
        "machine": machine(config.device),
        "versions": versions(),
    }


def measure(
    artifact: Artifact, row: Row, data: Dataset, networks: int, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Test accuracy of fresh networks of every architecture of the row; a fixed initialisation has but one.

    known: evaluations that the run has just made, which are not made again where they are of as many networks and this
    schedule.
    """
    found: dict[str, Any] = {}
    for name in (*artifact.architectures, *row.tests):
        fixed = artifact.config.get("init") == "fixed" and name in artifact.architectures
        restarts = 1 if fixed else networks
        found[name] = (known or {}).get(name, {})
        if (found[name].get("restarts"), found[name].get("schedule")) != (restarts, row.schedule):
            found[name] = evaluate(artifact, data, name, restarts=restarts, schedule=row.schedule).to_dict()
        print(f"{row.title}: {name} {found[name]['mean']:.2%} +- {found[name]['std']:.2%}", flush=True)
    return found


def measured_again(name: str, row: Row, data: Dataset) -> dict[str, Any]:
    """The row as it is in the results, with its committed artifact's accuracy measured now."""
    before: dict[str, Any] = (load_results("wang2018") or {"rows": {}})["rows"][name]
    return before | {"evaluation": measure(read(RESULTS / f"{name}.h5"), row, data, NETWORKS)}


def distilling(
    config: Config, data: Dataset, every: float, seconds: float = math.inf
) -> Iterator[tuple[float, Distiller]]:
    """Distil on one core until all is done or the seconds are over; a look each `every` seconds and at the end, not
    counted.

    The start counts: centroids take some seconds. One outer step is taken in any case.
    """
    torch.set_num_threads(1)
    began = time.perf_counter()
    distiller, looked = Distiller(config, data), 0.0
    spent = time.perf_counter() - began
    while distiller.outer_step < config.outer_steps and (spent < seconds or distiller.outer_step == 0):
        started = time.perf_counter()
        distiller.step()
        spent += time.perf_counter() - started
        if spent - looked >= every or spent >= seconds or distiller.outer_step == config.outer_steps:
            looked = spent
            yield spent, distiller


def race(data: Dataset, quick: bool) -> dict[str, Any]:
    """Test accuracy against the seconds that distilling took."""
    config = replace(RACE, outer_steps=3, batch_size=64) if quick else RACE
    curve = []
    for seconds, distiller in distilling(config, data, RACE_EVERY):
        found = evaluate(distiller.artifact(), data, "LeNet", restarts=2 if quick else RACE_NETWORKS)
        curve.append({"seconds": seconds, "outer_step": distiller.outer_step, "mean": found.mean, "std": found.std})
        print(f"race: {seconds:.0f} s, {found.mean:.1%} +- {found.std:.1%}", flush=True)
    return {"config": config.to_dict(), "curve": curve, "machine": machine("cpu", 1), "versions": versions()}


def starts_and_windows(data: Dataset, quick: bool) -> dict[str, Any]:
    """Test accuracy after the same time: from real images and from centroids, back over a window and over all steps."""
    found = []
    for start, window in itertools.product(("real", "kmeans"), (40, None)):
        config = replace(CHOICE, start=start, window=window)
        for seconds, distiller in distilling(config, data, math.inf, 0.0 if quick else CHOICE_SECONDS):
            reached = evaluate(distiller.artifact(), data, "LeNet", restarts=2 if quick else NETWORKS)
            found.append({"start": start, "window": window, "seconds": seconds, "outer_steps": distiller.outer_step})
            found[-1] |= {"mean": reached.mean, "std": reached.std, "restarts": reached.restarts}
            print(
                f"{start}, window {window}: {distiller.outer_step} steps, {reached.mean:.1%} +- {reached.std:.1%}",
                flush=True,
            )
    return {"config": CHOICE.to_dict(), "found": found, "machine": machine("cpu", 1), "versions": versions()}


BESIDES = {"race": race, "starts_and_windows": starts_and_windows}  # what is no row of the table


def keep(name: str, found: dict[str, Any]) -> None:
    """Into results/wang2018.json, beside what it holds."""
    results = load_results("wang2018") or {"rows": {}}
    if name in BESIDES:
        results[name] = found
    else:
        rows = results["rows"] | {name: found}
        results["rows"] = {key: rows[key] for key in ROWS if key in rows}
    save("wang2018", {"machine": machine("cpu"), "versions": versions()} | results)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path(DATA_DIR))
    parser.add_argument("--only", nargs="+", choices=[*ROWS, *BESIDES], default=[*ROWS, *BESIDES])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if options.measure:
        options.only = [name for name in options.only if (RESULTS / f"{name}.h5").exists()]
    loaded: dict[str, Dataset] = {}
    for name in options.only:
        dataset = "mnist" if name in BESIDES else ROWS[name].config.dataset
        data = loaded.setdefault(dataset, load(dataset, options.data_dir))
        if options.measure:
            found = measured_again(name, ROWS[name], data)
        else:
            found = (
                BESIDES[name](data, options.quick)
                if name in BESIDES
                else run_row(name, ROWS[name], data, options.quick)
            )
        if not options.quick:  # after each: what is stopped has not been for nothing
            keep(name, found)


if __name__ == "__main__":
    main()
