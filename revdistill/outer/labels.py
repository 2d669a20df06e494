"""Class labels in the forms that people keep them in: as numbers from 0 on, and the names that these stand for."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from revdistill.engine import ArtifactError

Label = int | str
_WHOLE = re.compile(r"0|-?[1-9]\d{0,17}")
_EXACT = 2.0**53  # floats up to here are whole numbers without a doubt
SHOWN = 10  # names in one line


def plain(where: str, y: np.ndarray, count: int) -> np.ndarray:
    """Labels one by one.

    Args:
        where: file and array, for messages.
        y: [N] or [N, 1] of integers, booleans, floats that are whole, or strings; or one-hot [N, C].
        count: N, how many samples there are.

    Returns:
        [N], integers or strings.

    Raises:
        ArtifactError: they are something else.
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2 and len(y) == count and y.dtype.kind in "fiub":
        return _one_hot(where, y)
    if y.dtype.kind not in "fiubUS" or y.shape != (count,):
        raise ArtifactError(
            f"{where} is {y.dtype} of shape {y.shape}; accepted are integer classes or strings of shape ({count},) or "
            f"({count}, 1), or one-hot rows ({count}, classes)"
        )
    if y.dtype.kind == "f":
        return _whole(where, y)
    if y.dtype.kind == "S":
        try:
            y = np.char.decode(y, "utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{where} has texts that are not UTF-8 ({error})") from error
    if y.dtype.kind == "U":
        _check_none_missing(where, y)
    return y.astype(np.int64) if y.dtype.kind == "b" else y


def is_missing(text: str) -> bool:
    """Whether a label is what pandas and spreadsheets write where there is none."""
    return text.strip().lower() in ("", "nan", "<na>")


def _check_none_missing(where: str, y: np.ndarray) -> None:
    missing = [text for text in np.unique(y).tolist() if is_missing(text)]
    if missing:
        at = int(np.argmax(np.isin(y, missing)))
        raise ArtifactError(
            f"{where} has {str(y[at])!r} at position {at}, which is no class but a missing one; leave out the samples "
            "without a class"
        )


def numbers_where_all_are(y: np.ndarray) -> np.ndarray:
    """Strings as integers, where each is written as one (so that 10 comes after 9, and "7" is the class 7)."""
    if y.dtype.kind != "U":
        return y
    return y.astype(np.int64) if all(_WHOLE.fullmatch(text) for text in np.unique(y).tolist()) else y


def _whole(where: str, y: np.ndarray) -> np.ndarray:
    fine = np.isfinite(y) & (np.abs(y) <= _EXACT)
    fine[fine] &= y[fine] == np.round(y[fine])
    if not fine.all():
        at = int(np.argmin(fine))
        raise ArtifactError(
            f"{where} is {y.dtype} with {y[at]} at position {at}; accepted are integer classes, or floats that are "
            "whole numbers"
        )
    return y.astype(np.int64)


def _one_hot(where: str, y: np.ndarray) -> np.ndarray:
    wrong = ~((y == 0) | (y == 1)).all(1) | ((y == 1).sum(1) != 1)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ArtifactError(
            f"{where} has shape {y.shape}, but row {at} is not one-hot (one 1, the rest 0): "
            f"{np.array2string(y[at], threshold=12)}; accepted are one-hot rows, or classes of shape ({len(y)},)"
        )
    found: np.ndarray = y.argmax(1)
    return found


def numbered(where: str, labels: np.ndarray) -> tuple[tuple[Label, ...], np.ndarray]:
    """The classes in order, and each label as its position among them, int64 [N].

    Raises:
        ArtifactError: there is but one class.
    """
    classes, indices = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ArtifactError(f"{where} has {len(classes)} class; at least two are needed")
    return tuple(classes.tolist()), indices.astype(np.int64)


def numbered_as(where: str, labels: np.ndarray, names: Sequence[Label], of: str) -> np.ndarray:
    """Each label as the position of its name, int64 [N].

    Args:
        where: file and array, for messages.
        labels: [N], integers or strings.
        names: of the classes, in order.
        of: whose these are, for messages.

    Raises:
        ArtifactError: a label has no such name.
    """
    classes, indices = np.unique(labels, return_inverse=True)
    position = {name: i for i, name in enumerate(names)}
    unknown = [label for label in classes.tolist() if label not in position]
    if unknown:
        raise ArtifactError(f"{where} has classes {shown(unknown)} that {of} does not have; it has {shown(names)}")
    lookup = np.array([position[label] for label in classes.tolist()], np.int64)
    return lookup[indices]


def shown(names: Sequence[Label]) -> str:
    """The names for one line: the first of them where there are many."""
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return f"[{', '.join(repr(name) for name in names[:SHOWN])}{more}]"


def are_numbers(names: Sequence[Label]) -> bool:
    """Whether the names are 0 to n - 1, so that they say nothing that the positions do not."""
    return tuple(names) == tuple(range(len(names)))
