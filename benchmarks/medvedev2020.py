"""The study "Investigating the data distillation method" (D. Medvedev, 2020), reproduced and beaten.

Two moons, 1005 training points distilled into 320, for three architectures and for all at once; ten restarts, all of
them in one batched unroll. Setting "faithful" follows the talk; "ours" distils better from the same 320 points and as
many passes over the real data.

    python benchmarks/medvedev2020.py                  the talk's tables and figures, both settings: about ten minutes
    on two cores python benchmarks/medvedev2020.py --only datasets  the same study on circles, blobs and digits
    python benchmarks/medvedev2020.py --only momentum  what momentum changes
    python benchmarks/medvedev2020.py --quick          two restarts and few outer steps: whether it runs

Writes results/medvedev2020.json, keeping the parts that were not run; `python benchmarks/report.py` makes tables and
pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from measuring import load as load_results
from measuring import machine, save, versions
from stacked import STUDIED, UNSEEN, Distilled, Job, Protocol, boundary, distil, evaluate, train_on_real

from revdistill.distill.strategies import STRATEGIES
from revdistill.outer.data import Dataset, load

FAITHFUL = Protocol()
# Chosen by restarts with other seeds (from 1000) and 2,000 other test points, not by those of the tables.
OURS = Protocol(
    momentum=0.9,
    rate=0.1,
    start="real",
    outer_rate=0.02,
    rates_share=0.1,
    cosine=True,
    betas=(0.9, 0.999),
    clip=1.0,
    average=0.4,
)
COPIES = 3  # networks of an outer step that distils for one architecture
# Networks of an outer step that distils for all. The one hidden layer is what gets stuck most.
ALL = {"faithful": STUDIED, "ours": ("LinearNet", *("NonLinearNet",) * 3, *("MoreNonLinearNet",) * 2)}
PACE = {"faithful": 1.0, "ours": 0.03}  # of points for one architecture: those that move less serve the others too
MOMENTA = (0.5, 0.9, 0.99)
MAIN = ("faithful", "ours", "original")
GROUPS = {"datasets": ("circles", "blobs", "digits"), "momentum": tuple(f"momentum-{m}" for m in MOMENTA)}
PARTS = (*MAIN, *GROUPS["datasets"], *GROUPS["momentum"])
GRID = 40


def training_data(name: str) -> Dataset:
    """All of it: the study holds nothing out."""
    data = load(name)
    return replace(data, x=torch.cat([data.x, data.x_validation]), y=torch.cat([data.y, data.y_validation]))


def jobs_of(setting: str, data: Dataset, restarts: int) -> dict[str, list[Job]]:
    """By what they are distilled for: each architecture, and all."""
    found = {
        name: [Job(data, (name,) * COPIES, seed=i, pace=PACE[setting]) for i in range(restarts)] for name in STUDIED
    }
    return found | {"all": [Job(data, ALL[setting], seed=i) for i in range(restarts)]}


def cell(setting: str, data: str, schedule: str, test: str, accuracies: torch.Tensor) -> dict[str, Any]:
    """One cell of a table; std of the population, as in the talk."""
    values = [round(float(a), 5) for a in accuracies]
    mean = sum(values) / len(values)
    std = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
    return {
        "setting": setting,
        "data": data,
        "schedule": schedule,
        "test": test,
        "mean": mean,
        "std": std,
        "accuracies": values,
    }


def study(setting: str, data: Dataset, protocol: Protocol, restarts: int, tests: tuple[str, ...]) -> dict[str, Any]:
    """Distil for each architecture and for all, and train every architecture on what came out, along every schedule."""
    groups = jobs_of("ours" if setting == "ours" else "faithful", data, restarts)
    jobs = [job for group in groups.values() for job in group]
    started = time.perf_counter()

    def progress(step: int, total: int, losses: torch.Tensor) -> None:
        if step % 50 == 0 or step == total:
            left = (time.perf_counter() - started) / step * (total - step)
            print(
                f"{setting} {data.name}: {step}/{total}, outer loss {float(losses.mean()):.4f}, {left:.0f} s left",
                flush=True,
            )

    distilled = distil(jobs, protocol, progress=progress)
    seconds = time.perf_counter() - started
    cells = []
    for schedule in STRATEGIES:
        for test in tests:
            found = evaluate(jobs, distilled, schedule, test, protocol.momentum).reshape(len(groups), restarts)
            cells += [cell(setting, name, schedule, test, row) for name, row in zip(groups, found, strict=True)]
    return {"cells": cells, "seconds": seconds, "bits": distilled.bits, "figures": figures(groups, distilled, protocol)}


def figures(groups: dict[str, list[Job]], distilled: Distilled, protocol: Protocol) -> dict[str, Any]:
    """What the talk's figures show: the first restart's points and boundaries (of points in the plane), and the mean
    rates.
    """
    found: dict[str, Any] = {"rates": {}, "points": {}, "boundaries": {}}
    restarts = len(groups["all"])
    for i, (name, group) in enumerate(groups.items()):
        own, first = slice(i * restarts, (i + 1) * restarts), [i * restarts]
        found["rates"][name] = rounded(distilled.rates[:, own].mean(1))
        if distilled.x.shape[-1] != 2 or group[0].data.classes != 2:
            continue
        found["points"][name] = rounded(distilled.x[:, i * restarts], 3)
        one = Distilled(distilled.x[:, first], distilled.y[:, first], distilled.rates[:, first], None)
        for test in [name] if name in STUDIED else STUDIED:
            label = test if name in STUDIED else f"all, {test}"
            found["boundaries"][label] = rounded(boundary(group[:1], one, test, protocol.momentum, GRID), 2)
    return found


def rounded(values: torch.Tensor, digits: int = 4) -> Any:
    """Nested lists of short numbers."""
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: round(float(text), digits))


def original(restarts: int) -> dict[str, Any]:
    """Every architecture trained on the real data, and the real data itself."""
    data = training_data("moons")
    jobs = [Job(data, (), seed=i) for i in range(restarts)]
    started = time.perf_counter()
    cells = [cell("faithful", "original", "raw", test, train_on_real(jobs, test)) for test in (*STUDIED, *UNSEEN)]
    grids = {test: rounded(boundary(jobs[:1], None, test, 0.0, GRID), 2) for test in STUDIED}
    real = {
        "x": rounded(data.x, 3),
        "y": data.y.tolist(),
        "x_test": rounded(data.x_test, 3),
        "y_test": data.y_test.tolist(),
    }
    return {"cells": cells, "seconds": time.perf_counter() - started, "figures": {"boundaries": grids, "real": real}}


def run_part(part: str, restarts: int, quick: bool) -> dict[str, Any]:
    """One part, in this process."""
    torch.set_num_threads(1)
    shorter: dict[str, Any] = {"outer_epochs": 1} if quick else {}
    tests = (*STUDIED, *UNSEEN)
    if part == "original":
        return original(restarts)
    if part in ("faithful", "ours"):
        protocol = FAITHFUL if part == "faithful" else OURS
        return study(part, training_data("moons"), replace(protocol, **shorter), restarts, tests)
    if part in GROUPS["momentum"]:
        protocol = replace(FAITHFUL, momentum=float(part.removeprefix("momentum-")), **shorter)
        return study(part, training_data("moons"), protocol, restarts, STUDIED)
    protocol = replace(OURS, outer_epochs=25, rate=0.05)  # from 0.1 a network of the digits diverges
    if part == "digits":
        protocol = replace(protocol, batches=15, per_class=3)  # 1347 points into 450
    elif part == "blobs":
        protocol = replace(protocol, batches=23)  # 4 classes: 1125 points into 368
    else:
        protocol = replace(protocol, batches=47)  # 1125 points into 376
    return study("ours", training_data(part), replace(protocol, **shorter), min(restarts, 5), tests)


def in_own_process(part: str, restarts: int, quick: bool, folder: Path) -> dict[str, Any]:
    """`run_part` in a process with one thread."""
    path = folder / f"{part}.json"
    command = [sys.executable, __file__, "--part", part, "--part-result", str(path), "--restarts", str(restarts)]
    subprocess.run([*command, *(["--quick"] if quick else [])], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def merge(parts: dict[str, dict[str, Any]], seconds: float, restarts: int) -> dict[str, Any]:
    """The file: the parts just run, and those of an earlier run that were not."""
    before = load_results("medvedev2020") or {"parts": {}, "seconds": None}
    merged = before["parts"] | parts
    settings: dict[str, Any] = {
        name: asdict(protocol) | {"networks": COPIES, "networks_for_all": ALL[name], "pace_for_one": PACE[name]}
        for name, protocol in (("faithful", FAITHFUL), ("ours", OURS))
    }
    main_parts = [merged[p] for p in ("ours", "faithful", "original") if p in merged]
    return {
        "machine": machine("cpu", 1) | {"processes": 2},
        "versions": versions(),
        "seconds": seconds if set(MAIN) <= set(parts) else before["seconds"],
        "settings": settings | {"restarts": restarts},
        "cells": [c for part in main_parts for c in part["cells"]],
        "datasets": {p: merged[p]["cells"] for p in GROUPS["datasets"] if p in merged},
        "parts": merged,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *GROUPS], help="default: faithful, ours and original")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--part-result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    restarts = min(options.restarts, 2) if options.quick else options.restarts
    if options.part:
        options.part_result.write_text(json.dumps(run_part(options.part, restarts, options.quick)))
        return
    chosen = [part for name in options.only or MAIN for part in GROUPS.get(name, (name,))]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        running = {pool.submit(in_own_process, part, restarts, options.quick, Path(folder)): part for part in chosen}
        parts: dict[str, dict[str, Any]] = {}
        for done in as_completed(running):
            parts[running[done]] = done.result()
            print(f"{running[done]}: done after {time.perf_counter() - started:.0f} s", flush=True)
            if not options.quick:  # after each part: a run that is killed has not been for nothing
                save("medvedev2020", merge(parts, time.perf_counter() - started, restarts), indent=None)


if __name__ == "__main__":
    main()
