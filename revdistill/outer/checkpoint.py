"""Checkpoints of outer loops: a configuration, and all that a `Descent` needs to go on to the same bits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import h5py
import torch
from torch import Tensor

import revdistill
from revdistill.outer.data import Dataset
from revdistill.outer.descent import ClipTo, Descent
from revdistill.outer.hdf5 import Reader, reading, writing

_DATA, _NORM = "data", "norm_mean"
_MOMENTS, _AVERAGE = ("exp_avg", "exp_avg_sq"), "average"
C = TypeVar("C")


def save(
    path: Path,
    descent: Descent,
    *,
    version: int,
    config: dict[str, Any],
    averages: bool = False,
    data: Dataset | None = None,
    more: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the file whole, or leave what was there.

    Args:
        path: the file.
        descent: its leaves, their mean, and Adam's state are kept.
        version: of the file's format.
        config: what makes the same job again, in the types of JSON.
        averages: whether the format has means of iterates.
        data: what `check_same_data` will know again.
        more: what else is kept, by names that are no leaf's.

    Raises:
        OSError: it cannot be written.
    """
    with writing(path) as file:
        write_head(file, version=version, config=config, data=data)
        file.attrs["outer_step"] = descent.outer_step
        if averages:
            file.attrs["averaged"] = descent.averaged
        if isinstance(descent.clip, ClipTo) and descent.clip.times_mean:
            file.attrs[_NORM] = descent.clip.mean
        states = list(descent.optimizer.state.values())
        file.attrs["adam_step"] = int(states[0]["step"]) if states else 0
        for name, leaf in descent.leaves.items():
            file.create_dataset(name, data=leaf.detach().cpu().numpy())
            state = descent.optimizer.state.get(leaf, {})
            for moment in _MOMENTS:
                value: Tensor = state.get(moment, torch.zeros_like(leaf))
                file.create_dataset(f"{name}.{moment}", data=value.cpu().numpy())
        for name, average in descent.averages.items():
            file.create_dataset(f"{name}.{_AVERAGE}", data=average.cpu().numpy())
        for name, t in (more or {}).items():
            file.create_dataset(name, data=t.cpu().numpy())


def write_head(file: h5py.File, *, version: int, config: dict[str, Any], data: Dataset | None) -> None:
    """What every checkpoint begins with, for `read_config`, `written_by` and `check_same_data`; see `save`."""
    file.attrs["format_version"] = version
    file.attrs["revdistill_version"] = revdistill.__version__
    file.attrs["config"] = json.dumps(config)
    if data is not None:
        file.attrs[_DATA] = json.dumps(data.summary())


def restore(
    path: Path,
    descent: Descent,
    *,
    steps: int,
    averages: bool = False,
    more: Callable[[Reader], Callable[[], None]] | None = None,
) -> None:
    """Put a descent on the same leaves where `save` was called; it stays as it was where the file is damaged.

    Args:
        path: the file.
        descent: of the configuration that the file has.
        steps: outer steps in all, as that configuration says.
        averages: whether the format has means of iterates.
        more: reads what else `save` kept, and returns what puts it in its place.

    Raises:
        ArtifactError: names the file and what is wrong with it.
    """
    with reading(path) as file:
        names = ("outer_step", "adam_step", "averaged")[: 2 + averages]
        counts = {name: file.integer(name) for name in names}
        outer_step, adam_step, averaged = (counts.get(name, 0) for name in ("outer_step", "adam_step", "averaged"))
        if not 0 <= averaged <= adam_step <= outer_step <= steps:
            found = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise file.fail(f"attributes {found} do not go with its configuration")
        tensors = _tensors(file, descent)
        norm = file.number(_NORM) if isinstance(descent.clip, ClipTo) and descent.clip.times_mean else 0.0
        if norm < 0:
            raise file.fail(f"attribute {_NORM!r} is {norm}; expected a number of at least 0")
        place = more(file) if more is not None else None
    for name, leaf in descent.leaves.items():
        with torch.no_grad():
            leaf.copy_(tensors[name])
        if adam_step:
            state: dict[str, Any] = {moment: tensors[f"{name}.{moment}"] for moment in _MOMENTS}
            descent.optimizer.state[leaf] = {"step": torch.tensor(float(adam_step)), **state}
    for name, average in descent.averages.items():
        average.copy_(tensors[f"{name}.{_AVERAGE}"])
    descent.outer_step, descent.averaged = outer_step, averaged
    if isinstance(descent.clip, ClipTo):
        descent.clip.mean = norm
    if place is not None:
        place()


def _tensors(file: Reader, descent: Descent) -> dict[str, Tensor]:
    """The leaves and what belongs to them, by "NAME" and "NAME.PART", each of its leaf's shape."""
    parts = (*_MOMENTS, _AVERAGE) if descent.averages else _MOMENTS
    tensors: dict[str, Tensor] = {}
    for name, leaf in descent.leaves.items():
        for key in (name, *(f"{name}.{part}" for part in parts)):
            values = torch.from_numpy(file.array(key, "float32"))
            if values.shape != leaf.shape:
                raise file.fail(f"{key!r} has shape {list(values.shape)}; expected {list(leaf.shape)}")
            tensors[key] = values.to(leaf.device)
    return tensors


def read_config(path: Path, version: int, from_dict: Callable[[dict[str, Any]], C]) -> C:
    """The configuration of the job that wrote the checkpoint.

    Args:
        path: the file.
        version: the format version that is read.
        from_dict: makes a configuration of what `save` was given as `config`.

    Raises:
        ValueError: there is no such file.
        ArtifactError: names the file and what is wrong with it.
    """
    if not path.exists():
        raise ValueError(f"{path.parent} holds no {path.name} to resume from")
    with reading(path) as file:
        file.check_version(version)
        values = file.json("config", dict)
        try:
            return from_dict(values)
        except (TypeError, ValueError) as error:
            raise file.fail(f"attribute 'config' is not a configuration of this release ({error})") from error


def written_by(path: Path) -> str:
    """The version of revdistill that wrote the checkpoint.

    Raises:
        ArtifactError: names the file and what is wrong with it.
    """
    with reading(path) as file:
        return file.text("revdistill_version")


def check_same(path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Check that a job goes on with the configuration that its checkpoint has.

    Args:
        path: the checkpoint.
        ours: the configuration of the job, in the types of JSON.
        theirs: that of the checkpoint.

    Raises:
        ValueError: names the first field in which they differ.
    """
    for name, value in ours.items():
        if value != theirs.get(name):
            raise ValueError(
                f"cannot resume {path.parent} with another configuration: {name} is {value!r} here, but "
                f"{theirs.get(name)!r} in the run to be resumed"
            )


def check_same_data(path: Path, data: Dataset) -> None:
    """Check that a job goes on with the data that it started with: a file may have been changed, or be another one of
    the same relative path.

    Args:
        path: the checkpoint; those of earlier releases do not tell.
        data: that the job goes on with.

    Raises:
        ValueError: names the first number in which they differ.
        ArtifactError: the checkpoint is damaged.
    """
    with reading(path) as file:
        before = file.json(_DATA, dict) if file.has(_DATA) else {}
    for name, value in data.summary().items():
        then = before.get(name, value)
        # Means may differ in their last bits on another machine.
        if not isinstance(then, float) or not math.isclose(then, value, rel_tol=1e-6, abs_tol=1e-30):
            raise ValueError(
                f"cannot resume {path.parent} with other data: {data.name} was changed, or is another file, since the "
                f"run was started ({name}: {value:.10g} now, but {then} then); start a new one"
            )
