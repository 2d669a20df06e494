"""Tables in Markdown, and what stands in several of them."""

from __future__ import annotations

from typing import Any


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table, one line per row."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def threads_of(machine: dict[str, Any]) -> str:
    """In words."""
    return "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
