"""A user's own data by path: which kind of file or folder it is, and what is asked of it after a colon."""

from __future__ import annotations

import os
from pathlib import Path

from revdistill.outer.csv_file import load_csv
from revdistill.outer.image_folder import load_image_folder
from revdistill.outer.npz import load_npz
from revdistill.outer.source import Source

ACCEPTED = "a .npz file, a .csv file (FILE.csv:COLUMN where the class is not last), or a folder of images per class"
MAX_SIDE = 4096


def load_own(name: str) -> tuple[str, Source] | None:
    """The data of a path.

    Args:
        name: FILE.npz, FILE.csv, FILE.csv:COLUMN, DIR or DIR:SIZE.

    Returns:
        The same with its whole path, and what it holds; None where it is no such name.

    Raises:
        ValueError: what comes after the colon is wrong.
        ArtifactError: names the file and what is wrong with it.
    """
    path, asked = split(name)
    if not name:
        return None
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name!a}: the path is not UTF-8, which results keep it in; rename the file or folder"
        ) from None
    full_name = str(path.resolve()) + (f":{asked}" if asked is not None else "")
    if path.is_dir():
        return full_name, load_image_folder(path, None if asked is None else _size(name, asked))
    if path.suffix.lower() == ".npz" and asked is None:
        return full_name, load_npz(path)
    if path.suffix.lower() == ".csv":
        return full_name, load_csv(path, asked)
    return None


def split(name: str) -> tuple[Path, str | None]:
    """The path, and what is asked of it after the colon."""
    name = os.path.expanduser(name)  # a shell leaves the ~ of --dataset=~/a.npz as it is
    before, colon, after = name.rpartition(":")
    if not colon or Path(name).exists():
        return Path(name), None
    if Path(before).is_dir() or before.lower().endswith(".csv"):
        return Path(before), after
    return Path(name), None


def _size(name: str, asked: str) -> int:
    if not (asked.isdecimal() and 1 <= int(asked) <= MAX_SIDE):
        raise ValueError(f"{name!r} asks for images of size {asked!r}; accepted are 1 to {MAX_SIDE}, as in DIR:32")
    return int(asked)
