"""What do more processes give? Time, bytes that are sent, and memory, on one machine.

Processes of one thread each, started as torchrun would, against one process; they take turns, and figures are medians.
The two sides' results are compared in the same run: where they should have the same bits, they must.

    python benchmarks/scale.py --data-dir DIR               all parts, on a machine at rest: about 8 minutes on 2 cores
    python benchmarks/scale.py --parts unroll               one of them
    python benchmarks/scale.py --parts paper                what is computed of the others' figures
    python benchmarks/scale.py --quick                      everything tiny, to see that it runs

Writes results/scale.json; `python benchmarks/report.py` makes tables of it. The parts:

    train   outer steps of a distillation with 4 networks, which the processes share
    unroll  one hypergradient, whose batches the processes share (group=), without and with shard=True
    memory  the peak of each rank with shard=True, and of attribution's K vectors
    paper   what a model of GPT-2's size needs, computed of what was measured
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from bytes_per_rank import GB, Model, on_paper, split
from measuring import RESULTS, arguments_of, load, machine, save, versions
from processes import FailedError, Group

NAME = "scale"
TURN = 120.0  # seconds within which a turn must be over
# (processes, threads of each): what is compared
SETTINGS = ((1, 1), (2, 1), (1, 2))
# glibc's malloc keeps free pieces of up to 32 MiB, and many are exchanged. Given back at once, they leave peaks of what
# is in use.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144"}
GPUS = (1, 4, 8)
GPU_BYTES = 80 * GB


@dataclass(frozen=True)
class Size:
    """How much is measured; `QUICK` to see that it runs."""

    rounds: int = 5  # as far as there is time
    network_seconds: float = 60.0
    memory_seconds: float = 180.0
    outer_steps: tuple[tuple[str, int], ...] = (("MLP", 2), ("ConvNet-3", 1))
    batch: int = 200
    steps: tuple[tuple[str, int], ...] = (("MLP", 100), ("ConvNet-3", 2))
    exact_batch: int = 40
    exact_steps: int = 4
    width: int = 4100
    memory_steps: int = 12
    attribution_width: int = 680
    queries: int = 32
    attribution_steps: int = 10
    # (optimizer, processes, shard)
    memory: tuple[tuple[str, int, bool], ...] = (
        *(("SGD", n, n > 1) for n in (1, 2, 4)),
        *(("AdamW", n, n > 1) for n in (1, 4)),
        ("SGD", 2, False),
    )
    attribution: tuple[int, ...] = (1, 2, 4)


QUICK = Size(
    rounds=1,
    outer_steps=(("MLP", 1),),
    batch=8,
    steps=(("MLP", 3),),
    exact_batch=8,
    exact_steps=3,
    width=16,
    memory_steps=3,
    attribution_width=8,
    queries=3,
    attribution_steps=2,
    memory=(("AdamW", 2, True),),
    attribution=(2,),
)
# A distillation of each: one network's unit of work is the same whatever shares it (side_by_side).
TRAININGS: dict[str, dict[str, Any]] = {
    "MLP": {"steps": 20, "epochs": 3},
    "ConvNet-3": {"steps": 4, "epochs": 1, "batch_size": 64},
}
NETWORKS = 4


def train(size: Size, data_dir: str) -> dict[str, Any]:
    """Seconds per outer step."""
    networks = {}
    for name, outer_steps in size.outer_steps:
        config = {"dataset": "mnist", "architectures": [name], "inits": NETWORKS, **TRAININGS[name]}
        units = {**config, "side_by_side": 1}
        seconds: dict[str, list[float]] = {}
        with ExitStack() as stack:
            groups = {s: stack.enter_context(Group(*s)) for s in SETTINGS}
            for turn in turns_of(size):
                bits = {}
                jobs = [(in_words(*s), groups[s], units) for s in SETTINGS]
                jobs.append((in_words(1, 1) + ", one stack", groups[1, 1], {**config, "side_by_side": None}))
                for label, group, what in jobs:
                    found = group.ask(TURN, do="train", config=what, data_dir=data_dir, steps=outer_steps)
                    bits[label] = {answer["bits"] for answer in found}
                    if turn:  # the first warms up
                        seconds.setdefault(label, []).append(max(answer["seconds"] for answer in found))
                if len(bits[in_words(1, 1)] | bits[in_words(2, 1)]) != 1:
                    raise FailedError("one process and two have not the same bits")
        networks[name] = {
            "config": config,
            "networks": NETWORKS,
            "seconds": seconds,
            "same_bits": True,
            **ratios(seconds, in_words(2, 1)),
        }
        say(name, networks[name])
    return networks


def unroll(size: Size, data_dir: str) -> dict[str, Any]:
    """Seconds forward and back per step, and bytes that are sent."""
    networks = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        groups = {s: stack.enter_context(Group(*s)) for s in SETTINGS}
        for name, steps in size.steps:
            seconds: dict[str, list[float]] = {}
            found: dict[str, list[dict[str, Any]]] = {}
            for turn in turns_of(size):
                for s, group in groups.items():
                    for shard in (False, True) if s == (2, 1) else (False,):
                        label = in_words(*s) + ", shard=True" * shard
                        ask = {"network": name, "batch": size.batch, "steps": steps, "shard": shard}
                        path = f"{folder}/{label}" if turn == 0 else None
                        answers = group.ask(TURN, do="unroll", dtype="float32", path=path, **ask)
                        found.setdefault(label, answers)
                        if turn:
                            took = [a["seconds_forward"] + a["seconds_back"] for a in answers]
                            seconds.setdefault(label, []).append(max(took))
            one, two = in_words(1, 1), in_words(2, 1)
            apart = difference(folder, one, two, 2)
            exact = {"network": name, "batch": size.exact_batch, "steps": size.exact_steps, "dtype": "float64"}
            for s, label in (((1, 1), "exact one"), ((2, 1), "exact two")):
                groups[s].ask(TURN, do="unroll", shard=False, path=f"{folder}/{label}", **exact)
            networks[name] = {
                "batch": size.batch,
                "steps": steps,
                "parameters": found[one][0]["parameters"],
                "seconds": seconds,
                **ratios(seconds, two),
                "difference": apart,
                "difference_float64": difference(folder, "exact one", "exact two", 2),
                "exact": {"batch": size.exact_batch, "steps": size.exact_steps},
                "sent": {label: sent(answers) for label, answers in found.items() if len(answers) > 1},
            }
            say(name, networks[name])
    return networks


def turns_of(size: Size) -> Iterator[int]:
    """Turn 0, which warms up, and others: one in any case, and as many as there is time for."""
    began = time.monotonic()
    for turn in range(1 + size.rounds):
        spent = time.monotonic() - began
        if turn > 1 and spent * (turn + 1) / turn > size.network_seconds:
            return
        yield turn


def sent(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes per step and parameter of the rank that sends most."""
    return {way: max(answer[f"sent_{way}"] / answer["parameters"] for answer in answers) for way in ("forward", "back")}


def difference(folder: str, one: str, some: str, ranks: int) -> dict[str, float]:
    """Relative, of the hypergradients that one process and some have written: of data and of step sizes."""
    right = np.load(f"{folder}/{one}-0.npz")
    parts = [np.load(f"{folder}/{some}-{rank}.npz") for rank in range(ranks)]
    got = {"x": np.concatenate([p["x"] for p in parts], 1), "rates": parts[0]["rates"]}
    return {name: float(np.linalg.norm(got[name] - right[name]) / np.linalg.norm(right[name])) for name in got}


def memory(size: Size, data_dir: str) -> dict[str, Any]:
    """The peak of each rank, each setting in fresh processes."""
    rows, attributions, until = [], [], time.monotonic() + size.memory_seconds
    for ranks in size.attribution:
        what = {"width": size.attribution_width, "queries": size.queries, "batch": 16, "steps": size.attribution_steps}
        row = {"ranks": ranks, "shard": ranks > 1, "queries": size.queries, "steps": size.attribution_steps}
        attributions.append(row | fresh(until, ranks, do="attribution", **what))
        print(attributions[-1], flush=True)
    for optimizer, ranks, shard in size.memory:
        what = {"optimizer": optimizer, "width": size.width, "batch": 16, "steps": size.memory_steps, "shard": shard}
        row = {"optimizer": optimizer, "ranks": ranks, "shard": shard, "steps": size.memory_steps}
        rows.append(row | fresh(until, ranks, do="memory", **what))
        print(rows[-1], flush=True)
    return {"rows": rows, "attribution": attributions}


def fresh(until: float, ranks: int, **request: Any) -> dict[str, Any]:
    """The largest of the ranks' answers, from processes of their own; or why there is none."""
    if time.monotonic() > until:
        return {"error": "no time was left"}
    try:
        with Group(ranks, 1, **GIVEN_BACK) as group:
            answers = group.ask(TURN, **request)
    except FailedError as error:
        return {"error": str(error)}
    return {name: max(answer[name] for answer in answers) for name in answers[0]}


def paper(size: Size, data_dir: str) -> dict[str, Any]:
    """What a model of GPT-2's size needs, of what was measured here, on a GPU, and of Adam's bits."""
    rows = {
        (row["optimizer"], row["ranks"]): row for row in _found("memory")["rows"] if row["ranks"] == 1 or row["shard"]
    }
    one, most = rows["AdamW", 1], max((row for (name, _), row in rows.items() if name == "AdamW"), key=_ranks)
    peaks = [(row["peak_bytes"] - row["history_bytes"]) / row["parameters"] for row in (one, most)]
    whole, parts = split(*peaks, most["ranks"])
    lines = [json.loads(line) for line in (RESULTS / "cuda.jsonl").read_text().splitlines()]
    gpt2 = [line for line in lines if line["part"] == "gpt2"]
    probes = sorted((line["batch"], line["peak_bytes"]) for line in gpt2 if line.get("probe"))
    (few, low), (many, high) = probes[0], probes[-1]
    trained = next(line for line in gpt2 if "parameters" in line)
    activations = (high - low) / (many - few)
    adam = load("adam")
    assert adam is not None
    model = Model(
        parameters=trained["parameters"],
        batch=trained["batch"],
        whole=whole,
        parts=parts,
        activations=activations,
        bits=adam["bits"]["kept"],
        steps=1_000,
    )
    return {
        "model": vars(model),
        "length": trained["length"],
        "measured_on_gpu": {
            "bytes_per_parameter": (low - few * activations) / trained["parameters"],
            "peak_bytes": trained["peak_bytes"],
        },
        "computed_for_that": Model(**{**vars(model), "steps": trained["steps"]}).ours(1),
        "gpus": list(GPUS),
        "gpu_bytes": GPU_BYTES,
        "rows": on_paper(model, GPUS, (1_000,)),
    }


def _ranks(row: dict[str, Any]) -> int:
    return int(row["ranks"])


def _found(part: str) -> dict[str, Any]:
    results = load(NAME) or {}
    if part not in results or "found" not in results[part]:
        raise FailedError(f"--parts paper needs the figures of --parts {part}")
    found: dict[str, Any] = results[part]["found"]
    return found


def in_words(processes: int, threads: int) -> str:
    """A setting."""
    return f"{processes} {'process' if processes == 1 else 'processes'} x {threads} thread{'s' * (threads > 1)}"


def ratios(seconds: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """Medians, and how many times as fast as each other setting `ours` is: medians over turns."""
    times = {
        label: median(a / b for a, b in zip(found, seconds[ours], strict=True))
        for label, found in seconds.items()
        if label != ours
    }
    return {"median": {label: median(found) for label, found in seconds.items()}, "times": times}


def say(name: str, found: dict[str, Any]) -> None:
    """A line of what was found."""
    shown = {label: f"{value:.3g}" for label, value in found["median"].items()}
    print(name, shown, {label: f"{value:.2f}" for label, value in found["times"].items()}, flush=True)


PARTS: dict[str, Callable[[Size, str], dict[str, Any]]] = {
    "train": train,
    "unroll": unroll,
    "memory": memory,
    "paper": paper,
}


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = arguments_of(__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--data-dir", default="data", help="where MNIST is")
    parser.add_argument("--quick", action="store_true", help="everything tiny")
    options = parser.parse_args(arguments)
    if options.device != "cpu":
        parser.error("--device: this benchmark is for a CPU")
    for part in options.parts:
        try:
            found = {"found": PARTS[part](QUICK if options.quick else Size(), options.data_dir)}
        except Exception as error:  # the other parts are measured all the same
            found = {"error": f"{type(error).__name__}: {error}"}
            print(f"{part}: {found['error']}", flush=True)
        of = {"machine": machine("cpu", 1), "versions": versions()}
        results = (load(NAME) or {}) | of  # of the last part
        results[part] = of | found | {"quick": options.quick}
        save(NAME, results)


if __name__ == "__main__":
    main()
