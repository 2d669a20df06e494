"""docs/examples/README.md and docs/notebooks, from the scripts in docs/examples, which are run at full size.

python docs/make_examples.py    one after another, each in a process of its own with one thread; some five minutes
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES, NOTEBOOKS = Path(__file__).with_name("examples"), Path(__file__).with_name("notebooks")
ORDER = ("own_module", "schedule", "flipped_labels", "weights", "initialisation", "transformer")
AS_NOTEBOOKS = ("own_module", "schedule")
FRONT = """# Examples

<!-- written by docs/make_examples.py, with what the scripts printed and drew; do not edit -->

Six scripts of at most 60 lines, to be copied. They import what is public of revdistill alone, download nothing, print
what they found on data that nothing was learned from, and draw a picture. Start with the one that is like yours:"""
BACK = """Seconds are those of one core of {machine}.

`python docs/examples/own_module.py` runs one, and writes its picture to where you are. With `--small` it is a quick
look at the same code, in seconds, whose figures mean less. What is shown here came from `python docs/make_examples.py`,
which runs all six at full size."""


def title(script: Path) -> str:
    """The docstring's first line."""
    return _docstring(script)[0]


def _docstring(script: Path) -> tuple[str, str]:
    first, _, rest = (ast.get_docstring(ast.parse(script.read_text())) or "").partition("\n\n")
    return first, rest


def cells(script: Path) -> list[tuple[str, str]]:
    """A script as a notebook's cells, each "markdown" or "code" and its text: the docstring, the code, and before the
    code that follows a line `# %% words` these words.
    """
    first, rest = _docstring(script)
    code = script.read_text().split('"""\n', 2)[-1]
    found = [("markdown", f"# {first}\n\n{rest}\n\nThe script: [{script.name}](../examples/{script.name}).")]
    for part in re.split(r"^# %% ", "\n" + code, flags=re.M):
        words, _, lines = part.partition("\n")
        found += [("markdown", words)] * bool(words) + [("code", lines.strip("\n"))]
    return found


def notebook(script: Path) -> Any:
    """The same, not run. The cells' names are numbers, so that a notebook made again differs in what it shows alone."""
    import nbformat.v4 as nb

    made = [
        nb.new_markdown_cell(text, id=f"cell-{i}") if kind == "markdown" else nb.new_code_cell(text, id=f"cell-{i}")
        for i, (kind, text) in enumerate(cells(script))
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nb.new_notebook(cells=made, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def run_notebook(made: Any, directory: Path) -> None:
    """Run it in a kernel of this Python, in a directory, where its pictures go; the cells keep what they show.

    Raises:
        CellExecutionError: names the cell and what it raised.
    """
    from nbclient import NotebookClient

    metadata = dict(made.metadata)
    NotebookClient(made, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(directory)}}).execute()
    made.metadata = metadata  # without the version of this Python
    for cell in made.cells:
        cell.metadata = {}  # when it ran


def _run(script: Path) -> tuple[str, float]:
    """What it prints, and its seconds of one core, whatever else the machine does."""
    began = sum(os.times()[2:4])
    command = [sys.executable, "-W", "error", script.name]
    done = subprocess.run(command, cwd=EXAMPLES, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip(), sum(os.times()[2:4]) - began


def page(results: dict[str, tuple[str, float]], machine: str) -> str:
    """docs/examples/README.md. results: of each script, what it printed and its seconds."""
    table = ["| script | what is learned | seconds |", "|---|---|---|"]
    sections = []
    for name, (printed, seconds) in results.items():
        first = title(EXAMPLES / f"{name}.py")
        note = f", [notebook](../notebooks/{name}.ipynb)" if name in AS_NOTEBOOKS else ""
        table.append(f"| [{name}.py]({name}.py){note} | {first[:-1]} | {seconds:.0f} |")
        rest = _docstring(EXAMPLES / f"{name}.py")[1]
        lines = "\n".join(f"    {line}" for line in printed.splitlines())
        sections.append(f"## {name}.py\n\n{first}\n\n{rest}\n\n{lines}\n\n![what {name}.py draws]({name}.png)")
    return "\n\n".join([FRONT, "\n".join(table), BACK.format(machine=machine), *sections]) + "\n"


def main() -> None:
    """Run and write everything."""
    import nbformat

    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from measuring import machine, versions
    from tables import where

    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    results = {}
    for name in ORDER:
        results[name] = _run(EXAMPLES / f"{name}.py")
        print(name, f"{results[name][1]:.0f} s", results[name][0], sep="\n", flush=True)
    (EXAMPLES / "README.md").write_text(page(results, where({"machine": machine("cpu", 1), "versions": versions()})))
    del os.environ["MPLBACKEND"]
    for name in AS_NOTEBOOKS:
        made = notebook(EXAMPLES / f"{name}.py")
        with tempfile.TemporaryDirectory() as elsewhere:  # a notebook's picture has other pixels
            run_notebook(made, Path(elsewhere))
        nbformat.write(made, NOTEBOOKS / f"{name}.ipynb")


if __name__ == "__main__":
    main()
