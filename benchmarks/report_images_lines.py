"""Which artifact each figure of distilled images is of, and the command that gives it, from results/images.json and the
artifacts' own evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from image_cells import NETWORKS, TEST_IMAGES
from image_rows import HARD, row_of
from measuring import RESULTS
from report_images_race import in_words
from tables import table

from revdistill.distill.artifact import read

RAW = "raw"


@dataclass(frozen=True)
class Line:
    """A figure of the table, and where it comes from.

    Attributes:
        row: its name.
        network: that was trained.
        figure: of the table: schedule, restarts, mean, std, test_images.
        stored: the artifact's own evaluation of this network, or None.
    """

    row: str
    network: str
    figure: dict[str, Any]
    stored: dict[str, Any] | None

    @property
    def artifact(self) -> str:
        """From the repository's root."""
        return f"benchmarks/results/{self.row}.h5"

    @property
    def command(self) -> str:
        """That evaluates the artifact as the figure was measured, on all test images."""
        schedule = self.figure["schedule"]
        chosen = "" if schedule == RAW else f" --schedule {schedule}"
        restarts = self.figure["restarts"]
        count = "" if restarts == NETWORKS else f" --restarts {restarts}"
        return f"revdistill evaluate {self.artifact} --arch {self.network}{chosen}{count} --data-dir DIR"

    @property
    def differs(self) -> str:
        """Why the artifact does not say the same as the table; empty where it does."""
        if self.stored is None:
            narrow = " and ".join(self.narrow)
            return f"it has {narrow} alone" + (
                f"; the figure is of {TEST_IMAGES:,} of the test images, the line's of all" if self.on_some else ""
            )
        if self.stored["schedule"] != self.figure["schedule"]:
            return f"it has {in_words(self.stored)}, by {_steps(self.stored['schedule'])}"
        if self.stored["mean"] != self.figure["mean"]:
            return f"it has {in_words(self.stored)}"
        return ""

    @property
    def on_some(self) -> bool:
        """Whether the figure is of some test images only."""
        return bool(self.figure["test_images"] == TEST_IMAGES)

    @property
    def narrow(self) -> tuple[str, ...]:
        """The networks that the artifact was distilled for, and evaluated with."""
        return tuple(row_of(self.row).config.architectures)


def _steps(schedule: str) -> str:
    return "the learned steps" if schedule == RAW else schedule


def lines(results: dict[str, Any]) -> list[Line]:
    """Of all rows with an artifact: the networks that they are for."""
    found = []
    for name in results["rows"]:
        path = RESULTS / f"{name}.h5"
        if HARD in name or not path.exists():
            continue
        row, cells, evaluation = row_of(name), results["cells"].get(name, {}), read(path).evaluation
        for network in dict.fromkeys((*row.config.architectures, *row.made_for)):
            if network in cells:
                found.append(Line(name, network, cells[network], evaluation.get(network)))
    return found


def lines_table(results: dict[str, Any]) -> str:
    """A line for each figure; links as from the repository's root."""
    rows = []
    for line in lines(results):
        says = f"no, {line.differs}" if line.differs else "yes"
        rows.append([f"[{line.row}.h5]({line.artifact})", f"`{line.command}`", in_words(line.figure), says])
    without = [f"`{name}`" for name in results["rows"] if HARD in name]
    text = table(["artifact", "the command that gives the figure", "figure", "the artifact says the same"], rows)
    kept = f"\n\nOf hard labels ({', '.join(without)}) figures alone are kept." if without else ""
    return (
        f"{text}\n\nAn artifact keeps the evaluation of the end of its distillation: by the learned steps, on all test "
        "images, with the networks that it was distilled for. What was measured later, by a schedule that held-out "
        f"images chose or with a usual width, is in results/images.json.{kept}"
    )
