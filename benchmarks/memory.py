"""How much memory does one hypergradient need above what was there before, against the number of steps T?

Each figure is measured in a fresh process: warmed up with three steps, what is free given back, then the peak of the
whole run. A run is left out where a straight line through the shorter runs says that it would pass --most-bytes or
--most-seconds; the longest unroll that fits in 1, 4 and 16 GB is found on that line too, and for 1 GB run where the
time allows.

    python benchmarks/memory.py                the small tasks on a CPU: about 30 minutes
    python benchmarks/memory.py --tasks mlp    one of them
    python benchmarks/memory.py --device cuda  all tasks on a GPU

Writes results/memory.json (or memory-cuda.json); `python benchmarks/report.py` makes tables and pictures of it.
"""

from __future__ import annotations

from typing import Any

from measuring import MIB, Worker, chosen_tasks, load, machine, save, task_arguments_of, versions
from methods import METHODS
from tasks import KINDS

STEPS = (10, 100, 1_000, 10_000)
BUDGETS = (1, 4, 16)  # GB
WARM_UP = 3
# what the picture shows on every task; the others, on the MLP
EVERYWHERE = ("reversible", "reversible-default", "storeall", "checkpoint", "autograd")
SKIPPED = ("training", "autograd-compiled", "reversible-compiled", "storeall-compiled")


def measure(task: str, method: str, steps: int, device: str, threads: int) -> dict[str, Any]:
    """{"bytes", "seconds"} of one run in its own process, or {"error"}."""
    worker = Worker(task, method, device, threads)
    try:
        answer = worker.ask(do="time", steps=WARM_UP)
        return answer if "error" in answer else worker.ask(do="memory", steps=steps)
    finally:
        worker.close()


def rise(task: str, method: str, options: Any) -> dict[str, Any]:
    """One method's memory over all T that it can be run at."""
    missing = METHODS[method].missing()
    if missing:
        return {"method": method, "runs": [], "skipped": missing}
    runs: list[dict[str, Any]] = []
    skipped = None
    for steps in STEPS:
        if runs:
            factor = steps / runs[-1]["steps"]
            if runs[-1]["seconds"] * factor > options.most_seconds:
                skipped = f"{steps} steps would take about {runs[-1]['seconds'] * factor:.0f} s"
                break
            if predicted(runs, steps) > options.most_bytes:
                skipped = f"{steps} steps would need about {predicted(runs, steps) / 1e9:.0f} GB"
                break
        answer = measure(task, method, steps, options.device, options.threads)
        if "error" in answer:
            skipped = answer["error"]
            break
        runs.append({"steps": steps, **answer})
        print(f"{task} {method} {steps}: {answer['bytes'] / MIB:.1f} MiB, {answer['seconds']:.1f} s", flush=True)
    if skipped:
        print(f"{task} {method}: stopped, {skipped}", flush=True)
    return {"method": method, "runs": runs, "skipped": skipped, "longest": longest(task, method, runs, options)}


def line(runs: list[dict[str, Any]]) -> tuple[float, float]:
    """(bytes at 0 steps, bytes per step) through the two longest runs."""
    if len(runs) == 1:
        return 0.0, runs[0]["bytes"] / runs[0]["steps"]
    a, b = runs[-2:]
    slope = max(0.0, (b["bytes"] - a["bytes"]) / (b["steps"] - a["steps"]))
    return b["bytes"] - slope * b["steps"], slope


def predicted(runs: list[dict[str, Any]], steps: int) -> float:
    """Bytes at `steps`, on the line."""
    offset, slope = line(runs)
    return offset + slope * steps


def longest(task: str, method: str, runs: list[dict[str, Any]], options: Any) -> list[dict[str, Any]]:
    """The longest unroll for each budget: {"gigabytes", "steps", "measured"}; steps None where memory does not rise."""
    if not runs:
        return []
    offset, slope = line(runs)
    per_step = runs[-1]["seconds"] / runs[-1]["steps"]
    found = []
    for gigabytes in BUDGETS:
        steps = int((gigabytes * 1e9 - offset) / slope) if slope else None
        measured = None
        if (
            steps
            and gigabytes * 1e9 <= options.most_bytes
            and steps * per_step < options.most_seconds
            and gigabytes == 1
        ):
            steps = int(0.98 * steps)
            answer = measure(task, method, steps, options.device, options.threads)
            measured = answer.get("bytes")
            print(f"{task} {method} {steps}: {(measured or 0) / MIB:.1f} MiB, for {gigabytes} GB", flush=True)
        found.append({"gigabytes": gigabytes, "steps": steps, "measured_bytes": measured})
    return found


def main() -> None:
    """The command."""
    parser = task_arguments_of(__doc__)
    parser.add_argument("--most-bytes", type=float, default=4e9)
    parser.add_argument("--most-seconds", type=float, default=150)
    options = parser.parse_args()
    kept = {entry["task"]: entry for entry in (load("memory", options.device) or {"tasks": []})["tasks"]}
    for task in chosen_tasks(options):
        everything = [name for name in METHODS if name not in SKIPPED]
        methods = options.methods or (everything if task == "mlp" else EVERYWHERE)
        kept[task] = {
            "task": task,
            "title": KINDS[task].title,
            "methods": [rise(task, name, options) for name in methods],
        }
        results = {
            "machine": machine(options.device, options.threads),
            "versions": versions(),
            "tasks": [kept[t] for t in KINDS if t in kept],
        }
        save("memory", results, options.device)


if __name__ == "__main__":
    main()
