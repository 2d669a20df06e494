"""Tables of benchmarks/cuda.sh's memory: against the number of steps, a long training, a network of GPT-2's size."""

from __future__ import annotations

from measuring import MIB
from methods import METHODS
from report_cuda_lines import Line, of, titled
from tables import table
from tasks import KINDS

GIB = 2**30
# bergson 2026, its own report: MAGIC with checkpoints of whole states
PUBLIC = "checkpoints of whole states (bergson's own report: GPT-2, AdamW, its machine)", 64, 26.4, 11.1


def memory(lines: list[Line]) -> str:
    """Extra peak memory against T; what did not fit says so."""
    entries = [line for line in of(lines, "memory", "steps") if "bytes" in line or "error" in line]
    lengths = sorted({line["steps"] for line in entries})
    found = {(line["task"], line["method"], line["steps"]): line for line in entries}
    rows = [
        [KINDS[task].title, METHODS[method].title, *(_bytes(found.get((task, method, steps))) for steps in lengths)]
        for task in KINDS
        for method in METHODS
        if any((task, method, steps) in found for steps in lengths)
    ]
    return table(["extra peak memory on a GPU", "", *(f"T = {steps:,}" for steps in lengths)], rows) if rows else ""


def _bytes(line: Line | None) -> str:
    if line is None:
        return "-"
    if "bytes" not in line:
        return line["error"].split(":")[0]
    size = line["bytes"] / MIB
    return f"{size:,.0f} MiB" if size >= 100 else f"{size:.1f} MiB"


def long(lines: list[Line]) -> str:
    """Seconds and bytes of the longest trainings."""
    rows = [
        [
            titled(line),
            f"{line['seconds_forward']:,.1f}",
            f"{line['seconds_back']:,.1f}",
            f"{1e3 * (line['seconds_forward'] + line['seconds_back']) / line['steps']:.2f}",
            f"{line['peak_bytes'] / MIB:,.1f} MiB",
            f"{line['history_bytes'] / MIB:,.1f} MiB",
            f"{line['bits_per_parameter_step']:.3f}",
        ]
        for line in of(lines, "long", "seconds_back")
    ]
    header = [
        *(
            "one hypergradient, replayed, history on the host; measured beside the tests",
            "forward, s",
            "back, s",
            "ms per step",
            "extra peak on the GPU",
        ),
        *("history", "bits per parameter and step"),
    ]
    parts = [table(header, rows)] if rows else []
    parts += [f"{titled(line)}: warned that {text}" for line in of(lines, "long", "steps") for text in _warnings(line)]
    return "\n\n".join(parts)


def _warnings(line: Line) -> list[str]:
    return list(line.get("compile_warnings", ()))


def gpt2(lines: list[Line]) -> str:
    """Each trial, what did not fit, and the public figure."""
    rows, notes = [], []
    for line in of(lines, "gpt2", "batch", "steps"):
        told = ["ours", f"{line['batch']} x {line['length']}", str(line["steps"])]
        if "error" in line:
            rows.append([*told, line["error"].split(":")[0], "-", "-"])
        elif "seconds_back" in line:
            gib = f"{line['peak_bytes'] / GIB:.1f} GiB"
            rows.append([*told, gib, f"{line['seconds_forward']:.2f}", f"{line['seconds_back']:.2f}"])
        notes += [f"Batch {line['batch']}: warned that {text}" for text in _warnings(line)]
    if not rows:
        return ""
    name, batch, gib, back = PUBLIC
    rows.append([name, f"{batch} x 512", "72", f"{gib} GiB", "-", f"{back:.2f}"])
    sizes = [f"{line['parameters'] / 1e6:.1f} M parameters" for line in of(lines, "gpt2", "parameters")][:1]
    words = "a network of GPT-2's size" + "".join(f" ({size}), float32" for size in sizes)
    header = [words, "batch", "T", "peak memory", "s per step forward", "s per step back"]
    for line in of(lines, "gpt2", "needed_for_the_whole_batch"):
        notes.insert(
            0,
            f"By two small batches, one of {line['whole_batch']} needs "
            f"{line['needed_for_the_whole_batch'] / GIB:,.0f} GiB at once: the engine takes a step's batch whole.",
        )
    return "\n\n".join([table(header, rows), *notes])
