"""Every figure of distilled images names its artifact and the command that gives it."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import report_images
import report_images_lines
from click.testing import CliRunner
from image_rows import HARD, row_of
from report_images_lines import Line
from revdistill.cli.main import cli

from revdistill.distill.artifact import read
from revdistill.outer.data import DATA_DIR, load

ROOT = Path(__file__).parents[2]
MEASURED = json.loads((ROOT / "benchmarks/results/images.json").read_text())
LINES = report_images_lines.lines(MEASURED)


def name(line: Line) -> str:
    return f"{line.row}-{line.network}"


@pytest.mark.parametrize("line", LINES, ids=name)
def test_a_line_is_a_command_that_there_is_and_of_the_figure(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where the line is typed
    _, command, *words = shlex.split(line.command)
    found = cli.commands[command].make_context(command, words).params
    assert found["run"].is_file()
    assert found["run"].stem == line.row
    assert found["architectures"] == (line.network,)
    assert (found["schedule"], found["restarts"]) == (line.figure["schedule"], line.figure["restarts"])
    assert found["data_dir"] == Path("DIR")


@pytest.mark.parametrize("line", LINES, ids=name)
def test_the_artifact_says_the_same_or_why_not(line: Line) -> None:
    stored = read(ROOT / line.artifact).evaluation
    assert set(stored) == set(row_of(line.row).config.architectures)
    if line.network not in stored:
        some = "; the figure is of 2,000 of the test images" if line.figure["test_images"] == 2000 else ""
        assert line.differs.startswith(f"it has {next(iter(stored))} alone{some}")
        return
    own = stored[line.network]
    assert line.figure["test_images"] == 10_000
    if line.differs:
        assert own["schedule"] != line.figure["schedule"]
        assert f"{own['mean']:.1%}" in line.differs
    else:
        assert (own["mean"], own["std"], own["schedule"]) == tuple(line.figure[k] for k in ("mean", "std", "schedule"))


def test_every_row_has_its_lines() -> None:
    text = report_images_lines.lines_table(MEASURED) + report_images.full_table(MEASURED)
    for row in MEASURED["rows"]:
        if HARD in row:
            assert f"`{row}`" in text.split("figures alone are kept")[0]
            continue
        own = {line.network: line for line in LINES if line.row == row}
        assert set(row_of(row).made_for) <= {network.partition(":")[0] for network in own}
        for line in own.values():
            assert f"(benchmarks/results/{row}.h5) | `{line.command}` | {line.figure['mean']:.1%}" in text
            assert f"{line.figure['mean']:.1%}" in re.search(rf"^\| \[{row}\].*", text, flags=re.M | re.S)[0]  # type: ignore[index]


@pytest.mark.slow
def test_lines_give_their_figures() -> None:
    """With the real images: where REVDISTILL_DATA_DIR has MNIST."""
    directory = Path(os.environ.get("REVDISTILL_DATA_DIR", DATA_DIR))
    try:
        load("mnist", directory)
    except ValueError:
        pytest.skip("MNIST is not in REVDISTILL_DATA_DIR")
    for row in ("mnist_fixed_10", "mnist_2018_100", "mnist_lenet_10"):
        (line,) = (line for line in LINES if line.row == row)
        _, *words = shlex.split(line.command.replace("benchmarks/", f"{ROOT}/benchmarks/"))
        result = CliRunner().invoke(cli, [*words[:-1], str(directory), "--json"])
        found = json.loads(result.stdout)[line.network]
        assert found["mean"] == pytest.approx(line.figure["mean"], abs=max(line.figure["std"], 1e-3)), row
