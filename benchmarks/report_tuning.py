"""Tables of Adam in reverse and of learned training schedules, from results/adam.json and
results/maclaurin2015.json.
"""

from __future__ import annotations

from typing import Any

from measuring import MIB
from methods import ADAM_METHODS
from tables import table

WHO = {"start": "the start", "random_search": "random search, the same time", "learned": "learned"}


def adam_section(results: dict[str, Any], where: str) -> str:
    """Everything about Adam in benchmarks/README.md."""
    parts = [f"`python benchmarks/adam.py`, on {where}.", adam_bits(results), adam_memory(results)]
    for entry in results["speed"]:
        rows = [
            [
                ADAM_METHODS[m["method"]].title,
                f"{m['ms_per_step']:.2f}",
                f"{m['ratio_to_autograd']:.2f}",
                f"{m['disagreement']:.0e}" if m["disagreement"] else "-",
            ]
            for m in entry["methods"]
        ]
        header = ["method", "ms per step", "x plain autograd", "difference from autograd (float64)"]
        parts.append(f"### {entry['title']} (T = {entry['steps']}, {entry['rounds']} rounds)\n\n" + table(header, rows))
    return "\n\n".join(parts)


def adam_summary(results: dict[str, Any], where: str) -> str:
    """The figures of the main README."""
    worst = max(m["disagreement"] for entry in results["speed"] for m in entry["methods"])
    return "\n\n".join(
        [
            adam_bits(results)
            + f" Hypergradients differ from float64 autograd's by {worst:.0e} of their norm at most.",
            adam_memory(results),
            adam_speed(results),
            f"On {where}.",
        ]
    )


def adam_bits(results: dict[str, Any]) -> str:
    """In a sentence."""
    bits = results["bits"]
    return (
        f"{bits['steps']:,} steps came back bit for bit, in {bits['kept']:.4f} bits per parameter and step (entropy "
        "bound "
        f"{bits['ideal']:.4f})."
    )


def adam_memory(results: dict[str, Any]) -> str:
    """Extra peak memory against T."""
    memory = results["memory"]
    steps = sorted({row["steps"] for row in memory["rows"]})
    rows = []
    for name in dict.fromkeys(row["method"] for row in memory["rows"]):
        found = {row["steps"]: row["bytes"] for row in memory["rows"] if row["method"] == name}
        rows.append([ADAM_METHODS[name].title, *(f"{found[s] / MIB:,.0f} MiB" if s in found else "-" for s in steps)])
    return table([f"Adam, extra peak memory, {memory['title']}", *(f"T = {s:,}" for s in steps)], rows)


def adam_speed(results: dict[str, Any]) -> str:
    """Multiples of plain autograd through Adam."""
    measured = {m["method"] for entry in results["speed"] for m in entry["methods"]}
    names = [name for name in ADAM_METHODS if name in measured and name != "adam-autograd"]
    rows = []
    for entry in results["speed"]:
        found = {m["method"]: m["ratio_to_autograd"] for m in entry["methods"]}
        rows.append(
            [f"{entry['title']}, T = {entry['steps']}", *(f"{found[n]:.2f}" if n in found else "-" for n in names)]
        )
    return table(["one hypergradient, plain autograd through Adam = 1", *(ADAM_METHODS[n].title for n in names)], rows)


def schedules_table(results: dict[str, Any]) -> str:
    """Each experiment: before, by random search, learned."""
    rows = []
    for found in results["experiments"].values():
        for key, who in WHO.items():
            if key not in found:
                continue
            m = found[key]
            rows.append(
                [
                    found["title"] if key == "start" else "",
                    who,
                    f"{m['held_out_loss']:.3f}",
                    f"{m['test_loss']:.3f}",
                    f"{m['test_accuracy']:.1%} +- {m['test_accuracy_std']:.1%}",
                    f"{found['seconds']:.0f} s, {found['peak_bytes'] / MIB:.0f} MiB" if key == "learned" else "",
                ]
            )
    return table(["learned on MNIST", "", "held-out loss", "test loss", "test accuracy", "time, extra memory"], rows)


def norms_table(results: dict[str, Any]) -> str:
    """Where the way back explodes over a long horizon."""
    long = results["experiments"]["long"]
    rows = [
        [
            f"{n['rate']:g}",
            f"{n['clip_back']:g}" if n["clip_back"] else "-",
            f"{n['largest']:.0e}",
            "-" if n["explosion"] is None else f"step {n['explosion']:,}",
            n["ended"],
        ]
        for n in long["norms"]
    ]
    memory = ", ".join(f"{m['bytes'] / MIB:.0f} MiB at T = {m['steps']:,}" for m in long["memory"])
    header = [
        "constant rate",
        "clip_back",
        "largest norm of dL/dtheta_k",
        "a thousandfold from (going back)",
        "the way back was",
    ]
    return table(header, rows) + f"\n\nExtra memory of one hypergradient: {memory}."


def schedules_section(results: dict[str, Any], where: str) -> str:
    """Everything about schedules in benchmarks/README.md."""
    found = results["experiments"]
    parts = [
        f"`python benchmarks/maclaurin2015.py --data-dir DIR`, on {where}. Means over fresh networks; held-out data "
        "choose, test "
        "data chose nothing. The random search draws constant rates and momenta, one penalty for all weights, or "
        "real images; it "
        "is given the time that learning took, and measures its best candidates again before it chooses.",
        schedules_table(results),
    ]
    pictures = {
        "schedule": "Rates per layer and step, momenta, initial scales",
        "penalties": "The penalties of the 7,840 weights, a picture per class",
        "images": "Ten training images, before and after",
        "long": "Two thousand steps",
    }
    parts += [f"{text}:\n\n![{text}](results/maclaurin_{name}.png)" for name, text in pictures.items() if name in found]
    if "long" in found:
        parts.append(norms_table(results))
    return "\n\n".join(parts)
