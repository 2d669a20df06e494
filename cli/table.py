"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
