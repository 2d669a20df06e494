"""JSON lines, each written and flushed as soon as it is known: what a part that is killed had found is not lost."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu.place import NAMES

RESULTS = "REVDISTILL_RESULTS"  # the environment variable that names the file


def write(part: str, **values: Any) -> None:
    """Append {"part": part, ...} to the file, and show it."""
    line = json.dumps({"part": part, **values})
    print(line, flush=True)
    path = os.environ.get(RESULTS)
    if path:
        with Path(path).open("a") as file:
            file.write(line + "\n")


@contextmanager
def attempt(part: str, **what: Any) -> Iterator[None]:
    """An error inside is written as a line {"part": part, **what, "error": "Type: text"}, and the next measurement goes
    on.
    """
    try:
        yield
    except Exception as error:  # whatever fails on a machine that is lent for minutes must not cost the rest
        write(part, **what, error=in_words(error))


def in_words(error: BaseException) -> str:
    """ "Type: first line"."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


def options_of(description: str | None) -> argparse.ArgumentParser:
    """What every part is told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=NAMES)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether everything runs, not how fast")
    return parser
