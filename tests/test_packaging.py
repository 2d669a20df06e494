"""The wheel and the source distribution: what they hold, and that the wheel works where the sources are not.

Both are built once, from a copy, as `python -m build` does; the wheel is installed in a new environment that borrows
torch and the rest from this one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import revdistill

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", "benchmarks", "cli", "docs", "revdistill", "tests")
FILES = ("*.md", "*.cfg", "*.toml", "*.txt", "*.cff", "*.yml", "MANIFEST.in", "LICENSE")
LEFT_OUT = re.compile(r"benchmarks/results/[^/]+\.(h5|png)")  # of the sources, all that the sdist may lack
SIZES = {"revdistill.tar.gz": 4, "revdistill.whl": 1}  # at most, in MiB


@dataclass(frozen=True)
class Built:
    sources: frozenset[str]  # paths in the copy that was built from
    sdist: Path  # unpacked
    wheel: Path
    sizes: Mapping[str, int]  # bytes by kind

    def names(self) -> list[str]:
        with zipfile.ZipFile(self.wheel) as wheel:
            return wheel.namelist()

    def metadata(self) -> Message:
        with zipfile.ZipFile(self.wheel) as wheel:
            return message_from_string(wheel.read(f"{self.information}/METADATA").decode())

    @property
    def information(self) -> str:
        return f"revdistill-{revdistill.__version__}.dist-info"


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """What it prints, where no variable of this process says where modules are."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MYPY", "PYTEST"))}
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel is built from the unpacked sdist, as `python -m build` does where it is told nothing else."""
    home = tmp_path_factory.mktemp("built")
    copy = home / "copy"
    unwanted = shutil.ignore_patterns("__pycache__", ".*_cache", "*.egg-info", "cuda-run", "site", "_build")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=unwanted)
    for pattern in FILES:
        for path in ROOT.glob(pattern):
            shutil.copy(path, copy)
    sources = frozenset(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", home / "dist", copy, cwd=home)
    (sdist,), (wheel,) = (home / "dist").glob("*.tar.gz"), (home / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(home, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    sizes = {"revdistill.tar.gz": sdist.stat().st_size, "revdistill.whl": wheel.stat().st_size}
    return Built(sources, home / sdist.name.removesuffix(".tar.gz"), wheel, sizes)


@pytest.fixture(scope="module")
def python(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter whose own site-packages have the wheel alone."""
    home = tmp_path_factory.mktemp("new")
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    found = next(path for path in (home / "bin/python", home / "Scripts/python.exe") if path.exists())
    pip = (sys.executable, "-m", "pip", "--python", found, "--disable-pip-version-check")
    run(*pip, "install", "-q", "--no-deps", "--no-index", "--no-compile", built.wheel, cwd=home)
    (own,) = home.rglob("site-packages")
    # Folders of a .pth file are searched, their own .pth files are not read: an editable install here stays unseen
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (own / "borrowed.pth").write_text("\n".join(borrowed))
    return found


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    assert ROOT not in tmp_path.parents
    return tmp_path


def test_the_wheel_has_the_library_and_nothing_else(built: Built) -> None:
    names = set(built.names())
    modules = [path for path in built.sources if re.match(r"(revdistill|cli)/.*\.py$", path)]
    expected = {re.sub("^cli/", "revdistill/cli/", path) for path in modules}
    assert {"revdistill/cli/main.py", "revdistill/engine/unroll.py"} < expected
    inside = {name for name in names if not name.startswith(f"{built.information}/")}
    assert inside == expected | {"revdistill/py.typed"}
    assert f"{built.information}/licenses/LICENSE" in names


def test_the_wheel_says_what_it_is(built: Built) -> None:
    metadata = built.metadata()
    assert (metadata["Name"], metadata["Version"]) == ("revdistill", revdistill.__version__)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    classifiers = metadata.get_all("Classifier", [])
    assert "Typing :: Typed" in classifiers
    versions = [c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)]
    assert versions == ["3.10", "3.11", "3.12", "3.13"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "DESCRIPTION.md").read_text()


def test_the_description_stands_alone() -> None:
    """A package index shows it without the files beside it."""
    text = (ROOT / "DESCRIPTION.md").read_text()
    assert not [target for target in re.findall(r"\]\(([^)]*)\)|src=", text) if not target.startswith("https://")]
    assert "Python 3.10 to 3.13" in text


def test_the_sdist_has_what_the_repository_has_but_most_results(built: Built) -> None:
    inside = {path.relative_to(built.sdist).as_posix() for path in built.sdist.rglob("*") if path.is_file()}
    missing = {path for path in built.sources - inside if not LEFT_OUT.fullmatch(path)}
    assert not missing, f"MANIFEST.in leaves out {sorted(missing)}"
    more = {path for path in inside - built.sources if not path.startswith("revdistill.egg-info/")}
    assert more == {"PKG-INFO"}
    assert all(built.sizes[kind] < most * 2**20 for kind, most in SIZES.items()), built.sizes


def test_the_pages_of_the_sdist_lead_somewhere(built: Built) -> None:
    pages = [built.sdist / "README.md", *(built.sdist / "docs").rglob("*.md")]
    assert len(pages) > 5
    for page in pages:
        text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
        for first, second in re.findall(r"\]\(([^)\s]+)[^)]*\)|src=\"([^\"]+)\"", text):
            target = (first or second).partition("#")[0]
            if target and "://" not in target and not target.startswith("mailto:"):
                found = (page.parent / target).resolve()
                name = found.relative_to(built.sdist.resolve()).as_posix()
                too_large = re.fullmatch(r"benchmarks/results/[^/]+\.h5", name) and (ROOT / name).exists()
                said = f"{page.relative_to(built.sdist)}: {target} is not in the sdist; MANIFEST.in says what is"
                assert found.exists() or too_large, said


def test_the_command_works_outside_the_sources(python: Path, elsewhere: Path) -> None:
    script = next(path for path in (python.parent / "revdistill", python.parent / "revdistill.exe") if path.exists())
    sizes = ("--steps", "2", "--epochs", "1", "--outer-steps", "2", "--inits", "1")
    run(script, "train", "--dataset", "moons", *sizes, "--out", "run", cwd=elsewhere)
    assert {"distilled.h5", "metrics.jsonl"} <= {path.name for path in (elsewhere / "run").iterdir()}


def test_the_example_of_the_description_runs_outside_the_sources(python: Path, elsewhere: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "DESCRIPTION.md").read_text(), flags=re.M | re.S)
    after = """
import runpy, sys
assert x.grad.shape == x.shape and bool(x.grad.any())
assert lr.grad.shape == (90,) and bool(lr.grad.all())
import importlib.util
import revdistill.cli
print(rd.__file__, revdistill.cli.__file__, *map(importlib.util.find_spec, ("cli", "tests", "benchmarks")), sep="\\n")
sys.argv = ["revdistill", "--version"]
runpy.run_module("revdistill.cli", run_name="__main__")  # python -m revdistill.cli
"""
    (elsewhere / "example.py").write_text(example + after)
    library, command, *others, version = run(python, "-W", "error", "example.py", cwd=elsewhere).splitlines()[:6]
    (own,) = python.parents[1].rglob("site-packages")
    assert Path(library) == own / "revdistill/__init__.py"
    assert Path(command) == own / "revdistill/cli/__init__.py"
    assert others == ["None"] * 3
    assert revdistill.__version__ in version


def test_types_reach_a_users_script(python: Path, elsewhere: Path) -> None:
    """Of torch and others mypy reads nothing here: their thousand modules would take it a minute."""
    (elsewhere / "mypy.ini").write_text(
        "[mypy]\nstrict = true\nfollow_imports = skip\n[mypy-revdistill.*]\nfollow_imports = normal\n"
    )
    (elsewhere / "right.py").write_text(
        "import revdistill as rd\n\noptimizer = rd.SGD(lr=0.1, momentum=0.9)\nadjoint = rd.Checkpoint(every=3)\n"
        "every: int | None = adjoint.every\n"
    )
    (elsewhere / "wrong.py").write_text(
        "import revdistill as rd\nfrom revdistill.cli.main import run\n\n"
        "rd.Checkpoint(every='3')\ncode: str = run([])\n"
    )
    mypy = (sys.executable, "-m", "mypy", "--python-executable", python, "--no-error-summary")
    found = run(*mypy, "right.py", "wrong.py", cwd=elsewhere, code=1).splitlines()
    assert [re.sub(r" error: .*\[", " [", line) for line in found] == [
        "wrong.py:4: [arg-type]",
        "wrong.py:5: [assignment]",
    ]


def test_the_version_is_the_same_everywhere() -> None:
    citation = dict(re.findall(r"^([\w-]+): *(\S.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.M))
    number, date = re.findall(r"^## \[([\d.]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[0]
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == "MIT"
    assert citation["version"] == number == revdistill.__version__
    assert citation["date-released"] == date
