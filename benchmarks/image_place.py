"""Where images.py keeps its rows, cells, runs, artifacts and pictures."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_rows import BASELINES, CUDA, HARD, ROWS
from measuring import HERE, RESULTS, machine, versions

from revdistill.distill.artifact import FILE_NAME, Artifact, read
from revdistill.distill.image_grid import images
from revdistill.outer.drawing import save

RUNS = HERE.parent / "runs" / "images"
JSON = "images.json"


class Kept:
    """The results in a JSON file, which several of these commands may write at the same time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """{"rows": {name: ...}, "cells": {set: {network: ...}}, ...}"""
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        return {"machine": machine("cpu"), "versions": versions(), "rows": {}, "cells": {}} | found

    def row(self, name: str, found: dict[str, Any]) -> None:
        """Keep a row that is new; cells of what was distilled before under its name are dropped."""

        def change(results: dict[str, Any]) -> None:
            before = results["rows"].get(name, {})
            if any(before.get(key) != found[key] for key in ("config", "seconds")):
                results["cells"].pop(name, None)
                results["rows"] = _in_order(results["rows"] | {name: found})

        self._change(change)

    def cell(self, name: str, network: str, found: dict[str, Any]) -> None:
        """Keep what a network reached on a set of data."""

        def change(results: dict[str, Any]) -> None:
            cells = results["cells"].get(name, {}) | {network: found}
            results["cells"] = _in_order(results["cells"] | {name: cells})

        self._change(change)

    def beside(self, name: str, found: dict[str, Any]) -> None:
        """Keep what is no row."""
        self._change(lambda results: results.update({name: found}))

    def _change(self, change: Callable[[dict[str, Any]], None]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            results = self.read()
            change(results)
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(results, indent=1) + "\n")
            new.replace(self.path)
        finally:
            os.close(directory)


def _in_order(found: dict[str, Any]) -> dict[str, Any]:
    """Baselines first, then rows as they are in ROWS, what was on a GPU after its row."""
    order = [*BASELINES, *(name + end for name in ROWS for end in ("", CUDA))]
    return {name: found[name] for name in order if name in found}


@dataclass(frozen=True)
class Place:
    """Where runs, results and their pictures are kept.

    Attributes:
        runs: the directory of the runs.
        kept: the results.
        pictures: the directory of artifacts and pictures; None keeps none besides the runs.
    """

    runs: Path
    kept: Kept
    pictures: Path | None

    @staticmethod
    def at(out: Path | None) -> Place:
        """In this checkout, or all in one directory."""
        return Place(out, Kept(out / JSON), None) if out else Place(RUNS, Kept(RESULTS / JSON), RESULTS)

    def directory(self, name: str, minutes: float | None) -> Path:
        """Of a run."""
        return self.runs / (name if minutes is None else f"{name}-{minutes:g}min")

    def artifact(self, name: str) -> Artifact:
        """That of a row which is kept.

        Raises:
            SystemExit: there is no such row, or its artifact is not here.
        """
        row = self.kept.read()["rows"].get(name)
        if row is None:
            raise SystemExit(f"{name} is not distilled yet; leave out --measure")
        paths = [self.directory(name, row["minutes"]) / FILE_NAME]
        paths += [self.pictures / f"{name}.h5"] if self.pictures else []
        for path in (path for path in paths if path.exists()):
            artifact = read(path)
            if artifact.config == row["config"]:
                return artifact
        raise SystemExit(f"{name}: its artifact is not in {' or '.join(map(str, paths))}; distil it here")

    def keep(self, name: str, found: dict[str, Any], artifact: Artifact, directory: Path) -> None:
        """A row, and where there are pictures its artifact; what has hard labels is told by its figures."""
        self.kept.row(name, found)
        if self.pictures and HARD not in name:
            shutil.copy(directory / FILE_NAME, self.pictures / f"{name}.h5")
            save(images(artifact), self.pictures / f"{name}.png")


def take(directory: Path, place: Place) -> None:
    """Keep the rows and cells that --out had written to the directory."""
    there = Place.at(directory)
    results = there.kept.read()
    for name, row in results["rows"].items():
        run, own = (each.directory(name, row["minutes"]) for each in (there, place))
        own.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / FILE_NAME, own / FILE_NAME)
        place.keep(name, row, read(own / FILE_NAME), own)
    for name, cells in results["cells"].items():
        for network, found in cells.items():
            place.kept.cell(name, network, found)
