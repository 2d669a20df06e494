"""A checkout that is not installed: the folder of the command, revdistill.cli where it is, lies beside this package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).resolve().parents[1]
_COMMAND = _ROOT / "cli"


class _BesideThisPackage(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "revdistill.cli":
            return None
        return spec_from_file_location(name, _COMMAND / "__init__.py", submodule_search_locations=[str(_COMMAND)])


def find_the_command() -> None:
    """Make `python -m revdistill.cli` work here too; last of all finders, so that an installed one goes first."""
    if (_COMMAND / "main.py").exists() and (_ROOT / "setup.cfg").exists():
        sys.meta_path.append(_BesideThisPackage())
