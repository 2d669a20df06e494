"""How pictures look, here and in benchmarks/; pictures as files, and names that fit on them.

A picture in a README is shown 830 pixels wide at most. So none is wider than WIDTH inches, where a point of type is
1.39 pixels: 7 points are 9.7. Colours have a contrast of at least 4.5 with white, so that they serve for text too.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
from cycler import cycler
from PIL import Image, ImageChops

from revdistill.outer.files import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

MAX_NAME = 12  # characters over an image's column
WIDTH = 8.3  # inches of the widest pictures
SMALL = 7.0  # points: the smallest type
DPI = 144
COLOURS = ("#0072b2", "#b84a00", "#00795a", "#a8407b", "#8a6a00", "#5b4bb0")
BLUE, RED, GREEN = COLOURS[:3]
INK, FAINT = "#222222", "#666666"  # of text and axes; of what stands in the background
STYLE: Any = {  # matplotlib names the keys in its types from 3.11 on only
    "figure.facecolor": "white",
    "font.size": 8.5,
    "figure.titlesize": 9.5,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.axisbelow": True,
    "grid.color": "#d5d5d5",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.06,
}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw in the shared style, and leave matplotlib's settings as they were."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with plt.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


@styled
def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, whole or not at all, and close it.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names of classes may be in any script
        made = io.BytesIO()
        figure.savefig(made, format="png", dpi=DPI)
        _small(Image.open(made)).save(temporary, format="png", dpi=(DPI, DPI))
    plt.close(figure)


def _small(image: Image.Image) -> Image.Image:
    """Without the channels that it has no use for."""
    coloured = image.convert("RGB")
    red, green, blue = coloured.split()
    grey = all(ImageChops.difference(red, other).getbbox() is None for other in (green, blue))
    return red if grey else coloured


def figure_files(folder: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Write each figure to folder/NAME.png, whole or not at all, and close it.

    Returns:
        The files.

    Raises:
        OSError: one cannot be written.
    """
    folder.mkdir(exist_ok=True)
    written = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(written, figures.values(), strict=True):
        save(figure, path)
    return written


def plain(name: object) -> str:
    """A name that fits over an image; $ would make matplotlib take it for mathematics."""
    text = str(name)
    short = text if len(text) <= MAX_NAME else text[: MAX_NAME - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in short).replace("$", r"\$")
