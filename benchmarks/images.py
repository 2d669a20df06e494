"""Distilled MNIST and CIFAR-10 beside what others report, real images and centroids.

    python benchmarks/images.py --data-dir DIR               distil every row of the table; hours on a CPU
    python benchmarks/images.py --data-dir DIR --measure     every set of data, on five networks; nothing is distilled
    python benchmarks/images.py --data-dir DIR --only mnist_lenet_10,mnist_lenet_10_hard --minutes 40
    python benchmarks/images.py --data-dir DIR --only cifar10_convnet_100,cifar10_convnet_10 --device cuda --minutes 8
    python benchmarks/images.py --data-dir DIR --quick ...   the same in little: whether it runs

Each row is a run in runs/images/ROW that goes on where it was stopped. Rows and cells go to results/images.json as
soon as there are any, each row's artifact and picture (not those with hard labels) beside it; what a GPU distilled is
kept apart, as ROW_cuda. `python benchmarks/report.py` makes the tables.

With --out DIR all of it goes to DIR, to be brought home from another machine and taken in by --take DIR.
"""

from __future__ import annotations

import itertools
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_cells import COLUMNS, NETWORKS, baseline_cell, distilled_cell, some
from image_place import RUNS, Place, take
from image_race import BESIDES
from image_rows import BASELINES, CUDA, RAW, ROWS, agrees, row_of
from measuring import arguments_of, machine, versions

from revdistill.distill.artifact import FILE_NAME, Artifact, read
from revdistill.distill.checkpoint import FILE_NAME as CHECKPOINT
from revdistill.distill.checkpoint import read_config
from revdistill.distill.config import Config
from revdistill.distill.distillation import Distillation
from revdistill.distill.distiller import Distiller
from revdistill.outer.data import DATA_DIR, Dataset, load
from revdistill.outer.directory import METRICS, read_metrics
from revdistill.outer.job import InterruptedRunError

LOOKS = 10  # of a distillation, at its held-out accuracy
# The first steps, which say how many there will be, take this share of the time, and not more seconds than these.
FIRST_SHARE, FIRST_SECONDS, FIRST_STEPS = 0.04, 60.0, 4
QUICK: dict[str, Any] = {"outer_steps": 3, "batch_size": 64}
QUICK_EPOCHS, QUICK_IMAGES, QUICK_NETWORKS = 2, 100, 2


class Shown(Distillation):
    """A distillation that prints its held-out accuracy whenever it looks at it."""

    def step(self) -> tuple[dict[str, Any] | None, str]:
        entry, shown = super().step()
        if entry and "held_out_accuracy" in entry:
            print(f"{self.directory.name}: {self.outer_step} of {self.total} outer steps, {shown}", flush=True)
        return entry, shown


def steps_for(config: Config, data: Dataset, seconds: float) -> int:
    """How many outer steps fill these seconds, by what the first ones take: decay and averages must know the end.

    These first steps are made again, by the distillation itself; their time counts, and that of its looks. Where it
    starts from comes on top: centroids take some seconds.
    """
    began = time.perf_counter()
    distiller = Distiller(replace(config, grow=0.0, start="real"), data)
    start = time.perf_counter() - began
    taken: list[float] = []
    while len(taken) < FIRST_STEPS or sum(taken) < min(FIRST_SHARE * seconds, FIRST_SECONDS):
        taken.append(-time.perf_counter())
        distiller.step()
        taken[-1] += time.perf_counter()
    later = taken[len(taken) // 2 :]  # the first ones compile, and fill a pool
    each = sum(later) / len(later)
    look = -time.perf_counter()
    distiller.validation_accuracy()
    look += time.perf_counter()
    again = start + max(0.0, taken[0] - each) + LOOKS * look
    left = seconds - (time.perf_counter() - began) - again
    return max(1, int(left / each))


def distilled(
    name: str, config: Config, data: Dataset, directory: Path, minutes: float | None, most: int | None = None
) -> Artifact:
    """Distil, go on with it, or take what was distilled already.

    Args:
        name: of the row.
        config: to distil by.
        data: to distil.
        directory: of the run.
        minutes: that set the number of outer steps; None for that of the configuration.
        most: outer steps that are made at most, whatever the minutes.

    Raises:
        SystemExit: the directory holds a run of other settings.
    """
    finished, begun = directory / FILE_NAME, directory / CHECKPOINT
    for path in (path for path in (finished, begun) if path.exists()):
        found = Config.from_dict(read(path).config) if path == finished else read_config(path)
        if not agrees(found, config, any_length=minutes is not None):
            raise SystemExit(f"{path} has other settings than {name} has now; remove {directory} to distil it anew")
        config = found
    if finished.exists():
        return read(finished)
    if not begun.exists() and minutes is not None:
        steps = steps_for(config, data, 60 * minutes)
        config = replace(config, outer_steps=min(steps, most or steps))
    print(f"{name}: {config.outer_steps} outer steps", flush=True)
    try:
        return Shown(directory, Distiller(config, data), resume=begun.exists()).run()
    except InterruptedRunError as stopped:
        raise SystemExit(f"{name}: {stopped}; the same command goes on from there") from None


@dataclass(frozen=True)
class Command:
    """What is done with rows and sets.

    Attributes:
        place: where they are kept.
        device: that computes.
        threads: of a CPU.
        networks: fresh ones that a set is measured with.
        quick: everything in little.
    """

    place: Place
    device: str = "cpu"
    threads: int = 1
    networks: int = NETWORKS
    quick: bool = False

    def config(self, name: str) -> Config:
        """Of a row."""
        config = row_of(name).config_on(self.device)
        return replace(config, **QUICK, epochs=min(config.epochs, QUICK_EPOCHS)) if self.quick else config

    def data(self, dataset: str, data_dir: Path) -> Dataset:
        """Of a row or a baseline."""
        data = load(dataset, data_dir)
        if not self.quick:
            return data
        x, y = some(data.x_test, data.y_test, QUICK_IMAGES)
        held_x, held_y = some(data.x_validation, data.y_validation, QUICK_IMAGES)
        return replace(data, x_test=x, y_test=y, x_validation=held_x, y_validation=held_y, rows_test=np.arange(len(y)))

    def distil(self, name: str, data: Dataset, minutes: float | None) -> None:
        """A row, measured on the networks that it is for."""
        kept_as = name + (CUDA if self.device != "cpu" else "")
        directory = self.place.directory(kept_as, minutes)
        artifact = distilled(
            kept_as, self.config(name), data, directory, minutes, QUICK["outer_steps"] if self.quick else None
        )
        found = {
            "config": artifact.config,
            "minutes": minutes,
            "seconds": read_metrics(directory / METRICS)[-1]["seconds"],
            "numbers": artifact.numbers,
            "machine": machine(self.device, self.threads),
            "versions": versions(),
        }
        self.place.keep(kept_as, found, artifact, directory)
        self.measure(kept_as, data, row_of(name).made_for)

    def measure(self, name: str, data: Dataset, networks: tuple[str, ...] = (), again: bool = False) -> None:
        """A set on these networks, or on all that it is for; those that it was measured on are left out."""
        accepted = COLUMNS if name in BASELINES else row_of(name).networks or COLUMNS
        known = () if again else tuple(self.place.kept.read()["cells"].get(name, {}))
        for network in (each for each in accepted if each in (networks or accepted) and each not in known):
            found = self.cell(name, network, data)
            self.place.kept.cell(name, network, found)
            print(f"{name}: {network} {found['mean']:.2%} +- {found['std']:.2%}", flush=True)

    def cell(self, name: str, network: str, data: Dataset) -> dict[str, Any]:
        """What a network reaches on a set."""
        if name in BASELINES:
            return baseline_cell(BASELINES[name], data, network, self.device, self.networks)
        row = row_of(name)
        schedules, own = RAW if self.quick else row.schedules, network in row.made_for
        return distilled_cell(self.place.artifact(name), schedules, data, network, own, self.device, self.networks)


def dataset_of(name: str) -> str:
    """Of a row, a baseline, or what is besides."""
    if name in BASELINES:
        return BASELINES[name].dataset
    return "mnist" if name in BESIDES else row_of(name).config.dataset


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _joined(lists: list[list[str]] | None) -> list[str]:
    return list(dict.fromkeys(itertools.chain(*(lists or []))))


def main() -> None:
    """The command."""
    parser = arguments_of(__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path(DATA_DIR))
    parser.add_argument("--only", nargs="+", type=_names, help="names, with spaces or commas; by default all")
    parser.add_argument("--minutes", type=float, help="of distilling, for all rows together, which share them evenly")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measure", action="store_true", help="distil nothing; measure what has not been measured")
    parser.add_argument("--networks", nargs="+", type=_names, help="with --measure: on these alone")
    parser.add_argument("--count", type=int, help=f"fresh networks that a set is measured with; by default {NETWORKS}")
    parser.add_argument("--again", action="store_true", help="with --measure: what has been measured, too")
    parser.add_argument("--out", type=Path, help="keep everything in this directory")
    parser.add_argument("--take", type=Path, metavar="DIR", help="take in what --out DIR kept, and do nothing else")
    options = parser.parse_args()
    if options.quick and not options.out:
        options.out = RUNS / "quick"
        shutil.rmtree(options.out, ignore_errors=True)
    place = Place.at(options.out)
    if options.take:
        take(options.take, place)
        return
    kept = place.kept.read()["rows"]
    accepted = [*BASELINES, *ROWS, *(n for n in kept if n not in ROWS)] if options.measure else [*ROWS, *BESIDES]
    usual = [*BASELINES, *kept] if options.measure else accepted
    only = _joined(options.only) or usual
    unknown = [name for name in only if name not in accepted]
    if unknown:
        parser.error(f"--only has {', '.join(unknown)}; accepted are {', '.join(accepted)}")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes}; accepted is a number above 0")
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}; accepted is a number of at least 1")
    networks = _joined(options.networks)
    unknown = [name for name in networks if name not in COLUMNS]
    if unknown:
        parser.error(f"--networks has {', '.join(unknown)}; accepted are {', '.join(COLUMNS)}")
    if options.count is not None and options.count < 2:
        parser.error(f"--count is {options.count}; accepted is a number of at least 2")
    count = options.count or (QUICK_NETWORKS if options.quick else NETWORKS)
    torch.set_num_threads(options.threads)
    command = Command(place, options.device, options.threads, count, options.quick)
    rows = [name for name in only if name in ROWS]
    share = None if options.minutes is None else options.minutes / max(1, len(rows))
    loaded: dict[str, Dataset] = {}
    for name in only:
        dataset = dataset_of(name)
        if dataset not in loaded:
            loaded[dataset] = command.data(dataset, options.data_dir)
        data = loaded[dataset]
        if options.measure:
            command.measure(name, data, tuple(networks), options.again)
        elif name in BESIDES:
            place.kept.beside(name, BESIDES[name](data, options.quick))
        else:
            command.distil(name, data, share)


if __name__ == "__main__":
    main()
