"""Which class of real data is which of distilled data."""

from __future__ import annotations

from dataclasses import replace

import torch

from revdistill.distill.artifact import Artifact
from revdistill.outer.data import Dataset
from revdistill.outer.labels import Label, are_numbers, shown


def fitted(artifact: Artifact, data: Dataset) -> Dataset:
    """Real data with their classes numbered as the artifact's, by the names of the classes, and whitened as its data.

    Args:
        artifact: distilled data.
        data: real data, whose classes are the artifact's or some of them.

    Returns:
        The same data where the numbers are the same already, and nothing is whitened.

    Raises:
        ValueError: inputs have other shapes, or the data have classes that the artifact does not have.
    """
    if tuple(artifact.x.shape[2:]) != data.input_shape:
        raise ValueError(
            f"the distilled data have entries of shape {list(artifact.x.shape[2:])}, "
            f"but dataset {data.name!r} of {list(data.input_shape)}"
        )
    names = _names(artifact, data)
    unknown = [name for name in data.class_names if name not in names]
    if unknown:
        raise ValueError(
            f"dataset {data.name!r} has classes {shown(unknown)} that the distilled data do not have; they have "
            f"{shown(names)}. Give data of these classes, or of some of them, with labels that say which"
        )
    if artifact.whitening is not None:
        data = artifact.whitening.of_data(data)
    if data.class_names == names:
        return data
    lookup = torch.tensor([names.index(name) for name in data.class_names], device=data.y.device)
    return replace(
        data,
        classes=len(names),
        class_names=names,
        y=lookup[data.y],
        y_validation=lookup[data.y_validation],
        y_test=lookup[data.y_test],
    )


def _names(artifact: Artifact, data: Dataset) -> tuple[Label, ...]:
    """What the artifact's classes 0, 1, ... are called."""
    if artifact.classes:
        return tuple(artifact.classes)
    count = artifact.y.shape[2] if artifact.has_soft_labels else int(artifact.y.max()) + 1
    if artifact.dataset == data.name and count == len(data.class_names):
        # The very file that was distilled: earlier releases numbered its classes, and did not keep their names.
        return data.class_names
    if are_numbers(data.class_names) and not artifact.has_soft_labels:
        count = max(count, data.classes)  # hard labels need not show all classes that there are
    return tuple(range(count))
