"""Tables of more processes than one, from results/scale.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bytes_per_rank import GB, split, state_bytes
from measuring import MIB
from tables import table


def section(results: dict[str, Any], where: Callable[[dict[str, Any]], str]) -> str:
    """Everything about processes in benchmarks/README.md; where: a part's machine and versions in words."""
    parts = [
        "`python benchmarks/scale.py`. Processes on one machine, which exchange by gloo; threads are each process's, "
        "whatever the line below says of them. What each way is, and its commands: "
        "[docs/several-processes.md](../docs/several-processes.md)."
    ]
    for name, (heading, part) in PARTS.items():
        if name in results:
            one = results[name]
            text = part(one["found"]) if "found" in one else f"Failed: {one['error']}."
            text = f"Of --quick, which measures nothing.\n\n{text}" if one.get("quick") else text
            parts.append(f"### {heading}\n\nOn {where(one)}.\n\n{text}")
    return "\n\n".join(parts)


def train_part(found: dict[str, Any]) -> str:
    """The outer loop."""
    rows = _times(found, lambda one: f"{one['networks']} networks, T = {_inner_steps(one)}", "{:.2f}", 1.0)
    return (
        "`revdistill train` on MNIST, whose networks the processes share. Seconds of an outer step, medians over "
        "turns; in the last column, how many times as long as with two processes of one thread (median of the turns' "
        "ratios). One process and two of one thread have the same bits, asserted in the run; *one stack* trains the "
        "networks as one process alone does by default, which is another unit of work.\n\n"
        + table(["", "", "seconds", "x two processes"], rows)
    )


def _inner_steps(one: dict[str, Any]) -> int:
    return int(one["config"]["steps"] * one["config"]["epochs"])


def unroll_part(found: dict[str, Any]) -> str:
    """Data parallelism inside an unroll."""
    rows = _times(found, lambda one: f"batch {one['batch']}, T = {one['steps']}", "{:.1f}", 1000.0)
    sent = [
        [name, f"{one['parameters']:,}", label, f"{way['forward']:.2f}", f"{way['back']:.2f}"]
        for name, one in found.items()
        for label, way in one["sent"].items()
    ]
    apart = "; ".join(
        f"{name}: {one['difference']['x']:.0e} (data) and {one['difference']['rates']:.0e} (step sizes) in float32, "
        f"{one['difference_float64']['x']:.0e} and {one['difference_float64']['rates']:.0e} in float64 (batch "
        f"{one['exact']['batch']}, T = {one['exact']['steps']})"
        for name, one in found.items()
    )
    return (
        "One hypergradient by `rd.unroll`, with respect to data and step sizes, SGD; two processes have half of each "
        "batch (`group=`). Milliseconds per step, forward and back together:\n\n"
        + table(["", "", "ms per step", "x two processes"], rows)
        + f"\n\nRelative difference of the two processes' hypergradient from one process's: {apart}.\n\n"
        + "Bytes that a rank sends, per step and parameter (of two ranks, the one that sends more):\n\n"
        + table(["", "parameters", "", "forward", "back"], sent)
    )


def _times(found: dict[str, Any], what: Callable[[dict[str, Any]], str], form: str, unit: float) -> list[list[str]]:
    rows = []
    for name, one in found.items():
        for i, (label, seconds) in enumerate(one["median"].items()):
            times = one["times"].get(label)
            cells = [label, form.format(seconds * unit), "1" if times is None else f"{times:.2f}"]
            said = f"{name}, {what(one)}, {len(one['seconds'][label])} turns"
            rows.append([said if i == 0 else "", *cells])
    return rows


def memory_part(found: dict[str, Any]) -> str:
    """What each rank keeps."""
    rows, lines = [], []
    for row in found["rows"]:
        way = "-" if row["ranks"] == 1 else "yes" if row["shard"] else "no"
        cells = [row["error"]] if "error" in row else [_mib(row[f"{n}_bytes"]) for n in ("state", "history", "peak")]
        rows.append([row["optimizer"], str(row["ranks"]), way, *cells, *[""] * (3 - len(cells))])
    measured = [row for row in found["rows"] if "error" not in row and (row["shard"] or row["ranks"] == 1)]
    for optimizer in dict.fromkeys(row["optimizer"] for row in measured):
        of = {row["ranks"]: row for row in measured if row["optimizer"] == optimizer}
        if 1 in of and max(of) > 1:
            one, some = of[1], of[max(of)]
            peaks = [(row["peak_bytes"] - row["history_bytes"]) / row["parameters"] for row in (one, some)]
            whole, parts = split(*peaks, some["ranks"])
            state = state_bytes(optimizer, 1)
            lines.append(
                f"{optimizer}: {whole:.0f} bytes per parameter are whole on every rank and {parts:.0f} are in parts, "
                f"{state} of them the state (by the peaks of 1 and {some['ranks']} ranks, without the history)"
            )
    few = [
        [
            str(row["ranks"]),
            *([row["error"], ""] if "error" in row else [_mib(row["peak_bytes"]), f"{row['seconds']:.0f} s"]),
        ]
        for row in found["attribution"]
    ]
    first = next((row for row in found["rows"] if "error" not in row), None)
    many = next((row for row in found["attribution"] if "error" not in row), None)
    said = "" if first is None else f"{first['parameters']:,} parameters, T = {first['steps']}, float32, "
    asked = (
        "" if many is None else f"{many['queries']} queries, {many['parameters']:,} parameters, T = {many['steps']}, "
    )
    return (
        f"{said}decay .05 of the first average, which puts bits away within few steps. The rank with the most; peak: "
        "above what was there before, in fresh processes, with MALLOC_MMAP_THRESHOLD_=262144, so that what is free is "
        "given back (glibc's malloc keeps free pieces of up to 32 MiB otherwise).\n\n"
        + table(["", "ranks", "shard=True", "state, MiB", "history, MiB", "peak, MiB"], rows)
        + "".join(f"\n\n{line}." for line in lines)
        + f"\n\nAttribution (`rd.attribute`), {asked}SGD, in parts where there is more than one rank:\n\n"
        + table(["ranks", "peak, MiB", "time"], few)
    )


def paper_part(found: dict[str, Any]) -> str:
    """What is computed."""
    model, gpu = found["model"], found["measured_on_gpu"]
    limit = found["gpu_bytes"]
    rows = []
    for row in found["rows"]:
        cells = [
            f"{needs / GB:,.0f} GB{'' if needs <= limit else ' (does not fit)'}" for needs in row["bytes"].values()
        ]
        rows.append([row["way"], f"{row['steps']:,}", *cells, "computed"])
    ranks = [f"{n} GPU{'s' * (n > 1)}, each" for n in found["gpus"]]
    return (
        f"Nothing here was run: GPUs of {limit / GB:.0f} GB, a model of {model['parameters']:,} parameters, AdamW, "
        f"batch {model['batch']} of {found['length']} tokens, which the GPUs share. By `bytes_per_rank.py`, from what "
        f"was measured: {model['whole']:.0f} bytes per parameter whole on every rank and {model['parts']:.0f} in "
        f"parts (above), {model['bits']:.4f} bits put away per parameter and step (`adam.json`), "
        f"{model['activations'] / GB:.2f} GB for the graph of an example (the H100's two probes). For the run that was "
        f"made on one H100 this gives {found['computed_for_that'] / GB:.0f} GB, where {gpu['peak_bytes'] / GB:.0f} GB "
        f"were measured; without examples {gpu['bytes_per_parameter']:.0f} bytes per parameter were measured there, "
        f"against {model['whole'] + model['parts']:.0f} here. States are theta and AdamW's two averages as floats, in "
        "parts on the GPUs; of plain autograd every step's graph and these three tensors are counted, and nothing "
        "else.\n\n" + table(["", "T", *ranks, ""], rows)
    )


def _mib(nbytes: float) -> str:
    return f"{nbytes / MIB:,.0f}"


PARTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "train": ("The outer loop over processes", train_part),
    "unroll": ("One unroll on several processes", unroll_part),
    "memory": ("Memory of each rank", memory_part),
    "paper": ("On paper: a model of GPT-2's size", paper_part),
}
