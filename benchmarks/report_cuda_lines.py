"""The JSON lines of benchmarks/cuda.sh, for what makes tables of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks import KINDS

Line = dict[str, Any]


def load(path: Path) -> list[Line]:
    """The lines, or none where there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def of(lines: list[Line], part: str, *needed: str) -> list[Line]:
    """A part's lines that have all the keys that are needed."""
    return [line for line in lines if line["part"] == part and all(key in line for key in needed)]


def titled(line: Line) -> str:
    """Which training a line is about."""
    return f"{KINDS[line['task']].title}, T = {line['steps']:,}"


def cell(text: str) -> str:
    """As one cell of a table."""
    return text.replace("|", "\\|")
