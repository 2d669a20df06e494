"""Whether the texts of a picture can be read where a README shows it."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from revdistill.outer.drawing import DPI


def illegible(figure: Figure, shown: float = 830.0) -> list[str]:
    """The texts of a figure that are too small or too pale where it is shown.

    Args:
        figure: drawn.
        shown: pixels that a picture is wide at most; one that has fewer is shown as it is.

    Returns:
        A line for each text of less than 9 pixels, or a contrast with white below 4.5.
    """
    per_point = min(shown / figure.get_figwidth(), DPI) / 72
    figure.draw_without_rendering()  # ticks have their texts from then on
    found = []
    for text in figure.findobj(Text):
        if not text.get_text() or not text.get_visible():
            continue
        channels = np.array(to_rgb(text.get_color()))
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        contrast = 1.05 / (float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
        pixels = text.get_fontsize() * per_point
        if pixels < 9 or contrast < 4.5:
            found.append(f"{text.get_text()!r}: {pixels:.1f} pixels, contrast {contrast:.1f}")
    return found
