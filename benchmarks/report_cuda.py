"""Tables of what benchmarks/cuda.sh found on a GPU, from results/cuda.jsonl; a part that is not there is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from measuring import MIB
from methods import METHODS
from tables import table
from tasks import KINDS

Line = dict[str, Any]
OUT_OF_TIME = (124, 137)  # timeout's exit codes: ended, killed


def load(path: Path) -> list[Line]:
    """The lines, or none where there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def of(lines: list[Line], part: str, *needed: str) -> list[Line]:
    """A part's lines that have all the keys that are needed."""
    return [line for line in lines if line["part"] == part and all(key in line for key in needed)]


def where(lines: list[Line]) -> str:
    """The card, its driver and the versions in words."""
    machine = of(lines, "machine", "versions")[0]
    cards = of(lines, "machine", "card")
    place = f"{machine['machine']['cores']} cores ({machine['machine']['processor']})"
    if cards:
        card = cards[0]["card"]
        versions = f"driver {cards[0]['driver']}, CUDA {card['cuda']}"
        place = f"{card['name']} ({card['bytes'] / 1e9:.0f} GB, {versions}), host with {place}"
    return f"{place}, Python {machine['versions']['python']}, torch {machine['versions']['torch']}"


def section(lines: list[Line]) -> str:
    """Everything for benchmarks/README.md."""
    quick = " A dry run: sizes are tiny." if of(lines, "machine", "quick")[0]["quick"] else ""
    parts = [f"`benchmarks/cuda.sh`, on {where(lines)}.{quick}", right(lines)]
    for heading, found in (
        ("Is it right?", failures(lines)),
        ("Speed", speed(lines)),
        ("Memory", memory(lines)),
        ("Launches and waits", launches(lines)),
        ("CUDA graphs", capture(lines)),
        ("compile=True", compiled(lines)),
        ("What went wrong or was left out", errors(lines)),
    ):
        if found:
            parts += [f"### {heading}", found]
    return "\n\n".join(parts)


def summary(lines: list[Line]) -> str:
    """The block of the main README."""
    return "\n\n".join(
        part for part in (right(lines), speed_summary(lines), memory(lines), f"On {where(lines)}.") if part
    )


def right(lines: list[Line]) -> str:
    """How many tests and checks passed, in a sentence."""
    tests, checks = of(lines, "tests", "outcome"), of(lines, "verify", "passed")
    ran = [line for line in tests if line["outcome"] != "skipped"]
    passed = sum(line["outcome"] == "passed" for line in ran)
    good = sum(line["passed"] for line in checks)
    tests = f"Tests on the device: {passed} of {len(ran)} passed"
    return f"{tests}. Checks of `revdistill verify`: {good} of {len(checks)} passed."


def failures(lines: list[Line]) -> str:
    """Each test and check that failed, with its error's last line."""
    rows = [[line["test"], line["error"].splitlines()[-1]] for line in of(lines, "tests", "error")]
    rows += [[f"verify: {line['name']}", line["found"]] for line in of(lines, "verify", "passed") if not line["passed"]]
    return table(["failed", "with"], [[cell.replace("|", "\\|") for cell in row] for row in rows]) if rows else ""


def speed(lines: list[Line]) -> str:
    """Every task's methods."""
    rows = [
        [
            f"{entry['title']}, T = {entry['steps']}",
            METHODS[m["method"]].title,
            f"{m['ms_per_step']:.2f}",
            f"{m['ratio_to_autograd']:.2f}",
            f"{m['disagreement']:.0e}" if m["disagreement"] else "-",
        ]
        for entry in of(lines, "speed", "methods")
        for m in entry["methods"]
    ]
    header = ["one hypergradient", "method", "ms per step", "x plain autograd", "difference from autograd (float64)"]
    return table(header, rows) if rows else ""


def speed_summary(lines: list[Line]) -> str:
    """Multiples of plain autograd."""
    entries = of(lines, "speed", "methods")
    if not entries:
        return ""
    names = [m["method"] for m in entries[0]["methods"] if m["method"] != "autograd"]
    rows = []
    for entry in entries:
        found = {m["method"]: m["ratio_to_autograd"] for m in entry["methods"]}
        rows.append([f"{entry['title']}, T = {entry['steps']}", *(f"{found[name]:.2f}" for name in names)])
    return table(["one hypergradient on a GPU, plain autograd = 1", *(METHODS[name].title for name in names)], rows)


def memory(lines: list[Line]) -> str:
    """Extra peak memory against T; what did not fit says so."""
    entries = [line for line in of(lines, "memory", "steps") if "bytes" in line or "error" in line]
    lengths = sorted({line["steps"] for line in entries})
    rows = []
    for task, method in dict.fromkeys((line["task"], line["method"]) for line in entries):
        found = {line["steps"]: line for line in entries if (line["task"], line["method"]) == (task, method)}
        rows.append([KINDS[task].title, METHODS[method].title, *(_cell(found.get(steps)) for steps in lengths)])
    return table(["extra peak memory on a GPU", "", *(f"T = {steps:,}" for steps in lengths)], rows) if rows else ""


def _cell(line: Line | None) -> str:
    if line is None:
        return "-"
    return f"{line['bytes'] / MIB:,.0f} MiB" if "bytes" in line else line["error"].split(":")[0]


def launches(lines: list[Line]) -> str:
    """Per step and direction, and where the host waited."""
    rows = []
    for line in of(lines, "launches", "per_step"):
        counts = ", ".join(f"{n:.1f} {kind}" for kind, n in line["per_step"].items() if n)
        rows.append([KINDS[line["task"]].title, line["optimizer"], line["way"], counts])
    parts = [table(["task", "", "", "launched per step"], rows)] if rows else []
    for line in of(lines, "launches", "where"):
        places = ", ".join(f"{n} x {place}" for place, n in line["where"].items()) or "none"
        parts.append(f"Waits in {line['steps']} steps, {line['optimizer']}, {line['way']}: {places}.")
    return "\n\n".join(parts)


def capture(lines: list[Line]) -> str:
    """Whether a replay is eager's, and how long it takes."""
    rows = []
    for line in of(lines, "capture", "captured"):
        if line["captured"]:
            cells = [
                "yes" if line["bit_equal"] else "NO",
                f"{line['replay_ms']:.3f}",
                f"{line['eager_ms'] / line['replay_ms']:.1f}",
            ]
        else:
            cells = [f"not captured: {line['reason']}".replace("|", "\\|"), "-", "-"]
        rows.append([line["title"], line["what"], *cells[:1], f"{line['eager_ms']:.3f}", *cells[1:]])
    return (
        table(["captured", "", "replay equals eager", "eager, ms", "replay, ms", "times faster"], rows) if rows else ""
    )


def compiled(lines: list[Line]) -> str:
    """First call, equality, times."""
    parts = []
    for line in of(lines, "compile", "first_call_seconds"):
        back = "came back bit for bit" if line["way_back_exact"] else f"did not come back ({line['reversal_error']})"
        parts.append(
            f"{line['title']}, T = {line['steps']}: the first call took {line['first_call_seconds']:.0f} s and {back}."
        )
        parts += [f"Warning: {text}" for text in line["warnings"]]
    for line in of(lines, "compile", "theta_equal"):
        off = (
            "eager's bits"
            if line["theta_equal"]
            else f"other bits than eager's, by {line['theta_differs_by']:.0e} of its norm"
        )
        parts.append(f"theta at the end has {off}.")
    for line in of(lines, "compile", "ms_per_step"):
        rows = [[METHODS[name].title, f"{ms:.2f}"] for name, ms in line["ms_per_step"].items()]
        parts.append(table(["method", "ms per step"], rows))
    return "\n\n".join(parts)


def errors(lines: list[Line]) -> str:
    """Parts that ended with an error or out of time, and measurements that raised."""
    found = []
    for line in lines:
        if line["part"] == "tests":
            continue
        what = " ".join(str(line[key]) for key in ("task", "method", "steps", "optimizer", "what") if key in line)
        told = f"{line['part']} {what}".rstrip()
        if "error" in line:
            found.append(f"- {told}: {line['error']}")
        elif "skipped" in line:
            found.append(f"- {told}: {line['skipped']}")
        elif line.get("exit"):
            ending = "out of time" if line["exit"] in OUT_OF_TIME else f"exit code {line['exit']}"
            found.append(f"- {told}: {ending}")
    return "\n".join(found)
