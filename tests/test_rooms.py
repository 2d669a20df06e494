"""Imports point one way: cli -> distill, tune, attribute -> outer -> engine; siblings import nothing of each other."""

from __future__ import annotations

import ast
import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OF_FILES_AND_COMMANDS = ("h5py", "click", "sklearn", "matplotlib")
SIBLINGS = ("revdistill.distill", "revdistill.tune", "revdistill.attribute")
# what a room may not import, by the room's folder
FORBIDDEN = {
    "revdistill/engine": ("revdistill.outer", *SIBLINGS, "revdistill.cli", "cli", *OF_FILES_AND_COMMANDS),
    "revdistill/outer": (*SIBLINGS, "revdistill.cli", "cli", "click"),
    **{
        sibling.replace(".", "/"): (*(s for s in SIBLINGS if s != sibling), "revdistill.cli", "cli", "click")
        for sibling in SIBLINGS
    },
}
# likewise, of the engine's own rooms
_TOP = tuple(f"revdistill.engine.{name}" for name in ("unroll", "arguments", "selfcheck"))
_ROOMS = {
    name: f"revdistill.engine.{name}" for name in ("integers", "loss", "optimizers", "adjoints", "problem", "ranks")
}
INSIDE_THE_ENGINE = {
    "integers": (_ROOMS["loss"], _ROOMS["optimizers"], _ROOMS["adjoints"], _ROOMS["problem"]),
    "loss": (_ROOMS["optimizers"], _ROOMS["adjoints"], _ROOMS["problem"], _ROOMS["ranks"]),
    "optimizers": (_ROOMS["loss"], _ROOMS["adjoints"], _ROOMS["problem"], _ROOMS["ranks"]),
    "adjoints": (),
    "ranks": (_ROOMS["adjoints"], _ROOMS["problem"]),
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or room_of(path) == "cli", (
                f"{path}: relative imports are for cli only, which has two names"
            )
            if node.level:
                continue
            assert node.module
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_point_one_way(room: str) -> None:
    modules = sorted((ROOT / room).rglob("*.py"))
    assert len(modules) > 5
    for path in modules:
        for name in imported(path):
            wrong = [f for f in FORBIDDEN[room] if name == f or name.startswith(f + ".")]
            assert not wrong, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", INSIDE_THE_ENGINE)
def test_the_engines_rooms_import_one_way(room: str) -> None:
    """unroll -> adjoints -> ranks -> optimizers, loss -> integers."""
    for path in sorted((ROOT / "revdistill/engine" / room).glob("*.py")):
        for name in imported(path):
            wrong = [f for f in (*INSIDE_THE_ENGINE[room], *_TOP) if name == f or name.startswith(f + ".")]
            assert not wrong, f"{path.relative_to(ROOT)} imports {name}"


def test_every_room_of_the_library_has_its_direction() -> None:
    rooms = {f"revdistill/{p.name}" for p in (ROOT / "revdistill").iterdir() if (p / "__init__.py").exists()}
    assert rooms == set(FORBIDDEN)


def test_an_installed_library_is_whole() -> None:
    """An editable install finds every folder; a wheel has the packages that setup.cfg names."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = set(setup["options"]["packages"].split())
    assert named == {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "revdistill").rglob("__init__.py")} | {
        "revdistill.cli"
    }


def test_nothing_is_pickled() -> None:
    for room in ("revdistill", "cli", "benchmarks"):
        for path in (ROOT / room).rglob("*.py"):
            assert not {n for n in imported(path) if n.split(".")[0] in ("pickle", "dill", "joblib", "shelve")}, path
            assert "torch.save(" not in path.read_text(), path
            assert "torch.load(" not in path.read_text(), path


def test_modules_stay_small() -> None:
    for room in ("revdistill", "cli"):
        for path in (ROOT / room).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 350, path
