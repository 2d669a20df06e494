"""The pages in docs/: their examples run, each page's one after another, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
OWN = ("data", "distillation", "several-processes")  # their tests make what they need: files, processes
PAGES = [page for page in sorted(DOCS.glob("*.md")) if page.stem not in OWN]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    assert examples
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(page), "exec"), names)
