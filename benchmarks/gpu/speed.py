"""How long does one hypergradient take per step, against plain autograd?  python -m gpu.speed --device cuda

The methods take turns, each round gives a ratio; medians are told. Each method's hypergradient over a few steps is
compared with plain autograd's, in float64 (compiled ones in float32). Replayed steps must have eager's bits, in theta
and in the hypergradient. What a method needs once, on its first call (a capture), is told apart. Each task is measured
in a process of its own, then what torch.compile makes of plain autograd, which may take a minute to find out.
"""

from __future__ import annotations

import warnings
from statistics import median
from typing import Any

import torch
from methods import METHODS
from tasks import KINDS, Task, make
from torch import Tensor

import revdistill as rd
from gpu.apart import apart, left
from gpu.lines import attempt, in_words, options_of, write
from gpu.place import here, milliseconds
from revdistill.engine.loss.determinism import repeatable

# plain autograd is a loop in the manner of `higher`, too: each step calls the module with a dict of tensors
NAMES = ("autograd", "reversible", "reversible-default", "reversible-replayed")
COMPILED = ("autograd", "autograd-compiled")
TASKS = ("mlp", "lenet", "convnet", "tiny")
CHECK_STEPS, STEPS, ROUNDS = 10, 100, 3
COMPILING = 60.0  # seconds, for the two rows of one task
EAGER = rd.Reversible(graph_bytes=0)


def flat(tensors: Any) -> Tensor:
    """All of them in one, float64."""
    return torch.cat([t.detach().reshape(-1).double() for t in tensors if t is not None])


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as a share of what is expected."""
    return float((found - expected).norm() / expected.norm())


def disagreements(task: Task, label: str, names: tuple[str, ...]) -> dict[str, float]:
    """Each method's relative difference from plain autograd's hypergradient; none of those that fail."""
    found = {}
    for name in names:
        with attempt("speed", task=label, method=name, what="difference from autograd"):
            found[name] = flat(METHODS[name].run(task, CHECK_STEPS))
    return {name: relative(g, found["autograd"]) for name, g in found.items()}


def first_call(name: str, problem: Task, steps: int, device: torch.device) -> dict[str, Any]:
    """What it took, in seconds, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seconds = milliseconds(lambda: METHODS[name].run(problem, steps), device) / 1e3
    told = [str(w.message) for w in caught if issubclass(w.category, rd.CompileWarning)]
    return {"first_call_seconds": seconds, "compile_warnings": told}


def compare(task: str, steps: int, rounds: int, names: tuple[str, ...], device: torch.device) -> dict[str, Any]:
    """Every method's times on one task, float32; instead of these the error of one that fails."""
    problem = make(task, device=str(device))
    compiles = any(METHODS[name].compiles for name in names)  # not twice, for another dtype
    dtype = torch.float32 if compiles else torch.float64
    checked = problem if compiles else make(task, dtype=dtype, device=str(device))
    once: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for turn in range(rounds + 1):  # the first warms up
        for name in names:
            if name in failed:
                continue
            try:
                if turn:
                    times[name].append(milliseconds(lambda name=name: METHODS[name].run(problem, steps), device))  # type: ignore[misc]
                else:
                    once[name] = first_call(name, problem, steps, device)
            except Exception as error:  # a method's failure is a result, and the others go on
                failed[name] = in_words(error)
    off = disagreements(checked, task, names)
    rows: list[dict[str, Any]] = [
        {
            "method": name,
            "ms_per_step": median(times[name]) / steps,
            "ratio_to_autograd": median(mine / base for mine, base in zip(times[name], times["autograd"], strict=True)),
            "milliseconds": times[name],
            "disagreement": off.get(name),
            "disagreement_dtype": str(dtype).removeprefix("torch."),
            **once[name],
        }
        for name in names
        if name not in failed
    ]
    rows += [{"method": name, "error": error} for name, error in failed.items()]
    return {"task": task, "title": KINDS[task].title, "steps": steps, "rounds": rounds, "methods": rows}


def outcome(problem: Task, steps: int, compile: Any) -> tuple[Tensor, Tensor]:
    """(theta at the end, hypergradient), flat."""
    rates = problem.rates(steps)
    optimizer = problem.optimizer(rates)
    theta = rd.unroll(
        problem.loss, problem.params, problem.batches, optimizer, steps=steps, adjoint=EAGER, compile=compile
    )
    with repeatable(rates.device):  # the outer loss too, which is no part of the unroll
        hypergradient = torch.autograd.grad(problem.outer(theta), [problem.batches[0], rates])
    return flat(theta.values()), flat(hypergradient)


def same_bits(task: str, steps: int, device: torch.device) -> dict[str, Any]:
    """Whether replayed steps have eager's bits, and if not how far off they are."""
    problem = make(task, device=str(device))
    theta, hypergradient = outcome(problem, steps, False)
    replayed_theta, replayed = outcome(problem, steps, "graphs")
    return {
        "theta_equal": bool(torch.equal(replayed_theta, theta)),
        "hypergradient_equal": bool(torch.equal(replayed, hypergradient)),
        "theta_differs_by": relative(replayed_theta, theta),
        "hypergradient_differs_by": relative(replayed, hypergradient),
    }


def measure(task: str, steps: int, rounds: int, names: tuple[str, ...], name: str) -> None:
    """The lines of one task on the device of that name."""
    with here(name) as device:
        write("speed", **compare(task, steps, rounds, names, device))
        if "reversible-replayed" in names:
            with attempt("speed", task=task, what="same bits"):
                write("speed", task=task, title=KINDS[task].title, steps=steps, **same_bits(task, steps, device))


def main() -> None:
    """The command."""
    parser = options_of(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    options = parser.parse_args()
    if options.device == "standin":
        write("speed", skipped="the stand-in runs on the CPU, in Python: its times say nothing")
        return
    steps, rounds = (10, 2) if options.quick else (STEPS, ROUNDS)
    tasks = options.tasks or (("mlp", "tiny") if options.quick else TASKS)
    for task in tasks:
        apart("speed", measure, task, steps, rounds, NAMES, options.device, task=task)
    for task in tasks[: 1 if options.quick else 2]:
        if left() > COMPILING / 2:
            what = {"task": task, "method": COMPILED[1]}
            apart("speed", measure, task, steps, rounds, COMPILED, options.device, limit=COMPILING, **what)


if __name__ == "__main__":
    main()
