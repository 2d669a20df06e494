"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from revdistill.attribute.flipping import SAID
from revdistill.outer.labels import Label


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest entry. What a terminal would act on (a file may hold such texts) is a question
    mark.
    """
    header, *rows = ([printable(cell) for cell in row] for row in (header, *rows))
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join("  " + line for line in lines)


def printable(cell: str) -> str:
    """The text, with a question mark for what a terminal would act on."""
    return "".join(c if c.isprintable() else "?" for c in cell)


def evaluation_table(evaluation: dict[str, Any]) -> str:
    """architecture -> what `Evaluation.to_dict` gives."""
    rows = [
        (name, e["schedule"], str(e["restarts"]), f"{e['mean']:.2%} +- {e['std']:.2%}")
        for name, e in evaluation.items()
    ]
    return table(("architecture", "schedule", "restarts", "test accuracy"), rows)


def comparison_table(comparison: dict[str, Any]) -> str:
    """schedule -> what `Trained.to_dict` gives."""
    rows = [
        (name, f"{found['loss']:.4f}", f"{found['accuracy']:.2%} +- {found['accuracy_std']:.2%}")
        for name, found in comparison.items()
    ]
    return table(("schedule", "test loss", "test accuracy"), rows)


def harmful_table(rows: Sequence[tuple[int, Label, float, bool]], *, flips: bool) -> str:
    """Rows of harmful.csv; flips: whether labels were flipped."""
    header = ("index", "label", "mean score", *["flipped"] * flips)
    return table(
        header,
        [(str(i), str(label), f"{score:+.3g}", *["yes" if wrong else "no"] * flips) for i, label, score, wrong in rows],
    )


def flipped_table(found: dict[str, Any]) -> str:
    """What `Flipped.to_dict` gives: how flipped labels are found, and what a training without them reaches."""
    rows = []
    for name, accuracy in found["accuracy"].items():
        ranks = name in found["auroc"]
        ranked = (f"{found['auroc'][name]:.3f}", f"{found['precision'][name]:.1%}") if ranks else ("", "")
        rows.append((SAID.get(name, name), *ranked, f"{accuracy['mean']:.2%} +- {accuracy['std']:.2%}"))
    said = (
        f"{found['flipped']} of {found['examples']} labels were flipped on purpose. How well they are found, and "
        f"what fresh networks reach on {found['test_samples']} test samples where as many examples are left out:"
    )
    header = ("left out", "AUROC", f"flipped among the first {found['worst']}", "test accuracy")
    return f"{said}\n{table(header, rows)}"
