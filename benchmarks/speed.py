"""How long does one hypergradient take, per inner step, and how many plain training steps is that?

Every method runs in a process of its own, warmed up; the methods take turns, and each round gives a ratio to plain
autograd. Before anything is timed, each method's hypergradient is compared with plain autograd's (float64; compiled
methods float32).

    python benchmarks/speed.py                    the small tasks on one core, T = 100: about 25 minutes
    python benchmarks/speed.py --tasks tiny mlp   some of them
    python benchmarks/speed.py --device cuda      all tasks on a GPU

Writes results/speed.json (or speed-cuda.json); `python benchmarks/report.py` makes tables and pictures of it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import Worker, chosen_tasks, disagreement, load, machine, save, task_arguments_of, versions
from methods import METHODS
from tasks import KINDS

CHECK_STEPS = 8
TOLERANCE = {"float64": 1e-8, "float32": 2e-3}
# steps on the CPU where 100 would take too long for a benchmark
FEWER_STEPS = {"resnet18": 2, "transformer": 10}
TARGETS = {"tiny": (1.2, 0.35), "mlp": (1.2, 0.8), "lenet": (1.15, 1.05), "convnet": (1.0, 0.75)}


def compare(task: str, steps: int, rounds: int, device: str, threads: int, only: list[str] | None) -> dict[str, Any]:
    """All methods on one task."""
    reasons = {name: method.missing() for name, method in METHODS.items()}
    chosen = [
        name for name, reason in reasons.items() if not reason and (not only or name in only or name == "autograd")
    ]
    skipped: dict[str, str] = {name: reason for name, reason in reasons.items() if reason}
    workers = {name: Worker(task, name, device, threads) for name in chosen}
    agreement = check(task, min(CHECK_STEPS, steps), workers, skipped)
    times: dict[str, list[float]] = {name: [] for name in workers if name not in skipped}
    for turn in range(rounds + 1):  # the first warms up
        for name in list(times):
            answer = workers[name].ask(do="time", steps=steps)
            if "error" in answer:
                skipped[name] = answer["error"]
                del times[name]
            elif turn:
                times[name].append(answer["seconds"])
    for worker in workers.values():
        worker.close()
    rows = []
    for name, seconds in times.items():
        ratios = [mine / base for mine, base in zip(seconds, times["autograd"], strict=True)]
        training = (
            [mine / base for mine, base in zip(seconds, times["training"], strict=True)] if "training" in times else []
        )
        rows.append(
            {
                "method": name,
                "ms_per_step": 1e3 * median(seconds) / steps,
                "ratio_to_autograd": median(ratios),
                "ratio_to_training": median(training) if training else None,
                "seconds": seconds,
                "disagreement": agreement.get(name),
            }
        )
        print(f"{task} {name}: {rows[-1]['ms_per_step']:.3f} ms/step, {rows[-1]['ratio_to_autograd']:.2f}", flush=True)
    for name, reason in skipped.items():
        print(f"{task} {name}: skipped, {reason}", flush=True)
    return {
        "task": task,
        "title": KINDS[task].title,
        "steps": steps,
        "rounds": rounds,
        "methods": rows,
        "skipped": skipped,
    }


def check(task: str, steps: int, workers: dict[str, Worker], skipped: dict[str, str]) -> dict[str, float]:
    """Each method's relative difference from plain autograd; a method that is off goes to `skipped`."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype, tolerance in TOLERANCE.items():
            reference = Path(folder) / f"{dtype}.npy"
            workers["autograd"].ask(do="check", steps=steps, dtype=dtype, path=str(reference))
            for name, worker in workers.items():
                compiles = METHODS[name].compiles
                if name == "training" or compiles != (dtype == "float32"):
                    continue
                path = Path(folder) / f"{name}-{dtype}.npy"
                answer = worker.ask(do="check", steps=steps, dtype=dtype, path=str(path))
                if "error" in answer:
                    skipped[name] = answer["error"]
                    continue
                found[name] = disagreement(path, reference)
                if not found[name] <= tolerance:
                    skipped[name] = f"its hypergradient differs from plain autograd's by {found[name]:.1e} of its norm"
    return found


def integer_work(parameters: int = 100_000, rounds: int = 50) -> dict[str, Any]:
    """ns per parameter of one step's fixed-point work, forward and back: decay, kick, drift, float, and their
    inverses.
    """
    from revdistill.engine.integers.fixedpoint import FixedPoint
    from revdistill.engine.integers.loops import LOOPS
    from revdistill.engine.integers.radix import COARSE

    torch.set_num_threads(1)
    draw, fixed, n = torch.Generator().manual_seed(0), FixedPoint(), COARSE.quantise(0.9)
    theta = fixed.from_float(torch.randn(parameters, generator=draw))
    v, head = torch.zeros_like(theta), torch.randint(0, 2**50, (parameters,), generator=draw)
    gradient, out = torch.randn(parameters, generator=draw), torch.empty(parameters)
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        LOOPS.multiply(v, head, n, COARSE)
        LOOPS.add(v, gradient, fixed.scale, 1)
        LOOPS.add(theta, v, -0.01, 1)
        LOOPS.to_float(theta, out, fixed)
        LOOPS.add(theta, v, -0.01, -1)
        LOOPS.to_float(theta, out, fixed)
        LOOPS.add(v, gradient, fixed.scale, -1)
        LOOPS.divide(v, head, n, COARSE)
        seconds.append(time.perf_counter() - started)
    return {"parameters": parameters, "ns_per_parameter": 1e9 * median(seconds[1:]) / parameters}


def main() -> None:
    """The command."""
    parser = task_arguments_of(__doc__)
    parser.add_argument("--steps", type=int, help="T; default 100, fewer where that would take too long")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    kept = {
        entry["task"]: entry for entry in (load("speed", options.device) or {"tasks": []})["tasks"] if options.tasks
    }
    for task in chosen_tasks(options):
        steps = options.steps or (FEWER_STEPS.get(task, 100) if on_cpu else 100)
        rounds = min(options.rounds, 2) if task in ("convnet", *FEWER_STEPS) else options.rounds
        kept[task] = compare(task, steps, rounds, options.device, options.threads, options.methods)
        ordered = [kept[t] for t in KINDS if t in kept]
        results = {
            "machine": machine(options.device, options.threads),
            "versions": versions(),
            "tasks": ordered,
            "integer_work": integer_work() if on_cpu else None,
            "targets": TARGETS,
        }
        save("speed", results, options.device)  # after each task: a long run that is killed has not been for nothing


if __name__ == "__main__":
    main()
