"""How many kernels does a step launch, and how often does the host wait for the device?  python -m gpu.launches
--device cuda

From the difference of two lengths that are 32 steps apart, as the engine looks at the device every 32 steps; forward
and back separately, on the MLP, for SGD and Adam. On the stand-in, its own counts of operators and waits.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tasks import MOMENTUM, Task, make
from torch import Tensor

import revdistill as rd
from gpu.lines import attempt, options_of, write
from gpu.place import here, leave
from revdistill.engine.loss.graph import graph_nodes

SHORT, LONG = 32, 64  # neither spills: at a momentum of 0.9 the first words leave after some 200 steps
OPTIMIZERS: dict[str, Callable[[Tensor], Any]] = {
    "sgd": lambda lr: rd.SGD(lr, MOMENTUM),
    "adam": lambda lr: rd.Adam(lr / 10),
}

Pass = Callable[[], Any]


def passes(task: Task, optimizer: str, steps: int) -> tuple[Callable[[], Tensor], Callable[[Tensor], Any]]:
    """(forward to the outer loss, from there back)"""
    rates = task.rates(steps)

    def forward() -> Tensor:
        theta = rd.unroll(
            task.loss,
            task.params,
            task.batches,
            OPTIMIZERS[optimizer](rates),
            steps=steps,
            adjoint=rd.Reversible(graph_bytes=0),
        )
        return task.outer(theta)

    return forward, lambda value: torch.autograd.grad(value, [task.batches[0], rates])


def per_direction(task: Task, optimizer: str, count: Callable[[Pass], Counter[str]]) -> dict[str, Counter[str]]:
    """What `count` counts in LONG - SHORT steps, forward and back."""
    found: dict[int, dict[str, Counter[str]]] = {}
    for steps in (SHORT, LONG):
        forward, back = passes(task, optimizer, steps)
        back(forward())  # what is done once is done
        values: list[Tensor] = []
        there = count(lambda forward=forward, values=values: values.append(forward()))  # type: ignore[misc]
        found[steps] = {"forward": there, "back": count(lambda back=back, values=values: back(values.pop()))}  # type: ignore[misc]
    return {way: found[LONG][way] - found[SHORT][way] for way in ("forward", "back")}


def kernels(run: Pass) -> Counter[str]:
    """What the device was made to run, by kind."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profile.events() or ():
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False):
            kind = next((k for k in ("Memcpy", "Memset") if event.name.startswith(k)), "kernel")
            found[kind] += 1
            found[event.name[:80]] += kind == "kernel"
    return found


def waits(run: Pass) -> Counter[str]:
    """Where torch warned of a wait: "file:line"."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))


def sweep_alone(value: Tensor) -> None:
    """The way back called directly: autograd keeps its nodes' warnings to its end, where nobody knows their line any
    more.
    """
    (node,) = (n for n in graph_nodes(value) if hasattr(n, "unrolled"))  # the unroll's own
    bars = torch.autograd.grad(value, torch.autograd.graph.GradientEdge(node, 0))
    node.unrolled.go_back(bars)


def measure_cuda(problem: Task, **what: Any) -> None:
    """Kernels, then waits, then the lines of the waits on the way back."""
    steps, optimizer = LONG - SHORT, what["optimizer"]
    with attempt("launches", **what, what="kernels"):
        for way, found in per_direction(problem, optimizer, kernels).items():
            counted = {kind: found.pop(kind, 0) / steps for kind in ("kernel", "Memcpy", "Memset")}
            most = {name: n / steps for name, n in found.most_common(8)}
            write("launches", **what, way=way, per_step=counted, most=most)
    with attempt("launches", **what, what="waits"):
        for way, found in per_direction(problem, optimizer, waits).items():
            write("launches", **what, way=way, waits=sum(found.values()), steps=steps, where=dict(found))
    with attempt("launches", **what, what="waits on the way back, by line"):
        found = Counter[str]()
        for length, sign in ((LONG, 1), (SHORT, -1)):
            value = passes(problem, optimizer, length)[0]()
            for place, n in waits(lambda value=value: sweep_alone(value)).items():  # type: ignore[misc]
                found[place] += sign * n
        write("launches", **what, way="back, by line", steps=steps, where={p: n for p, n in found.items() if n})


def measure_standin(problem: Task, **what: Any) -> None:
    """The same questions to the stand-in."""
    from tests import standin

    with standin.running() as counts:

        def operators(run: Pass) -> Counter[str]:
            counts.clear()
            run()
            return counts.operators.copy()

        def stops(run: Pass) -> Counter[str]:
            counts.clear()
            run()
            return counts.waits.copy()

        steps, optimizer = LONG - SHORT, what["optimizer"]
        for way, found in per_direction(problem, optimizer, operators).items():
            most = {name: n / steps for name, n in found.most_common(8)}
            write("launches", **what, way=way, per_step={"operator": sum(found.values()) / steps}, most=most)
        for way, found in per_direction(problem, optimizer, stops).items():
            write("launches", **what, way=way, waits=sum(found.values()), steps=steps, where=dict(found))


def main() -> None:
    """The command."""
    options = options_of(__doc__).parse_args()
    if options.device == "cpu":
        write("launches", skipped="the CPU launches no kernels, and nothing waits for it")
        return
    with here(options.device) as device:
        name = "tiny" if options.quick else "mlp"
        task = make(name, device=str(device))
        for optimizer in list(OPTIMIZERS)[:1] if options.quick else OPTIMIZERS:
            with attempt("launches", task=name, optimizer=optimizer):
                (measure_cuda if device.type == "cuda" else measure_standin)(task, task=name, optimizer=optimizer)
    leave(options.device)


if __name__ == "__main__":
    main()
