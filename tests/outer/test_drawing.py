"""Pictures share one style, which leaves matplotlib as it was; their texts can be read; files have no idle channels."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from revdistill.outer.drawing import COLOURS, DPI, FAINT, INK, SMALL, STYLE, WIDTH, plain, save, styled
from tests.outer.legible import illegible


@styled
def drawn(width: float = WIDTH, size: float = SMALL, colour: str = INK) -> Figure:
    figure, ax = plt.subplots(figsize=(width, 2), layout="constrained")
    ax.plot([0, 1])
    ax.set_title("title", fontsize=size, color=colour)
    return figure


def test_the_style_is_of_the_pictures_alone() -> None:
    before = dict(matplotlib.rcParams)
    line = drawn().axes[0].lines[0]
    assert line.get_color() == COLOURS[0]
    assert before == dict(matplotlib.rcParams)
    assert before["text.color"] != STYLE["text.color"]
    with pytest.raises(ZeroDivisionError):
        styled(lambda: 1 / 0)()
    assert before == dict(matplotlib.rcParams)
    plt.close("all")


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        *(({"colour": colour}, "") for colour in (*COLOURS, INK, FAINT, "black")),
        ({"colour": "0.6"}, "'title': 9.7 pixels, contrast 2.8"),
        ({"size": 6.0}, "'title': 8.3 pixels, contrast 15.9"),
        ({"width": 2 * WIDTH, "size": 12.0}, "'title': 8.3"),
    ],
)
def test_what_cannot_be_read_is_found(options: dict[str, float], wrong: str) -> None:
    """And so the style's own colours and sizes can be."""
    found = [line for line in illegible(drawn(**options)) if line.startswith("'title'")]
    assert len(found) == bool(wrong)
    assert all(line.startswith(wrong) for line in found)
    plt.close("all")


def test_files_are_grey_where_pictures_are(tmp_path: Path) -> None:
    for colour, mode in ((INK, "L"), (COLOURS[1], "RGB")):
        figure, ax = plt.subplots(figsize=(2, 1))
        ax.imshow(np.eye(4), cmap="gray")
        ax.set_title("x", color=colour)
        save(figure, tmp_path / "picture.png")
        with Image.open(tmp_path / "picture.png") as image:
            assert image.mode == mode
            assert image.size == (2 * DPI, DPI)
            assert np.array(image.convert("L")).min() < 30
    assert plt.get_fignums() == []


def test_names_that_fit() -> None:
    assert plain("$a\n") == r"\$a?"
    assert plain("a long name of a class") == "a long na..."
