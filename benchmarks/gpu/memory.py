"""How much memory does one hypergradient need above what was there, against the number of steps?  python -m gpu.memory

Each method and task in a process of its own, all at once; lengths one after the other. Running out of memory is a
result.
"""

from __future__ import annotations

import subprocess
import sys
import time

from measuring import PeakMemory
from methods import METHODS
from tasks import make

from gpu.lines import attempt, options_of, write
from gpu.place import here, synchronise

TASKS, NAMES, STEPS, WARM_UP = (
    ("mlp", "lenet"),
    ("reversible", "reversible-replayed", "autograd"),
    (100, 1_000, 5_000),
    3,
)


def one(task: str, method: str, lengths: tuple[int, ...], name: str) -> None:
    """The lines of one method on one task, in this process."""
    with here(name) as device:
        problem, run = make(task, device=name), METHODS[method].run
        run(problem, WARM_UP)
        for steps in lengths:
            with attempt("memory", task=task, method=method, steps=steps):
                started = time.perf_counter()
                with PeakMemory(name) as peak:
                    run(problem, steps)
                    synchronise(device)
                seconds = time.perf_counter() - started
                write("memory", task=task, method=method, steps=steps, bytes=peak.nbytes, seconds=seconds)


def main() -> None:
    """The command."""
    parser = options_of(__doc__)
    parser.add_argument("--one", nargs=2, metavar=("TASK", "METHOD"), help="in this process")
    options = parser.parse_args()
    if options.device == "standin":
        write("memory", skipped="the stand-in's memory is the CPU's")
        return
    if options.one:
        task, method = options.one
        with attempt("memory", task=task, method=method):
            one(task, method, (10, 20) if options.quick else STEPS, options.device)
        return
    tasks = TASKS[:1] if options.quick else TASKS
    processes = {
        (task, method): subprocess.Popen([sys.executable, "-m", "gpu.memory", *sys.argv[1:], "--one", task, method])
        for task in tasks
        for method in NAMES
    }
    for (task, method), process in processes.items():
        code = process.wait()
        if code:
            write("memory", task=task, method=method, error=f"the process ended with exit code {code}")


if __name__ == "__main__":
    main()
