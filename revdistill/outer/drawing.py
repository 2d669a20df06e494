"""Pictures as files, and names that fit on them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import matplotlib

from revdistill.outer.files import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

MAX_NAME = 12  # characters over an image's column


def figure_files(folder: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Write each figure to folder/NAME.png, whole or not at all, and close it.

    Returns:
        The files.

    Raises:
        OSError: one cannot be written.
    """
    folder.mkdir(exist_ok=True)
    written = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        with replacing(path) as temporary, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # names of classes may be in any script
            figure.savefig(temporary, format="png", dpi=150)
        plt.close(figure)
        written.append(path)
    return written


def plain(name: object) -> str:
    """A name that fits over an image; $ would make matplotlib take it for mathematics."""
    text = str(name)
    short = text if len(text) <= MAX_NAME else text[: MAX_NAME - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in short).replace("$", r"\$")
