"""What is the user's to put right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from revdistill.distill.artifact import FILE_NAME, Artifact, read
from revdistill.engine import ArtifactError
from revdistill.outer.data import NAMES


class UserError(Exception):
    """One line for the user; exit code 2."""


@contextmanager
def user_input(option: str | None = None) -> Iterator[None]:
    """Around the checks of what the user gave: their errors are the user's. option: what to name in them."""
    prefix = f"{option}: " if option else ""
    try:
        yield
    except (ValueError, ArtifactError) as error:
        raise UserError(f"{prefix}{error}") from error
    except PermissionError as error:
        raise UserError(f"{prefix}{error.filename}: permission denied") from error


def dataset_of(artifact: Artifact, asked: str | None) -> str:
    """The real data's name. A file does not get to say which other file is read: that must be asked for."""
    if asked is None and artifact.dataset not in NAMES:
        raise UserError(f"the data were distilled from {artifact.dataset!r}; give --dataset with that file to read it")
    return asked or artifact.dataset


def read_run(run: Path) -> tuple[Path, Artifact]:
    """The run's directory and artifact; `run` may also be the artifact itself."""
    path = run / FILE_NAME if run.is_dir() else run
    with user_input():
        if not run.exists():
            raise ValueError(
                f"RUN is {str(run)!r}, which does not exist; accepted is a directory made by revdistill train"
            )
        if not path.exists():
            raise ValueError(
                f"RUN is {str(run)!r}, which holds no {FILE_NAME}; accepted is a directory of a finished revdistill "
                "train"
            )
        return path.parent, read(path)
