"""A hundred thousand steps of the MLP: seconds, memory, and the bytes of its history, which is kept on the host.

    python -m gpu.long --device cuda

First 10,000 steps; then as many as there is time for by these, at most 100,000.
"""

from __future__ import annotations

import time
import warnings

import torch
from measuring import PeakMemory
from tasks import KINDS, make

import revdistill as rd
from gpu.apart import apart, left
from gpu.lines import options_of, write
from gpu.place import here, synchronise

TASK, FIRST, STEPS = "mlp", 10_000, 100_000
SHARE = 0.8  # of the time that is left is planned for
PARTS = 10  # of the first length: a longer one is so many of these


def measure(steps: int, name: str) -> float:
    """One line; the seconds that a step took, forward and back."""
    with here(name) as device:
        problem = make(TASK, device=name)
        rates = problem.rates(steps)
        with warnings.catch_warnings(record=True) as caught, PeakMemory(name) as peak:
            warnings.simplefilter("always")
            started = time.perf_counter()
            theta, stats = rd.unroll(
                problem.loss,
                problem.params,
                problem.batches,
                problem.optimizer(rates),
                steps=steps,
                adjoint=rd.Reversible(history="host"),
                compile="graphs",
                return_stats=True,
            )
            synchronise(device)
            halfway = time.perf_counter()
            found = torch.autograd.grad(problem.outer(theta), [problem.batches[0], rates])
            synchronise(device)
            ended = time.perf_counter()
        write(
            "long",
            task=TASK,
            title=KINDS[TASK].title,
            steps=steps,
            parameters=stats.parameters,
            seconds_forward=halfway - started,
            seconds_back=ended - halfway,
            peak_bytes=peak.nbytes,
            state_bytes=stats.state_bytes,
            history_bytes=stats.history_bytes,
            bits_per_parameter_step=stats.history_bits_per_parameter_step,
            amplification=stats.amplification,
            finite=all(bool(g.isfinite().all()) for g in found),
            compile_warnings=[str(w.message) for w in caught if issubclass(w.category, rd.CompileWarning)],
        )
    return (ended - started) / steps


def both(first: int, most: int, name: str) -> None:
    """The first length, then the longest there is time for."""
    per_step = measure(first, name)
    part = first // PARTS
    steps = min(most, int(SHARE * left() / per_step) // part * part)
    if steps > first:
        measure(steps, name)
    else:
        write("long", task=TASK, skipped=f"{most:,} steps: no time was left, at {1e3 * per_step:.1f} ms a step")


def main() -> None:
    """The command."""
    parser = options_of(__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="the longer of the two")
    options = parser.parse_args()
    if options.device == "standin":
        write("long", skipped="the stand-in's memory is the CPU's")
        return
    first, most = (30, 60) if options.quick else (FIRST, options.steps)
    apart("long", both, first, most, options.device, task=TASK)


if __name__ == "__main__":
    main()
