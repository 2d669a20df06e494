"""The page of what benchmarks/cuda.sh found on a GPU, from results/cuda.jsonl; a part that is not there is left out."""

from __future__ import annotations

from report_cuda_lines import Line, cell, load, of
from report_cuda_memory import gpt2, long, memory
from report_cuda_speed import REPLAYED, capture, compiled, kernels, speed, speed_summary, times
from tables import table
from tasks import KINDS

OUT_OF_TIME = (124, 137)  # timeout's exit codes: ended, killed

__all__ = ["front", "load", "section", "summary"]


def where(lines: list[Line]) -> str:
    """The card, its driver and the versions in words."""
    machine = of(lines, "machine", "versions")[0]
    cards = of(lines, "machine", "card")
    place = f"{machine['machine']['cores']} cores ({machine['machine']['processor']})"
    if cards:
        card = cards[0]["card"]
        versions = f"driver {cards[0]['driver']}, CUDA {card['cuda']}"
        place = f"{card['name']} ({card['bytes'] / 1e9:.0f} GB, {versions}), host with {place}"
    commit = f", commit {machine['commit']}" if machine.get("commit") else ""
    return f"{place}, Python {machine['versions']['python']}, torch {machine['versions']['torch']}{commit}"


def section(lines: list[Line]) -> str:
    """Everything for benchmarks/README.md."""
    quick = " A dry run: sizes are tiny." if of(lines, "machine", "quick")[0]["quick"] else ""
    parts = [f"`benchmarks/cuda.sh`, on {where(lines)}.{quick}", *filter(None, [right(lines)])]
    for heading, found in (
        ("Is it right?", failures(lines)),
        ("Speed", speed(lines)),
        ("Memory", memory(lines)),
        ("A long training", long(lines)),
        ("A network of GPT-2's size", gpt2(lines)),
        ("Integer kernels", kernels(lines)),
        ("Launches and waits", launches(lines)),
        ("CUDA graphs", capture(lines)),
        ("compile=True", compiled(lines)),
        ("What went wrong or was left out", errors(lines)),
    ):
        if found:
            parts += [f"### {heading}", found]
    return "\n\n".join(parts)


def summary(lines: list[Line]) -> str:
    """The block of docs/how-to-choose.md."""
    parts = (right(lines), speed_summary(lines), memory(lines), long(lines), gpt2(lines), f"On {where(lines)}.")
    return "\n\n".join(part for part in parts if part)


def front(lines: list[Line]) -> str:
    """A sentence or two for the README."""
    return f"On {where(lines)}: {right(lines)} {times(lines, 'With replayed steps', (REPLAYED,))}"


def right(lines: list[Line]) -> str:
    """How many tests and checks passed, in a sentence each; nothing of what did not run."""
    ran = [line for line in of(lines, "tests", "outcome") if line["outcome"] != "skipped"]
    checks = of(lines, "verify", "passed")
    told = []
    for words, count, bad in (
        (
            "Tests on the device",
            len(ran),
            [line["test"].rsplit("::")[-1] for line in ran if line["outcome"] != "passed"],
        ),
        ("Checks of `revdistill verify`", len(checks), [line["name"] for line in checks if not line["passed"]]),
    ):
        if count:
            failed = f", not {', '.join(f'`{name}`' for name in bad)}" if bad else ""
            told.append(f"{words}: {count - len(bad)} of {count} passed{failed}.")
    return " ".join(told)


def failures(lines: list[Line]) -> str:
    """Each test and check that failed, with its error's last line."""
    rows = [[line["test"], line["error"].splitlines()[-1]] for line in of(lines, "tests", "error")]
    rows += [[f"verify: {line['name']}", line["found"]] for line in of(lines, "verify", "passed") if not line["passed"]]
    return table(["failed", "with"], [list(map(cell, row)) for row in rows]) if rows else ""


def launches(lines: list[Line]) -> str:
    """Per step and direction, and where the host waited."""
    rows = []
    for line in of(lines, "launches", "per_step"):
        counts = ", ".join(f"{n:.1f} {kind}" for kind, n in line["per_step"].items() if n)
        rows.append([KINDS[line["task"]].title, line["optimizer"], line["way"], counts])
    parts = [table(["task", "", "", "launched per step"], rows)] if rows else []
    for line in (line for line in of(lines, "launches", "where") if "waits" in line):
        places = ", ".join(f"{n} x {place}" for place, n in line["where"].items()) or "none"
        parts.append(f"Waits in {line['steps']} steps, {line['optimizer']}, {line['way']}: {places}.")
    return "\n\n".join(parts)


def errors(lines: list[Line]) -> str:
    """Parts that ended with an error or out of time, and measurements that raised."""
    found = []
    for line in lines:
        if line["part"] == "tests":
            continue
        named = ("task", "method", "batch", "steps", "optimizer", "parameters", "form", "what")
        what = " ".join(str(line[key]) for key in named if key in line)
        told = f"{line['part']} {what}".rstrip()
        for m in line.get("methods", ()):
            if "error" in m:
                found.append(f"- {told} {m['method']}: {m['error']}")
        if "error" in line:
            found.append(f"- {told}: {line['error']}")
        elif "skipped" in line:
            found.append(f"- {told}: {line['skipped']}")
        elif line.get("exit"):
            ending = "out of time" if line["exit"] in OUT_OF_TIME else f"exit code {line['exit']}"
            found.append(f"- {told}: {ending}")
    return "\n".join(found)
