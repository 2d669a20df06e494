"""What an array of a data file is, by its name: inputs or labels, of the training, validation or test part.

One table for the names that people give them: this project's x, y, x_test, y_test, keras' x_train, y_train, MedMNIST's
train_images, train_labels, and the like, in any case and order of the words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from revdistill.engine import ArtifactError

TRAIN, VALIDATION, TEST = "training", "validation", "test"
PARTS = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VALIDATION,
    "valid": VALIDATION,
    "validation": VALIDATION,
    "dev": VALIDATION,
    "test": TEST,
    "testing": TEST,
}
INPUTS, LABELS = "inputs", "labels"
KINDS = dict.fromkeys(("x", "data", "images", "image", "inputs", "input", "features", "samples"), INPUTS) | (
    dict.fromkeys(("y", "labels", "label", "targets", "target"), LABELS)
)
ACCEPTED = (
    "x and y (or data and labels, images and labels, features and targets, ...), alone or with train, val or test "
    "before or after them, as in x_train, y_test, train_images, val_labels"
)
Role = tuple[str, str]  # of PARTS' and of KINDS' values
_ONE_WORD = {kind + part: (PARTS[part], KINDS[kind]) for kind in KINDS for part in PARTS} | {
    part + kind: (PARTS[part], KINDS[kind]) for kind in KINDS for part in PARTS
}


def role_of(name: str) -> Role | None:
    """What an array of this name is, or None where the name says nothing."""
    found = words(name)
    if len(found) == 1 and found[0] in KINDS:
        return TRAIN, KINDS[found[0]]
    if len(found) == 1:
        return _ONE_WORD.get(found[0])
    if len(found) == 2 and found[0] in PARTS:
        found.reverse()
    if len(found) == 2 and found[0] in KINDS and found[1] in PARTS:
        return PARTS[found[1]], KINDS[found[0]]
    return None


def words(name: str) -> list[str]:
    """The words of a name in small letters."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()  # trainImages
    return [word for word in re.split(r"[^a-z0-9]+", apart) if word]


def roles(where: object, names: Iterable[str]) -> dict[Role, str]:
    """The name of the array for each role that has one.

    Args:
        where: the file, for messages.
        names: of its arrays.

    Returns:
        role -> name, with both inputs and labels of each part that there is, the training part among them.

    Raises:
        ArtifactError: two names have the same role, or inputs have no labels, or labels no inputs; names them.
    """
    names = list(names)
    found: dict[Role, str] = {}
    for name in names:
        role = role_of(name)
        if role is None:
            continue
        if role in found:
            raise ArtifactError(
                f"{where}: arrays {found[role]!r} and {name!r} are both {role[0]} {role[1]}; leave one of them out, or "
                "rename it"
            )
        found[role] = name
    held = f"it holds {sorted(names) or 'nothing'}"
    for part in (TRAIN, VALIDATION, TEST):
        x, y = found.get((part, INPUTS)), found.get((part, LABELS))
        if (x is None) != (y is None):
            lone, missing, usual = (x, LABELS, "y") if y is None else (y, INPUTS, "x")
            other = usual if part == TRAIN else f"{usual}_{'test' if part == TEST else 'val'}"
            raise ArtifactError(
                f"{where}: has no array {other!r}, the {missing} of {lone!r}; {held}; accepted are {ACCEPTED}"
            )
    if (TRAIN, INPUTS) not in found:
        raise ArtifactError(f"{where}: has no array 'x' and no array 'y'; {held}; accepted are {ACCEPTED}")
    return found
