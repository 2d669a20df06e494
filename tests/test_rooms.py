"""Imports point one way: cli -> tune -> distill -> engine."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "revdistill/engine": (
        "revdistill.distill",
        "revdistill.tune",
        "revdistill.cli",
        "cli",
        "h5py",
        "click",
        "sklearn",
        "matplotlib",
        "tqdm",
    ),
    "revdistill/distill": ("revdistill.cli", "revdistill.tune", "cli", "click"),
    "revdistill/tune": ("revdistill.cli", "cli", "click"),
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
