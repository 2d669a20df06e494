"""docs/notebooks: the scripts of the same names as notebooks, cell by cell; they run in a kernel, at small size."""

from __future__ import annotations

import base64
import io
import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
MAKE = runpy.run_path(str(DOCS / "make_examples.py"))
NAMES = MAKE["AS_NOTEBOOKS"]
SMALL = "import sys\n\nsys.argv.append('--small')"  # before the first cell


def stored(name: str) -> Any:
    return nbformat.read(DOCS / f"notebooks/{name}.ipynb", as_version=4)


def check_shown(book: Any, name: str) -> None:
    """What was printed, and one picture that is one."""
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}, outputs
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}  # no warnings
    assert "learned 0." in "".join(output.text for output in outputs if output.output_type == "stream")
    (picture,) = (output.data["image/png"] for output in outputs if output.output_type == "display_data")
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        assert image.width > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 3


def test_there_are_two() -> None:
    assert sorted(path.stem for path in (DOCS / "notebooks").glob("*.ipynb")) == sorted(NAMES)
    assert len(NAMES) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_script_and_shows_what_it_found(name: str) -> None:
    """Otherwise run docs/make_examples.py."""
    book = stored(name)
    nbformat.validate(book)
    assert [(cell.cell_type, cell.source) for cell in book.cells] == MAKE["cells"](DOCS / f"examples/{name}.py")
    assert len([cell for cell in book.cells if cell.cell_type == "markdown"]) >= 4
    assert book == MAKE["notebook"](DOCS / f"examples/{name}.py") | {"cells": book.cells}
    check_shown(book, name)
    assert (DOCS / f"notebooks/{name}.ipynb").stat().st_size < 60_000


def test_the_cells_are_all_of_the_script() -> None:
    for name in NAMES:
        script = (DOCS / f"examples/{name}.py").read_text()
        cells = MAKE["cells"](DOCS / f"examples/{name}.py")
        lines = [line for _, text in cells for line in text.splitlines() if line]
        missing = {line.removeprefix("# %% ") for line in script.splitlines() if line} - set(lines)
        assert {line.strip('"') for line in missing} <= {"", cells[0][1].splitlines()[0].removeprefix("# ")}


@pytest.mark.filterwarnings("default")  # of the libraries that run notebooks; those of the cells would be among outputs
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows pictures in the notebook
    book = stored(name)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    book.cells.insert(0, nbformat.v4.new_code_cell(SMALL))
    MAKE["run_notebook"](book, tmp_path)
    check_shown(book, name)
    assert (tmp_path / f"{name}.png").exists()
