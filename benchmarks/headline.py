"""What does a user get in the first ten minutes: exactness, bits, memory against the number of steps, and the default run?

Writes results/headline.json and the pictures that the README shows, and puts the figures into the README. Each measurement of
memory is made in a process of its own; the hypergradients of the methods are compared before anything is reported.

    python benchmarks/headline.py            all of it, about ten minutes
    python benchmarks/headline.py --readme   only write the README's figures again from the JSON
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import revdistill as rd
from revdistill.engine.bitstore import RADIX, quantise
from revdistill.engine.selfcheck import checks

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE.parent / "README.md"
MOMENTUM = 0.9
# naive autograd keeps every step's graph: 10,000 steps of it would need some 13 GB
STEPS = {"Reversible": (10, 100, 1_000, 10_000), "Backprop": (10, 100, 1_000)}


def peak_rss() -> int:
    """Bytes, of this process since it started (Linux). Not getrusage, which counts the parent's before exec."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def processor() -> str:
    """The processor's name where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def hypergradient(method: str, steps: int) -> tuple[torch.Tensor, rd.UnrollStats]:
    """MLP 784-100-100-10, batch 100, float32: dL/dlr of one unroll."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(784, 100), torch.nn.Tanh(), torch.nn.Linear(100, 100), torch.nn.Tanh(), torch.nn.Linear(100, 10)
    )
    loss, params = rd.from_module(net, torch.nn.functional.cross_entropy)
    x, y = torch.randn(10, 100, 784).requires_grad_(), torch.arange(1000).reshape(10, 100) % 10
    lr = torch.full((steps,), 0.01, requires_grad=True)
    adjoint = getattr(rd, method)()
    theta, stats = rd.unroll(loss, params, (x, y), rd.SGD(lr, MOMENTUM), steps=steps, adjoint=adjoint, return_stats=True)
    outer = torch.stack([p.square().sum() for p in theta.values()]).sum()
    (gradient,) = torch.autograd.grad(outer, lr)
    return gradient, stats


def speed(steps: int = 100, rounds: int = 9) -> dict[str, Any]:
    """Seconds of one hypergradient, the methods in turn in one process; medians, and the median of the ratios."""
    seconds: dict[str, list[float]] = {"Reversible": [], "Backprop": []}
    for _ in range(rounds + 1):
        for method, times in seconds.items():
            started = time.perf_counter()
            hypergradient(method, steps)
            times.append(time.perf_counter() - started)
    warm = {method: times[1:] for method, times in seconds.items()}
    ratios = [a / b for a, b in zip(warm["Reversible"], warm["Backprop"], strict=True)]
    return {"steps": steps, "seconds": {m: median(t) for m, t in warm.items()}, "ratio": median(ratios)}


def measure(method: str, steps: int) -> dict[str, Any]:
    """In this process: extra peak memory over a warm start."""
    hypergradient(method, 3)
    before = peak_rss()
    gradient, stats = hypergradient(method, steps)
    return {
        "method": method,
        "steps": steps,
        "peak_bytes": peak_rss() - before,
        "history_bytes": stats.history_bytes,
        "parameters": stats.parameters,
        "gradient_norm": float(gradient.norm()),
    }


def in_own_process(method: str, steps: int) -> dict[str, Any]:
    """`measure`, in a fresh process."""
    command = [sys.executable, __file__, "--measure", method, str(steps)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{method} {steps}: {found['peak_bytes'] / 2**20:.1f} MiB", flush=True)
    return found


def default_run() -> dict[str, Any]:
    """The README's first command, and its pictures."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "revdistill.cli", "train", "--steps", "30", "--epochs", "3"]
        subprocess.run(command, check=True, cwd=folder)
        seconds = time.perf_counter() - started
        run = Path(folder) / "runs/digits"
        from revdistill.distill.artifact import read

        evaluation = read(run / "distilled.h5").evaluation
        shutil.copy(run / "plots/images.png", RESULTS / "digits.png")
    return {"command": "revdistill train --steps 30 --epochs 3", "seconds": seconds, "evaluation": evaluation}


def run_all() -> dict[str, Any]:
    """Every measurement."""
    verified = [c.__dict__ for c in checks(torch.device("cpu"))]
    memory = [in_own_process(method, steps) for method, all_steps in STEPS.items() for steps in all_steps]
    norms = {(m["method"], m["steps"]): m["gradient_norm"] for m in memory}
    for (method, steps), norm in norms.items():
        # float32 against float32, through up to 1,000 steps of a smooth network
        if ("Backprop", steps) in norms and abs(norm / norms["Backprop", steps] - 1) > 1e-2:
            raise SystemExit(f"{method} disagrees with autograd at {steps} steps: {norm} against {norms['Backprop', steps]}")
    return {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
        },
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "revdistill": rd.__version__},
        "verify": verified,
        "memory": memory,
        "speed": speed(),
        "ideal_bits": math.log2(RADIX / quantise(MOMENTUM)),
        "default_run": default_run(),
    }


def picture(results: dict[str, Any]) -> None:
    """Extra peak memory against the number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for method, label in (("Backprop", "plain autograd"), ("Reversible", "revdistill")):
        rows = [m for m in results["memory"] if m["method"] == method]
        ax.loglog([m["steps"] for m in rows], [m["peak_bytes"] / 2**20 for m in rows], marker="o", label=label)
    ax.set_xlabel("training steps differentiated through")
    ax.set_ylabel("extra peak memory, MiB")
    ax.set_title("one hypergradient, MLP 784-100-100-10, batch 100", fontsize=10)
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    figure.savefig(RESULTS / "memory.png", dpi=130)


def readme_block(results: dict[str, Any]) -> str:
    """The README's figures, from the JSON."""
    machine, versions, run = results["machine"], results["versions"], results["default_run"]
    (name, evaluation), *_ = run["evaluation"].items()
    speed = results["speed"]
    gradients = [c for c in results["verify"] if c["kind"] == "gradients"]
    worst = max(float(c["found"].split()[-1]) for c in gradients)
    bits = next(c["found"] for c in results["verify"] if c["name"] == f"momentum {MOMENTUM}")
    lines = [
        f"Measured by `python benchmarks/headline.py` on {machine['cores']} cores ({machine['processor']}), "
        f"torch {versions['torch']}:",
        "",
        f"- `{run['command']}`: {evaluation['mean']:.1%} +- {evaluation['std']:.1%} test accuracy, {name}, "
        f"{evaluation['restarts']} fresh networks, in {run['seconds']:.0f} s.",
        f"- Hypergradients against float64 autograd: worst relative error {worst:.1e} ({len(gradients)} combinations).",
        f"- Bit store at momentum {MOMENTUM}, 10,000 steps: {bits}.",
        f"- One hypergradient, MLP 784-100-100-10, batch 100, {speed['steps']} steps, eager: {speed['ratio']:.1f} times the "
        f"time of plain autograd ({speed['seconds']['Reversible']:.2f} s, median). Its extra peak memory:",
        "",
        "| steps | revdistill | plain autograd |",
        "|---|---|---|",
    ]
    by = {(m["method"], m["steps"]): m for m in results["memory"]}
    for steps in STEPS["Reversible"]:
        mine, naive = by["Reversible", steps], by.get(("Backprop", steps))
        other = f"{naive['peak_bytes'] / 2**20:.0f} MiB" if naive else "not run"
        lines.append(f"| {steps:,} | {mine['peak_bytes'] / 2**20:.0f} MiB | {other} |")
    return "\n".join(lines)


def write_readme(results: dict[str, Any]) -> None:
    """Put the figures between the README's markers."""
    text = README.read_text()
    begin, end = "<!-- headline: written by benchmarks/headline.py -->\n", "\n<!-- /headline -->"
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    README.write_text(head + begin + readme_block(results) + end + tail)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="only write the README's figures again")
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], int(arguments.measure[1]))))
        return
    path = RESULTS / "headline.json"
    if not arguments.readme:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(run_all(), indent=1) + "\n")
    results = json.loads(path.read_text())
    picture(results)
    write_readme(results)


if __name__ == "__main__":
    main()
