"""How long does one hypergradient take per step, against plain autograd?  python -m gpu.speed --device cuda

One process; the methods take turns, each round gives a ratio; medians are told. First each method's hypergradient over
a few steps is compared with plain autograd's, in float64.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from methods import METHODS
from tasks import KINDS, make

from gpu.lines import attempt, options_of, write
from gpu.place import here, milliseconds

NAMES = ("autograd", "reversible", "reversible-default")
TASKS = ("mlp", "lenet", "convnet", "tiny")
CHECK_STEPS = 5


def disagreements(task: str, device: torch.device) -> dict[str, float]:
    """Each method's relative difference from plain autograd's hypergradient, in float64."""
    found = {}
    problem = make(task, dtype=torch.float64, device=str(device))
    for name in NAMES:
        gradients = METHODS[name].run(problem, CHECK_STEPS)
        found[name] = torch.cat([g.detach().reshape(-1) for g in gradients if g is not None])
    expected = found["autograd"]
    return {name: float((g - expected).norm() / expected.norm()) for name, g in found.items()}


def compare(task: str, steps: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Every method's times on one task, float32."""
    off = disagreements(task, device)
    problem = make(task, device=str(device))
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in range(rounds + 1):  # the first warms up
        for name in NAMES:
            taken = milliseconds(lambda name=name: METHODS[name].run(problem, steps), device)  # type: ignore[misc]
            if turn:
                times[name].append(taken)
    rows = [
        {
            "method": name,
            "ms_per_step": median(taken) / steps,
            "ratio_to_autograd": median(mine / base for mine, base in zip(taken, times["autograd"], strict=True)),
            "milliseconds": taken,
            "disagreement": off[name],
        }
        for name, taken in times.items()
    ]
    return {"task": task, "title": KINDS[task].title, "steps": steps, "rounds": rounds, "methods": rows}


def main() -> None:
    """The command."""
    options = options_of(__doc__).parse_args()
    if options.device == "standin":
        write("speed", skipped="the stand-in runs on the CPU, in Python: its times say nothing")
        return
    with here(options.device) as device:
        for task in ("mlp", "tiny") if options.quick else TASKS:
            with attempt("speed", task=task):
                write("speed", **compare(task, *((10, 2) if options.quick else (100, 5)), device=device))


if __name__ == "__main__":
    main()
