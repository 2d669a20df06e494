"""What do one and 100 queries cost? Time and extra peak memory of the derivatives of K query losses by the examples'
weights, through T steps: rd.jacobian over Reversible against plain autograd's graph of all steps, kept.

MLP 784-32-10, batches of 64, SGD(0.01, 0.9), 40 batches of random data gone through again and again. Through the kept
graph the 100 vector products are made one by one, and batched by torch (`is_grads_batched`), 32 at a time. Before they
are measured all ways are compared, in float64 over 10 steps. Each figure is of a fresh process, warmed up with a short
run. What a straight line through the shorter runs says would pass --most-bytes or --most-seconds is left out, and the
results say so.

    python benchmarks/attribution_cost.py     alone on the machine: about ten minutes on a CPU

Writes results/attribution_cost.json; `python benchmarks/report.py` makes the table of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measuring import MIB, PeakMemory, arguments_of, machine, save, versions
from torch import Tensor, nn

import revdistill as rd

STEPS, QUERIES = (200, 400, 2_000), (1, 100)
BATCH, BATCHES, WIDTH = 64, 40, 32
CHECK_STEPS, CHECK_QUERIES, WARM_UP = 10, 5, 5
CHUNK = 32
AGREE = 1e-9  # relative, in float64: the steps of the library are rounded to fixed point


def one_way_back(losses: Tensor, weights: Tensor) -> Tensor:
    """[K, batches, B]"""
    return rd.jacobian(losses, weights, chunk_size=CHUNK)


def one_by_one(losses: Tensor, weights: Tensor) -> Tensor:
    """Likewise, each by a backward through the same graph."""
    return torch.stack([torch.autograd.grad(loss, weights, retain_graph=True)[0] for loss in losses])


def batched(losses: Tensor, weights: Tensor) -> Tensor:
    """Likewise, by torch's batched backward."""
    rows = torch.eye(len(losses), dtype=losses.dtype).split(CHUNK)
    return torch.cat(
        [torch.autograd.grad(losses, weights, v, retain_graph=True, is_grads_batched=True)[0] for v in rows]
    )


@dataclass(frozen=True)
class Way:
    """How the derivatives are found.

    title: in tables; adjoint: of the unroll; derivatives: (losses [K], weights) -> [K, batches, B].
    """

    title: str
    adjoint: Callable[[], rd.Reversible | rd.Backprop]
    derivatives: Callable[[Tensor, Tensor], Tensor]


WAYS = {
    "reversible": Way("Reversible", rd.Reversible, one_way_back),
    "reversible-no-graphs": Way("Reversible, no graphs", lambda: rd.Reversible(graph_bytes=0), one_way_back),
    "backprop-batched": Way("graph kept, batched by torch", rd.Backprop, batched),
    "backprop-loop": Way("graph kept, one by one", rd.Backprop, one_by_one),
}


def scores(way: Way, steps: int, queries: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole of what is measured: the training, the queries' losses and their derivatives, [K, batches, B]."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, WIDTH), nn.GELU(), nn.Linear(WIDTH, 10)).to(dtype)
    x, y = torch.randn(BATCHES, BATCH, 784, dtype=dtype), torch.randint(10, (BATCHES, BATCH))
    asked = torch.randn(queries, 784, dtype=dtype), torch.randint(10, (queries,))
    weights = torch.ones(BATCHES, BATCH, dtype=dtype, requires_grad=True)
    each, params = rd.from_module(net, nn.CrossEntropyLoss(reduction="none"))

    def loss(p: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        return (batch[0] * each(p, batch[1:])).mean()

    optimizer = rd.SGD(0.01, 0.9)
    theta = rd.unroll(loss, params, (weights, x, y), optimizer, steps=steps, adjoint=way.adjoint(), seed=0)
    logits = torch.func.functional_call(net, theta, (asked[0],))
    return way.derivatives(F.cross_entropy(logits, asked[1], reduction="none"), weights)


def check() -> dict[str, float]:
    """How far the ways are apart in float64, relative to the kept graph's. Raises: AssertionError where too far."""
    found = {name: scores(way, CHECK_STEPS, CHECK_QUERIES, torch.float64) for name, way in WAYS.items()}
    reference = found["backprop-loop"]
    apart = {name: float((s - reference).norm() / reference.norm()) for name, s in found.items()}
    assert max(apart.values()) < AGREE, apart
    return apart


def measure(name: str, steps: int, queries: int) -> dict[str, Any]:
    """{"seconds", "bytes"} in a process of its own, or {"error"}."""
    command = [sys.executable, __file__, "--one", name, str(steps), str(queries)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1][:200] if lines else f"the process ended with {done.returncode}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def one(name: str, steps: int, queries: int) -> dict[str, Any]:
    """In this process."""
    torch.set_num_threads(1)
    scores(WAYS[name], WARM_UP, min(queries, 2))
    with PeakMemory("cpu") as peak:
        started = time.perf_counter()
        scores(WAYS[name], steps, queries)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": peak.nbytes}


def rise(name: str, queries: int, options: Any) -> list[dict[str, Any]]:
    """One way over all T: what was measured, or why it was not."""
    rows: list[dict[str, Any]] = []
    for steps in options.steps:
        row: dict[str, Any] = {"way": name, "queries": queries, "steps": steps}
        last = rows[-1] if rows else {}
        factor = steps / last["steps"] if rows else 0.0
        if "skipped" in last or "error" in last:
            row["skipped"] = last.get("skipped") or last["error"]
        elif rows and last["seconds"] * factor > options.most_seconds:
            row["skipped"] = f"would take about {last['seconds'] * factor:,.0f} s"
        elif rows and last["bytes"] * factor > options.most_bytes and name.startswith("backprop"):
            row["skipped"] = f"would need about {last['bytes'] * factor / 1e9:.0f} GB"
        else:
            row |= measure(name, steps, queries)
        rows.append(row)
        what = row.get("skipped") or row.get("error") or f"{row['seconds']:.1f} s, {row['bytes'] / MIB:,.0f} MiB"
        print(f"{name}, {queries} queries, T = {steps}: {what}", flush=True)
    return rows


def main() -> None:
    """The command."""
    parser = arguments_of(__doc__)
    parser.add_argument("--most-bytes", type=float, default=8e9)
    parser.add_argument("--most-seconds", type=float, default=600)
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--one", nargs=3, metavar=("WAY", "STEPS", "QUERIES"), help="measure one, in this process")
    options = parser.parse_args()
    if options.one:
        name, steps, queries = options.one
        print(json.dumps(one(name, int(steps), int(queries))))
        return
    results = {
        "machine": machine("cpu", 1),
        "versions": versions(),
        "settings": {"batch": BATCH, "width": WIDTH, "chunk": CHUNK},
        "apart": check(),
        "rows": [row for name in WAYS for queries in QUERIES for row in rise(name, queries, options)],
    }
    save("attribution_cost", results)


if __name__ == "__main__":
    main()
