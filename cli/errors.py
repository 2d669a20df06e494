"""Errors that the user can put right, and the checks of what the user gave."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from revdistill.attribute.found import FILE_NAME as ATTRIBUTING
from revdistill.attribute.result import FILE_NAME as ATTRIBUTION
from revdistill.distill.artifact import FILE_NAME, Artifact, read
from revdistill.distill.checkpoint import FILE_NAME as CHECKPOINT
from revdistill.engine import ArtifactError
from revdistill.outer.data import NAMES
from revdistill.outer.directory import check_writable
from revdistill.tune.checkpoint import FILE_NAME as TUNING
from revdistill.tune.schedule import FILE_NAME as SCHEDULE


class UserError(Exception):
    """One line for the user; exit code 2."""


@contextmanager
def user_input(option: str | None = None) -> Iterator[None]:
    """Turn errors of the checks inside into UserError.

    Args:
        option: named at the start of the message.

    Raises:
        UserError: a ValueError, ArtifactError or PermissionError was raised inside.
    """
    prefix = f"{option}: " if option else ""
    try:
        yield
    except (ValueError, ArtifactError) as error:
        raise UserError(f"{prefix}{error}") from error
    except PermissionError as error:
        raise UserError(f"{prefix}{error.filename}: permission denied") from error


def check_out(directory: Path) -> None:
    """UserError where nothing can be kept in --out."""
    try:
        check_writable(directory)
    except OSError as error:
        raise UserError(
            f"--out: {directory} cannot be made or written to ({error.strerror}); give another directory"
        ) from error


def dataset_of(artifact: Artifact, asked: str | None) -> str:
    """The name of the real data: the one asked for, or the artifact's.

    An artifact may come from a stranger, so it does not choose which file of this machine is read.
    """
    if asked is None and artifact.dataset not in NAMES:
        raise UserError(f"the data were distilled from {artifact.dataset!r}; give --dataset with that file to read it")
    return asked or artifact.dataset


def read_run(run: Path) -> tuple[Path, Artifact]:
    """The run's directory and its artifact.

    Args:
        run: the directory, or the artifact's file.

    Raises:
        UserError: there is no such run, or its artifact is damaged.
    """
    path = run / FILE_NAME if run.is_dir() else run
    with user_input():
        if not run.exists():
            raise ValueError(
                f"RUN is {str(run)!r}, which does not exist; accepted is a directory made by revdistill train"
            )
        if not path.exists() or path.name in (SCHEDULE, ATTRIBUTION):
            raise ValueError(
                f"RUN is {str(run)!r}, which holds no {FILE_NAME}{_but(run)}; accepted is a directory of a finished "
                "revdistill train"
            )
        return path.parent, read(path)


def _but(run: Path) -> str:
    """What the directory (or file) is instead, and the command for that."""
    where = shlex.quote(str(run))
    if schedule_in(run):
        return f" but a tuning's {SCHEDULE} (revdistill show {where} prints it, rd.schedule_lr trains along it)"
    if attribution_in(run):
        return f" but an attribution's {ATTRIBUTION} (revdistill show {where} prints it)"
    unfinished = (
        (TUNING, "a tuning", "tune"),
        (CHECKPOINT, "a run", "train"),
        (ATTRIBUTING, "an attribution", "attribute"),
    )
    for name, noun, command in unfinished:
        if (run / name).exists():
            return f" but the {name} of {noun} that is not finished (revdistill {command} --resume --out {where})"
    return ""


def schedule_in(run: Path) -> Path | None:
    """A tuning's result, in this directory or this file itself."""
    return _result_in(run, SCHEDULE)


def attribution_in(run: Path) -> Path | None:
    """An attribution's result, likewise."""
    return _result_in(run, ATTRIBUTION)


def _result_in(run: Path, name: str) -> Path | None:
    path = run / name if run.is_dir() else run
    return path if path.name == name and path.exists() else None
