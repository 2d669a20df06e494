"""What a user's file or folder holds, before it is split and normalised: the same for every kind of file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from revdistill.engine import ArtifactError
from revdistill.outer.labels import Label, numbered, numbered_as, numbers_where_all_are
from revdistill.outer.roles import TEST, TRAIN, VALIDATION

Arrays = tuple[np.ndarray, np.ndarray]
FAR = 100  # values up to here and beyond are not on the scale of values from 0 to 1


@dataclass(frozen=True)
class Read:
    """Something that was read.

    Args:
        name: of the array, folder or column.
        role: what it was read as.
        shape: as it was found.
        dtype: likewise.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Origin:
    """What to tell the user of where data came from.

    Args:
        read: what was read.
        unread: what was there besides, each with the reason where that is not the name.
        notes: what was done to what was read, in sentences without a full stop.
        splits: which parts were drawn from another one, likewise.
    """

    read: tuple[Read, ...] = ()
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """One part, as it was found.

    Args:
        x: float32 [N, features] or [N, channels, H, W].
        labels: [N], integers or strings.
        x_name: of what x was read from, for messages.
        y_name: likewise.
    """

    x: np.ndarray
    labels: np.ndarray
    x_name: str
    y_name: str


@dataclass(frozen=True)
class Source:
    """Parts whose classes are numbered alike.

    Args:
        train: x float32 [N, features] or [N, channels, H, W], and y int64 [N] from 0 to classes - 1.
        validation: likewise, or None where there is no such part.
        test: likewise.
        class_names: what the numbers stand for, in order.
        origin: what to tell the user.
    """

    train: Arrays
    validation: Arrays | None
    test: Arrays | None
    class_names: tuple[Label, ...]
    origin: Origin = field(default_factory=Origin)


def _check_scale(where: object, own: Part, part: Part) -> None:
    """ArtifactError where only one of the parts was divided by 255: normalised alike, the other would be far off."""
    (low, high), (other_low, other_high) = ((float(p.x.min()), float(p.x.max())) for p in (own, part))
    if min(low, other_low) >= 0 and 0 < min(high, other_high) <= 1 and max(high, other_high) >= FAR:
        raise ArtifactError(
            f"{where}: {own.x_name} goes from {low:.6g} to {high:.6g}, but {part.x_name} from {other_low:.6g} to "
            f"{other_high:.6g}; bring both to one scale, as in x / 255"
        )


def joined(where: object, parts: Mapping[str, Part], origin: Origin) -> Source:
    """The parts, checked against each other; the training part's classes are the classes.

    Where all of them are texts of whole numbers, they become these.

    Args:
        where: the file, for messages.
        parts: by TRAIN, which there must be, VALIDATION and TEST.
        origin: what to tell the user.

    Raises:
        ArtifactError: parts do not go together; names what does not.
    """
    own = parts[TRAIN]
    own_labels = numbers_where_all_are(own.labels)
    names, y = numbered(f"{where}: {own.y_name}", own_labels)
    found: dict[str, Arrays] = {}
    for kind, part in parts.items():
        if kind == TRAIN:
            continue
        if part.x.shape[1:] != own.x.shape[1:]:
            raise ArtifactError(
                f"{where}: {part.x_name} has entries of shape {part.x.shape[1:]}, but {own.x_name} of {own.x.shape[1:]}"
            )
        _check_scale(where, own, part)
        labels = part.labels if own_labels.dtype.kind == "U" else numbers_where_all_are(part.labels)
        found[kind] = part.x, numbered_as(f"{where}: {part.y_name}", labels, names, own.y_name)
    return Source((own.x, y), found.get(VALIDATION), found.get(TEST), names, origin)
