"""Tables in Markdown, and what stands in several of them."""

from __future__ import annotations

from typing import Any

from methods import METHODS


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table, one line per row."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def threads_of(machine: dict[str, Any]) -> str:
    """In words."""
    return "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"


def title(method: str) -> str:
    """A method's name in tables and pictures."""
    return METHODS[method].title


def where(results: dict[str, Any]) -> str:
    """The machine and the versions in words."""
    machine, versions = results["machine"], results["versions"]
    cores = f"{machine['cores']} cores ({machine['processor']})"
    place = f"{machine['gpu']}, host with {cores}" if "gpu" in machine else f"{cores}, {threads_of(machine)}"
    return f"{place}, Python {versions['python']}, torch {versions['torch']}"
