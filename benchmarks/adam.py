"""Adam in reverse beside plain autograd through Adam: time, memory, bits, and how far the hypergradients are apart.

Time: per inner step at T = 100, the methods taking turns in processes of their own, as ratios of each round. Memory:
the rise of one hypergradient's peak above what was there before, each in a fresh process. Bits: T = 10,000 steps there
and back.

    python benchmarks/adam.py     about eight minutes on a CPU

Writes results/adam.json; `python benchmarks/report.py` makes the tables of it.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import MIB, Worker, arguments_of, disagreement, machine, save, versions
from methods import ADAM_METHODS, BETAS
from tasks import KINDS, make

import revdistill as rd

BASE = "adam-autograd"
TASKS = ("tiny", "mlp", "lenet")
STEPS, CHECK_STEPS, BIT_STEPS = 100, 20, 10_000
MEMORY_STEPS = {
    "adam-autograd": (10, 100, 1_000),
    "adam-reversible": (10, 100, 1_000, 10_000),
    "adam-storeall": (10, 100, 1_000),
}
WARM_UP = 3


def speed(task: str, rounds: int, device: str) -> dict[str, Any]:
    """All methods on one task, and their relative differences from plain autograd in float64."""
    workers = {name: Worker(task, name, device, 1) for name in ADAM_METHODS}
    apart = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.npy" for name in workers}
        for name, worker in workers.items():
            worker.ask(do="check", steps=CHECK_STEPS, dtype="float64", path=str(paths[name]))
            apart[name] = disagreement(paths[name], paths[BASE])
    times: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(rounds + 1):  # the first warms up
        for name, worker in workers.items():
            seconds = worker.ask(do="time", steps=STEPS)["seconds"]
            if turn:
                times[name].append(seconds)
    for worker in workers.values():
        worker.close()
    rows = []
    for name, seconds in times.items():
        ratio = median(mine / base for mine, base in zip(seconds, times[BASE], strict=True))
        rows.append(
            {
                "method": name,
                "ms_per_step": 1e3 * median(seconds) / STEPS,
                "ratio_to_autograd": ratio,
                "disagreement": apart[name],
            }
        )
        print(
            f"{task} {name}: {rows[-1]['ms_per_step']:.3f} ms/step, {ratio:.2f}, off by {apart[name]:.0e}", flush=True
        )
    return {"task": task, "title": KINDS[task].title, "steps": STEPS, "rounds": rounds, "methods": rows}


def memory(task: str, device: str) -> list[dict[str, Any]]:
    """[{method, steps, bytes}] on one task."""
    rows = []
    for name, horizons in MEMORY_STEPS.items():
        for steps in horizons:
            worker = Worker(task, name, device, 1)
            worker.ask(do="time", steps=WARM_UP)
            nbytes = worker.ask(do="memory", steps=steps)["bytes"]
            worker.close()
            rows.append({"method": name, "steps": steps, "bytes": nbytes})
            print(f"{task} {name} {steps}: {nbytes / MIB:.1f} MiB", flush=True)
    return rows


def bits(device: str) -> dict[str, Any]:
    """What T = 10,000 steps of the tiny networks spill; the way back raises unless every bit returns."""
    task, started = make("tiny", device=device), time.perf_counter()
    optimizer = rd.Adam(task.rates(BIT_STEPS) / 10, BETAS)
    theta, stats = rd.unroll(
        task.loss,
        task.params,
        task.batches,
        optimizer,
        steps=BIT_STEPS,
        adjoint=rd.Reversible(graph_bytes=0),
        return_stats=True,
    )
    torch.autograd.grad(task.outer(theta), task.batches[0])
    kept, ideal = stats.history_bits_per_parameter_step, -sum(map(math.log2, BETAS))
    print(f"bits: {kept:.4f}, bound {ideal:.4f}", flush=True)
    return {"steps": BIT_STEPS, "kept": kept, "ideal": ideal, "seconds": time.perf_counter() - started}


def main() -> None:
    """The command."""
    parser = arguments_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results = {
        "machine": machine(options.device, 1),
        "versions": versions(),
        "bits": bits(options.device),
        "memory": {"task": "mlp", "title": KINDS["mlp"].title, "rows": memory("mlp", options.device)},
        "speed": [speed(task, options.rounds, options.device) for task in TASKS],
    }
    save("adam", results, options.device)


if __name__ == "__main__":
    main()
