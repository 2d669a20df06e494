"""Tables of benchmarks/cuda.sh's times: hypergradients, kernels, captures, compiled functions."""

from __future__ import annotations

from methods import METHODS
from report_cuda_lines import Line, cell, of, titled
from tables import table

EAGER = ("reversible", "reversible-default")
REPLAYED = "reversible-replayed"


def measured(lines: list[Line]) -> dict[str, dict[str, Line]]:
    """By training and method; autograd as it was measured first, beside ours."""
    found: dict[str, dict[str, Line]] = {}
    for entry in of(lines, "speed", "methods"):
        for m in entry["methods"]:
            if "error" not in m:
                found.setdefault(titled(entry), {}).setdefault(m["method"], m)
    return found


def speed(lines: list[Line]) -> str:
    """Every task's methods."""
    rows, found = [], measured(lines)
    once = any("first_call_seconds" in m for methods in found.values() for m in methods.values())
    for task, methods in found.items():
        for name, m in methods.items():
            first = [f"{m['first_call_seconds']:.1f}" if "first_call_seconds" in m else "-"] if once else []
            off = f"{m['disagreement']:.0e}" if m["disagreement"] else "-"
            if m["disagreement"] and m.get("disagreement_dtype", "float64") != "float64":
                off += f" ({m['disagreement_dtype']})"
            times = [f"{m['ms_per_step']:.2f}", f"{m['ratio_to_autograd']:.2f}"]
            rows.append([task, METHODS[name].title, *times, *first, off])
    header = [
        *("one hypergradient", "method", "ms per step", "x plain autograd"),
        *(["first call, s"] if once else []),
        "difference from autograd (float64)",
    ]
    parts = [table(header, rows)] if rows else []
    return "\n\n".join([*parts, *same_bits(lines), *warned(lines)])


def same_bits(lines: list[Line]) -> list[str]:
    """Whether replayed steps have eager's bits: a sentence for each training."""
    told = []
    for line in of(lines, "speed", "theta_equal"):
        differing = [
            f"{what} by {line[f'{key}_differs_by']:.0e} of its norm"
            for key, what in (("theta", "theta"), ("hypergradient", "the hypergradient"))
            if not line[f"{key}_equal"]
        ]
        end = f"differ from eager's: {', '.join(differing)}" if differing else "are eager's, every bit"
        told.append(f"{titled(line)}: theta and the hypergradient of replayed steps {end}.")
    return told


def warned(lines: list[Line]) -> list[str]:
    """What methods were warned of, and so do not do what their name says."""
    return [
        f"{task}, {METHODS[name].title}: warned that {text}"
        for task, methods in measured(lines).items()
        for name, m in methods.items()
        for text in m.get("compile_warnings", ())
    ]


def speed_summary(lines: list[Line]) -> str:
    """Multiples of plain autograd, and the range in a sentence."""
    found = measured(lines)
    if not found:
        return ""
    seen = {name for methods in found.values() for name in methods if name != "autograd"}
    names = [name for name in METHODS if name in seen]
    ratios = {task: {name: m["ratio_to_autograd"] for name, m in methods.items()} for task, methods in found.items()}
    rows = [[task, *(f"{mine[name]:.2f}" if name in mine else "-" for name in names)] for task, mine in ratios.items()]
    told = [table(["one hypergradient on a GPU, plain autograd = 1", *(METHODS[name].title for name in names)], rows)]
    told += [times(lines, "Step by step", EAGER), times(lines, "With replayed steps", (REPLAYED,))]
    return "\n\n".join(filter(None, told))


def times(lines: list[Line], words: str, group: tuple[str, ...]) -> str:
    """The range of some methods' multiples in a sentence; nothing where none was measured."""
    these = [mine[n]["ratio_to_autograd"] for mine in measured(lines).values() for n in group if n in mine]
    if not these:
        return ""
    return f"{words}, a hypergradient takes {min(these):.2g} to {max(these):.2g} times as long as plain autograd."


def kernels(lines: list[Line]) -> str:
    """GB/s beside the copy's."""
    rows = [
        [
            line["optimizer"],
            f"{line['parameters']:,}",
            line["form"],
            line["way"],
            f"{line['microseconds']:,.1f}",
            f"{line['bytes_per_parameter']:.0f}",
            f"{line['gigabytes_per_second']:,.0f}",
            f"{line['copy_gigabytes_per_second']:,.0f}",
            f"{line['share_of_copy']:.2f}",
            "yes" if line["exact"] else "NO",
        ]
        for line in of(lines, "kernels", "microseconds")
    ]
    header = [
        *("", "parameters", "form", "", "us a step", "bytes per parameter", "GB/s", "a copy's GB/s", "share of it"),
        "back undoes forward",
    ]
    return table(header, rows) if rows else ""


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
            cells = [cell(f"not captured: {line['reason']}"), "-", "-"]
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
