"""The figure of docs/how-it-works.md: a step of SGD on integers, and the way back with the sweep beside it.

python docs/figures/how_it_works.py          writes how_it_works.png beside this file
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from revdistill.outer.drawing import BLUE, GREEN, INK, RED, WIDTH, save, styled

# Places of both panels: the moves stand over each other, so that the way back reads as the step from right to left.
START, DECAY, KICK, DRIFT, END = 0.55, 2.35, 4.6, 6.85, 8.75
THETA, V, STORE = 3.55, 2.35, 1.0
PALE = {BLUE: "#e3eff7", RED: "#f8e6da", GREEN: "#e0f0ec", INK: "#efefef"}
HEIGHT = 0.62


def box(ax: Axes, x: float, y: float, text: str, colour: str = INK, width: float = 1.9, height: float = HEIGHT) -> None:
    """A box around a text, centred."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=PALE[colour], ec=colour, lw=1, zorder=2))
    ax.text(x, y, text, ha="center", va="center", fontsize=8, zorder=3)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """From one place to another, behind the boxes."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.3, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
    ax.annotate("", end, start, arrowprops=style, zorder=1)


def note(ax: Axes, x: float, y: float, text: str, colour: str = INK, align: str = "left") -> None:
    """A text beside an arrow."""
    ax.text(x, y, text, ha=align, va="center", fontsize=7.5, color=colour)


def panel(ax: Axes, title: str, low: float) -> None:
    """Without axes, with the names of the lanes and the states at both ends."""
    ax.set(xlim=(-0.15, 9.45), ylim=(low, 4.35))
    ax.axis("off")
    ax.set_title(title, loc="left", fontsize=9.5, fontweight="bold", pad=4)
    for y, name in ((THETA, r"\theta"), (V, "v")):
        box(ax, START, y, f"${name}_k$", width=0.8)
        box(ax, END, y, f"${name}_{{k+1}}$", width=0.95)


def forward(ax: Axes) -> None:
    """The three moves, and where the bits go that the decay would destroy."""
    panel(ax, "A step: all state is integers, q for q / 2$^{44}$", low=0.45)
    box(ax, DECAY, V, "decay\n" + r"$v \leftarrow \lfloor (v\,n + d)\,/\,2^{16} \rfloor$", BLUE)
    box(ax, KICK, V, "kick\n" + r"$v \leftarrow v + \mathrm{round}(g)$", BLUE)
    box(ax, DRIFT, THETA, "drift\n" + r"$\theta \leftarrow \theta - \mathrm{round}(lr\,v)$", BLUE)
    box(ax, KICK, THETA - 0.02, r"gradient $g$ of the loss at $\theta_k$", width=2.25, height=0.5)
    box(ax, DECAY, STORE, "head: 52 bits\nof each parameter", GREEN)
    box(ax, KICK + 0.45, STORE, "words of 16 bits: in memory,\non the host, or in a file", GREEN, width=2.5)
    arrow(ax, (START + 0.4, THETA), (KICK - 1.13, THETA))
    arrow(ax, (KICK + 1.13, THETA), (DRIFT - 0.95, THETA))
    arrow(ax, (DRIFT + 0.95, THETA), (END - 0.48, THETA))
    arrow(ax, (START + 0.4, V), (DECAY - 0.95, V))
    arrow(ax, (DECAY + 0.95, V), (KICK - 0.95, V))
    arrow(ax, (KICK + 0.95, V), (END - 0.48, V))
    arrow(ax, (KICK, THETA - 0.27), (KICK, V + 0.31))
    arrow(ax, (DRIFT, V), (DRIFT, THETA - 0.31))
    note(ax, KICK + 0.1, (THETA + V) / 2, "evaluated once")
    note(ax, DRIFT + 0.1, (THETA + V) / 2, "the new v")
    arrow(ax, (DECAY - 0.35, STORE + 0.31), (DECAY - 0.35, V - 0.31), GREEN)
    arrow(ax, (DECAY + 0.35, V - 0.31), (DECAY + 0.35, STORE + 0.31), GREEN)
    note(ax, DECAY - 0.43, (V + STORE) / 2, "pop a digit\nd = head mod n", GREEN, "right")
    note(ax, DECAY + 0.43, (V + STORE) / 2, r"push the low 16 bits of $v\,n + d$", GREEN)
    arrow(ax, (DECAY + 0.95, STORE), (KICK - 0.8, STORE), GREEN)
    note(ax, DECAY + 1.21, STORE + 0.17, "spill", GREEN, "center")
    bits = r"$\log_2(1\,/\,\mathrm{momentum})$ bits per parameter"
    note(ax, DRIFT - 0.3, STORE + 0.1, f"n / 2$^{{16}}$ is the momentum. Kept in all:\n{bits}\nand step (0.152 at 0.9)")


def back(ax: Axes) -> None:
    """The moves undone, and below each what the sweep does there."""
    panel(ax, "The way back, from right to left: each move undone, bit for bit; below it the sweep", low=-2.0)
    box(ax, DRIFT, THETA, "drift undone\n" + r"$\theta \leftarrow \theta + \mathrm{round}(lr\,v)$", RED)
    box(ax, KICK, THETA - 0.02, r"the same $g$ again, at $\theta_k$", width=2.25, height=0.5)
    box(ax, KICK, V, "kick undone\n" + r"$v \leftarrow v - \mathrm{round}(g)$", RED)
    undone = r"$w = v\,2^{16} + \mathrm{low}$;  $v \leftarrow \lfloor w / n \rfloor$"
    box(ax, DECAY, V, f"decay undone\n{undone}", RED, 2.05)
    box(ax, DECAY, STORE, "head: 52 bits\nof each parameter", GREEN)
    box(ax, KICK + 0.45, STORE, "words of 16 bits", GREEN, width=2.5)
    arrow(ax, (END - 0.48, THETA), (DRIFT + 0.95, THETA))
    arrow(ax, (DRIFT - 0.95, THETA), (KICK + 1.13, THETA))
    arrow(ax, (KICK - 1.13, THETA), (START + 0.4, THETA))
    arrow(ax, (END - 0.48, V), (KICK + 0.95, V))
    arrow(ax, (KICK - 0.95, V), (DECAY + 1.03, V))
    arrow(ax, (DECAY - 1.03, V), (START + 0.4, V))
    arrow(ax, (DRIFT, V), (DRIFT, THETA - 0.31))
    arrow(ax, (KICK, THETA - 0.27), (KICK, V + 0.31))
    arrow(ax, (DECAY + 0.35, STORE + 0.31), (DECAY + 0.35, V - 0.31), GREEN)
    arrow(ax, (DECAY - 0.35, V - 0.31), (DECAY - 0.35, STORE + 0.31), GREEN)
    note(ax, DECAY - 0.43, (V + STORE) / 2, "push the digit\nd = w mod n", GREEN, "right")
    note(ax, DECAY + 0.43, (V + STORE) / 2, "pop the low 16 bits", GREEN)
    arrow(ax, (KICK - 0.8, STORE), (DECAY + 0.95, STORE), GREEN)
    note(ax, DECAY + 1.21, STORE + 0.17, "refill", GREEN, "center")
    checked = "At the end $\\theta_0$, $v_0$ must be the start's\nbits, and the store empty: otherwise\n"
    note(ax, DRIFT - 0.3, STORE + 0.1, f"{checked}ReversalError, and no hypergradient.")
    ax.plot([-0.1, 9.4], [0.42, 0.42], color="#bbbbbb", lw=0.8)
    sweep(ax)


def sweep(ax: Axes) -> None:
    """Bars are derivatives of the outer loss L; what is summed up is in bold."""
    y, low = -0.35, -1.45
    box(ax, END, y, r"$\bar\theta,\ \bar v$", width=0.95)
    box(ax, DRIFT, y, r"$\bar v \leftarrow \bar v - lr\,\bar\theta$", BLUE)
    product = r"\partial\langle g, \bar g\rangle / \partial"
    box(ax, KICK, y, rf"$\bar g = \bar v$;   $\bar\theta \leftarrow \bar\theta + {product}\theta$", BLUE, 2.4)
    box(ax, DECAY, y, r"$\bar v \leftarrow \mathrm{momentum}\ \bar v$", BLUE)
    box(ax, START, y, r"$\bar\theta,\ \bar v$", width=0.8)
    for right, left in ((END - 0.48, DRIFT + 0.95), (DRIFT - 0.95, KICK + 1.2), (KICK - 1.2, DECAY + 0.95)):
        arrow(ax, (right, y), (left, y))
    arrow(ax, (DECAY - 0.95, y), (START + 0.4, y))
    for x, text, width in (
        (DRIFT, r"$dL/dlr_k = -\langle \bar\theta, v_{k+1} \rangle$", 2.0),
        (
            KICK,
            rf"$dL/d\,\mathrm{{batch}} \ \leftarrow\ \ldots + {product}\,\mathrm{{batch}}$"
            + "\nand likewise dL/dhyper",
            2.4,
        ),
        (DECAY, r"first: $dL/d\,\mathrm{momentum}_k$" + "\n" + r"$= \langle \bar v, v_k \rangle$", 1.9),
        (START, "at $k$ = 0:\n" + r"$dL/d\theta_0$", 1.16),
    ):
        arrow(ax, (x, y - 0.31), (x, low + 0.34), RED)
        box(ax, x, low, text, RED, width, 0.68)
    note(ax, END, y - 0.62, r"$\bar x = dL/dx$" + "\nat $k + 1$", INK, "center")
    note(ax, END, low, "one step\nat a time", INK, "center")


@styled
def how_it_works() -> Figure:
    """Both panels."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(WIDTH, 8.0), height_ratios=(3.9, 6.35), layout="constrained")
    forward(above)
    back(below)
    return figure


if __name__ == "__main__":
    path = Path(__file__).with_suffix(".png")
    save(how_it_works(), path)
    print(f"wrote {path}")
