"""The figures of docs/figures are drawn by their scripts, and can be read."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from PIL import Image

from revdistill.outer.drawing import DPI
from tests.outer.legible import illegible

FIGURES = Path(__file__).parents[1] / "docs/figures"


@pytest.mark.parametrize("script", sorted(FIGURES.glob("*.py")), ids=lambda path: path.name)
def test_a_figure_can_be_read(script: Path) -> None:
    figure = runpy.run_path(str(script))[script.stem]()
    assert illegible(figure) == []
    with Image.open(script.with_suffix(".png")) as image:
        assert image.size == tuple(round(DPI * inches) for inches in figure.get_size_inches())
    plt.close(figure)
