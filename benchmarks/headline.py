"""What does a user get in the first ten minutes: is the engine exact on this machine, what does the default run give,
at rest and beside other work, and what does a process's first unroll cost?

    python benchmarks/headline.py     about five minutes

Writes results/headline.json and results/digits.png; `python benchmarks/report.py` puts the figures into the README.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import RESULTS, machine, save, versions

from revdistill.distill.artifact import read
from revdistill.engine.selfcheck import checks

ARGUMENTS = ["train", "--steps", "30", "--epochs", "3"]
ROUNDS = 3  # processes whose first unroll is measured, each way
# In a process of its own: seconds and bytes of torch's first product of a Hessian and a vector, for which it loads
# sympy; then of `import revdistill`, and of the first unroll and way back.
FIRST = """
import json, time, torch

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def cost(work):
    begun, before = time.perf_counter(), resident()
    work()
    return {"seconds": time.perf_counter() - begun, "bytes": resident() - before}

def plain():
    w = torch.ones(3, requires_grad=True)
    (g,) = torch.autograd.grad((w**3).sum(), w, create_graph=True)
    torch.autograd.grad(g, w, torch.ones(3))

def load():
    global rd
    import revdistill as rd

def unroll():
    x, y = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 2)
    loss, params = rd.from_module(torch.nn.Linear(3, 2), torch.nn.functional.mse_loss)
    theta = rd.unroll(loss, params, (x, y), rd.SGD(0.1), steps=4)
    sum(p.sum() for p in theta.values()).backward()

found = {"torch": cost(plain), "import": cost(load), "first": cost(unroll), "second": cost(unroll)}
print(json.dumps(found))
"""


def default_run(*, others: int = 0, picture: bool = False) -> dict[str, Any]:
    """The README's first command, beside so many processes that are busy for as long; and its picture."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as folder, busy(others):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "revdistill", *ARGUMENTS], check=True, cwd=folder, env=environment)
        seconds = time.perf_counter() - started
        run = Path(folder) / "runs/digits"
        artifact = read(run / "distilled.h5")
        if picture:
            shutil.copy(run / "plots/images.png", RESULTS / "digits.png")
    found = {"seconds": seconds, "evaluation": artifact.evaluation, "threads": artifact.config["threads"]}
    return {"command": " ".join(["revdistill", *ARGUMENTS]), "others": others} | found


@contextmanager
def busy(count: int) -> Iterator[None]:
    """While this lasts, so many processes compute."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def first_unroll() -> dict[str, Any]:
    """Where nothing was compiled before, and after that: the median process of several."""
    found: dict[str, Any] = {}
    for name, rounds in (("nothing kept", 1), ("later", ROUNDS)):
        costs = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as empty:
                cache = {"XDG_CACHE_HOME": empty} if name == "nothing kept" else {}
                environment = os.environ | cache | {"OMP_NUM_THREADS": "1"}
                command = [sys.executable, "-c", FIRST]
                ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                costs.append(json.loads(ran.stdout))
        found[name] = {
            part: {unit: median(cost[part][unit] for cost in costs) for unit in ("seconds", "bytes")}
            for part in ("torch", "import", "first", "second")
        }
    return found


def main() -> None:
    """The command."""
    verified = [check.__dict__ for check in checks(torch.device("cpu"))]
    for check in verified:
        print(f"{check['kind']}: {check['name']}: {check['found']}", flush=True)
    results = {"machine": machine("cpu"), "versions": versions(), "verify": verified}
    results |= {"default_run": default_run(picture=True), "beside_others": default_run(others=os.cpu_count() or 1)}
    save("headline", results | {"first_unroll": first_unroll()})


if __name__ == "__main__":
    main()
