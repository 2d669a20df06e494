"""compile=True on the MLP: does it hold, what does the first call cost, and what does a step cost then?  python -m
gpu.compile
"""

from __future__ import annotations

import time
import warnings
from statistics import median

import torch
from methods import METHODS
from tasks import KINDS, Task, make
from torch import Tensor

import revdistill as rd
from gpu.lines import attempt, options_of, write
from gpu.place import here, milliseconds, synchronise

NAMES = ("autograd", "reversible", "reversible-compiled")


def theta_of(task: Task, steps: int, compile: bool) -> Tensor:
    """theta at the end, flat."""
    with torch.no_grad():
        theta = rd.unroll(
            task.loss, task.params, task.batches, task.optimizer(task.rates(steps)), steps=steps, compile=compile
        )
    return torch.cat([p.reshape(-1) for p in theta.values()])


def measure(name: str, steps: int, rounds: int, device: torch.device) -> None:
    """First call, equality, times: a line after each, since compiling may outlast the time that is left."""
    task = make(name, device=str(device))
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = None
        try:
            METHODS["reversible-compiled"].run(task, steps)
        except rd.ReversalError as failed:
            error = f"ReversalError: {failed}"
        synchronise(device)
    told = [str(w.message) for w in caught if issubclass(w.category, rd.CompileWarning)]
    others = sorted(
        {
            f"{w.category.__name__}: {str(w.message)[:200]}"
            for w in caught
            if not issubclass(w.category, rd.CompileWarning)
        }
    )
    first = time.perf_counter() - started
    write(
        "compile",
        task=name,
        title=KINDS[name].title,
        steps=steps,
        first_call_seconds=first,
        way_back_exact=error is None,
        reversal_error=error,
        warnings=told,
        other_warnings=others,
    )
    eager, fused = theta_of(task, steps, False), theta_of(task, steps, True)
    off = float(torch.linalg.vector_norm(eager - fused) / torch.linalg.vector_norm(eager))
    write("compile", task=name, steps=steps, theta_equal=bool(torch.equal(eager, fused)), theta_differs_by=off)
    times: dict[str, list[float]] = {method: [] for method in NAMES}
    for turn in range(rounds + 1):  # the first warms up
        for method in NAMES:
            taken = milliseconds(lambda method=method: METHODS[method].run(task, steps), device)  # type: ignore[misc]
            if turn:
                times[method].append(taken / steps)
    write(
        "compile", task=name, steps=steps, rounds=rounds, ms_per_step={m: median(taken) for m, taken in times.items()}
    )


def main() -> None:
    """The command."""
    options = options_of(__doc__).parse_args()
    if options.device == "standin":
        write("compile", skipped="torch compiles nothing for the stand-in")
        return
    with here(options.device) as device, attempt("compile"):
        measure("mlp", *((10, 1) if options.quick else (100, 5)), device=device)


if __name__ == "__main__":
    main()
