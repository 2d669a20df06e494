"""README.md and the pages in docs/: examples run, one after another, as a reader would type them; commands are ones
that there are; links lead somewhere; the site builds.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from revdistill.cli.main import cli

from revdistill.tune import schedule

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
OWN = ("data", "distillation", "several-processes")  # their tests make what they need: files, processes
EXAMPLES = [page for page in PAGES if page.stem not in OWN and "```python" in page.read_text()]
SHORTER = {README: ("3000", "60")}  # steps


def name(page: Path) -> str:
    """From the repository's root."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[str]:
    """Its Python."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def tuned(directory: Path) -> None:
    """What docs/tuning.md's command leaves: a schedule of 100 steps."""
    rates, one = np.full((100, 1), 0.05, np.float32), np.ones(1, np.float32)
    schedule.write(directory, schedule.Schedule(rates, rates, 0 * one, one, "sgd", [schedule.ALL]))


@pytest.mark.parametrize("page", EXAMPLES, ids=name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/tune-digits").mkdir(parents=True)
    tuned(tmp_path / "runs/tune-digits")
    names: dict[str, object] = {}
    for example in blocks(page):
        if page in SHORTER:
            long, short = SHORTER[page]
            assert long in example
            example = example.replace(long, short)
        exec(compile(example, str(page), "exec", dont_inherit=True), names)


def test_every_page_with_examples_is_run_here_or_has_a_test_of_its_own() -> None:
    for stem in OWN:
        assert blocks(DOCS / f"{stem}.md")
        stems = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
        assert f"test_{stem.replace('-', '_')}_page" in stems
    assert len(EXAMPLES) >= 7


def commands(page: Path) -> list[str]:
    """Its command lines: indented, or in the README's table; other pages quote parts of one."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^    (?:.*--no-python )?(revdistill .*)$", text, flags=re.M)
    quoted = re.findall(r"`(revdistill [a-z]+ [^`]*)`", text) if page == README else []
    return [re.split(r" {2,}(?=[a-z])| && ", line)[0] for line in [*lines, *quoted]]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_commands_are_ones_that_there_are(page: Path) -> None:
    """Parsed by click, as a shell would hand them over; not run."""
    for line in commands(page):
        _, command, *arguments = shlex.split(line.replace("...", ""))
        if "[" in line:  # usage
            continue
        found = cli.commands.get(command)
        assert found is not None, line
        try:
            found.make_context(command, arguments, parent=click.Context(cli, **cli.context_settings))
        except click.exceptions.Exit:
            pass  # --help
        except click.ClickException as error:
            pytest.fail(f"{line}: {error.format_message()}")


def anchors(page: Path) -> set[str]:
    """As GitHub names headings."""
    found: list[str] = []
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return set(found)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks/README.md"], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(there), f"{target}: no such heading; there are {sorted(anchors(there))}"


def test_every_page_is_one_or_two_clicks_from_the_readme() -> None:
    front = {name(README), name(DOCS / "README.md")}
    found = set(front)
    for page in (README, DOCS / "README.md"):
        for target in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
            if not target.startswith("http"):
                found.add((page.parent / target).resolve().relative_to(ROOT).as_posix())
    assert {name(page) for page in PAGES} <= found


def test_the_readme_is_read_in_two_minutes() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    tables = re.findall(r"(?:^\|.*\n)+", README.read_text(), flags=re.M)
    assert max(table.count("\n") for table in tables) <= 10  # eight rows


def test_the_site_builds(tmp_path: Path) -> None:
    """With every warning an error (mkdocs.yml: strict): links, anchors, docstrings."""
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr[-2000:]
    page = (tmp_path / "site/api/index.html").read_text()
    for public in ("unroll", "Reversible", "attribute", "schedule_lr", "ReversalError"):
        assert re.search(rf'<h\d id="[\w.]*\.{public}"', page), public
    assert (tmp_path / "site/benchmarks/results/memory.png").exists()
