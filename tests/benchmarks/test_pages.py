"""README.md, docs/*.md and benchmarks/README.md say what results/ says, wherever their sections are moved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pages
import pytest
import report
import report_attribution
import report_bits
import report_front
import report_memory
import report_speed
from matplotlib import pyplot as plt
from methods import METHODS
from PIL import Image

from revdistill.outer.drawing import DPI, WIDTH
from tests.outer.legible import illegible

MARKS = "<!-- {0}: written by benchmarks/report.py -->\n{1}\n<!-- /{0} -->\n"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return report.everything()


@pytest.fixture(scope="module")
def sections(results: dict[str, Any]) -> dict[str, str]:
    return report.sections(results)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "more").mkdir(parents=True)
    (tmp_path / "README.md").write_text("before\n" + MARKS.format("speed", "old") + "between\n")
    (tmp_path / "docs" / "page.md").write_text(MARKS.format("memory", "old") + MARKS.format("speed", "older"))
    (tmp_path / "docs" / "more" / "deep.md").write_text("no marks\n")
    return tmp_path


def test_a_section_is_written_wherever_its_marks_are(root: Path) -> None:
    sections = {"speed": "fast, [x](benchmarks/results/x.h5), [y](https://benchmarks/)", "memory": "flat"}
    pages.write(sections, root)
    assert (root / "README.md").read_text() == "before\n" + MARKS.format("speed", sections["speed"]) + "between\n"
    there = "fast, [x](../benchmarks/results/x.h5), [y](https://benchmarks/)"
    assert (root / "docs/page.md").read_text() == MARKS.format("memory", "flat") + MARKS.format("speed", there)
    (root / "docs/more/deep.md").write_text((root / "docs/page.md").read_text())
    (root / "docs/page.md").write_text("moved\n")
    pages.write(sections, root)
    assert "(../../benchmarks/results/x.h5)" in (root / "docs/more/deep.md").read_text()
    assert (root / "docs/page.md").read_text() == "moved\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("README.md", "no marks", "no page has the marks of bits; "),
        ("README.md", MARKS.format("bits", "") + MARKS.format("bits", ""), "README.md has the marks of bits twice"),
        ("README.md", MARKS.format("bits", "").replace("<!-- /bits -->", ""), "has <!-- bits: ... --> without <!-- /"),
        ("README.md", MARKS.format("bits", MARKS.format("speed", "")), "<!-- /bits --> before the next section"),
        (
            "docs/page.md",
            MARKS.format("bytes", ""),
            "page.md has the marks of bytes, which is no section; accepted are",
        ),
    ],
)
def test_marks_that_are_missing_or_wrong_are_named(root: Path, name: str, content: str, message: str) -> None:
    """And nothing is written then."""
    before = {path: path.read_text() for path in pages.pages(root)} | {root / name: content}
    (root / name).write_text(content)
    sections = {"speed": "new", "memory": "new"} | ({"bits": "new"} if "bits" in message else {})
    with pytest.raises(pages.MarkError, match=re.escape(message)):
        pages.write(sections, root)
    assert {path: path.read_text() for path in pages.pages(root)} == before


def test_the_committed_pages_are_what_report_writes(results: dict[str, Any], sections: dict[str, str]) -> None:
    """Otherwise: python benchmarks/report.py."""
    assert pages.homeless(sections) == []
    for path in pages.pages():
        assert path.read_text() == pages.filled(path, sections), f"{path} is stale: python benchmarks/report.py"
    assert report.own_page(results) == (pages.ROOT / "benchmarks/README.md").read_text()


def test_pictures_can_be_read_and_name_every_line(results: dict[str, Any]) -> None:
    """At the width that a README shows; those of the study and of the images are drawn by other tests."""
    for name, module in (("speed", report_speed), ("bits", report_bits), ("attribution", report_attribution)):
        assert illegible(module.picture(results[name])) == []
    assert set(report_memory.LINES) == set(METHODS) - {"training"}
    figure = report_memory.picture(results["memory"])
    assert illegible(figure) == []
    handles, names = figure.legends[0].legend_handles, [text.get_text() for text in figure.legends[0].get_texts()]
    named = {(h.get_color(), h.get_marker(), h.get_linestyle()): name for h, name in zip(handles, names, strict=True)}
    assert len(named) == len(names)
    for ax, entry in zip(figure.axes, results["memory"]["tasks"], strict=True):
        measured = [m["method"] for m in entry["methods"] if m["runs"]]
        drawn = [named[line.get_color(), line.get_marker(), line.get_linestyle()] for line in ax.lines]
        assert drawn == [METHODS[method].title for method in measured]
    plt.close("all")


@pytest.mark.parametrize("path", sorted((pages.ROOT / "benchmarks/results").glob("*.png")), ids=lambda path: path.name)
def test_committed_pictures_are_no_wider_than_they_need_to_be(path: Path) -> None:
    """And not large: what is shown at 830 pixels."""
    with Image.open(path) as image:
        assert 400 < image.width <= 1.02 * WIDTH * DPI
    assert path.stat().st_size < 700_000


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in text.splitlines() if line[:2] == "| "][
        1:
    ]


def test_the_front_tables_are_short_and_say_what_the_results_say(
    results: dict[str, Any], sections: dict[str, str]
) -> None:
    memory, attribution, distillation = (
        rows(sections[f"front-{name}"]) for name in ("memory", "attribution", "distillation")
    )
    assert all(0 < len(found) <= report_front.MOST_ROWS for found in (memory, attribution, distillation))
    for i, entry in enumerate(results["memory"]["tasks"]):
        ours, autograd = memory[2 * i : 2 * i + 2]
        for row, method in ((ours, "reversible"), (autograd, "autograd")):
            runs = next(m for m in entry["methods"] if m["method"] == method)["runs"]
            known = {run["steps"]: f"{run['bytes'] / 2**20:,.0f} MiB" for run in runs}
            assert row[2:5] == [known.get(steps, "-") for steps in (100, 1_000, 10_000)]
        timed = [e for e in results["speed"]["tasks"] if e["task"] == entry["task"]]
        methods = {m["method"]: m["ratio_to_autograd"] for e in timed for m in e["methods"]}
        assert ours[-1] == (f"{methods['reversible']:.2f}" if methods else "-")
        assert autograd[-1] == "1.00"
    shown = [c for c in results["attribution"]["cells"] if c["lr"] in (0.01, 0.001) and c["inputs"] == "pixels"]
    for row, cell in zip(attribution, shown, strict=True):
        assert row[0].startswith(f"{cell['architecture']}, {cell['activation']}, {cell['optimizer']} {cell['lr']:g}")
        assert row[2:5] == [f"{drop['methods']['ours']['lds']:.3f}" for drop in cell["drops"]]
        others = [one["lds"] for name, one in cell["drops"][0]["methods"].items() if name != "ours"]
        assert row[5].startswith(f"{max(others):.3f} (")
    for row in distillation:
        name = re.fullmatch(r"\[(\w+)\.h5\]\(benchmarks/results/\1\.h5\)", row[-1])
        assert name
        assert (pages.ROOT / f"benchmarks/results/{name[1]}.h5").exists()
        assert row[2].split("%")[0] in {f"{c['mean']:.1%}"[:-1] for c in results["images"]["cells"][name[1]].values()}
