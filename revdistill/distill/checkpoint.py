"""RUN/checkpoint.h5: everything that a distillation needs to go on to the same result, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import revdistill
from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.outer.hdf5 import Reader, reading, writing

FORMAT_VERSION = 2
FILE_NAME = "checkpoint.h5"
_MOMENTS, _AVERAGE = ("exp_avg", "exp_avg_sq"), "average"


def save(path: Path, distiller: Distiller) -> None:
    """Write the file whole, or leave what was there."""
    with writing(path) as file:
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["revdistill_version"] = revdistill.__version__
        file.attrs["config"] = json.dumps(distiller.config.to_dict())
        file.attrs["outer_step"] = distiller.outer_step
        file.attrs["averaged"] = distiller.averaged
        write_adam(file, distiller.synthetic.leaves, distiller.optimizer)
        for name, average in distiller.averages.items():
            file.create_dataset(f"{name}.{_AVERAGE}", data=average.cpu().numpy())


def write_adam(file: Any, leaves: dict[str, Tensor], optimizer: torch.optim.Adam) -> None:
    """Leaf tensors with Adam's state, into a file of `hdf5.writing`."""
    states = list(optimizer.state.values())
    file.attrs["adam_step"] = int(states[0]["step"]) if states else 0
    for name, leaf in leaves.items():
        file.create_dataset(name, data=leaf.detach().cpu().numpy())
        state = optimizer.state.get(leaf, {})
        for moment in _MOMENTS:
            value: Tensor = state.get(moment, torch.zeros_like(leaf))
            file.create_dataset(f"{name}.{moment}", data=value.cpu().numpy())


def read_tensors(file: Reader, leaves: dict[str, Tensor], parts: Sequence[str] = _MOMENTS) -> dict[str, Tensor]:
    """The leaves and their parts, of the leaves' shapes, by "NAME" and "NAME.PART". Errors: ArtifactError."""
    tensors: dict[str, Tensor] = {}
    for name, leaf in leaves.items():
        for key in (name, *(f"{name}.{part}" for part in parts)):
            values = torch.from_numpy(file.array(key, "float32"))
            if values.shape != leaf.shape:
                raise file.fail(f"{key!r} has shape {list(values.shape)}; expected {list(leaf.shape)}")
            tensors[key] = values.to(leaf.device)
    return tensors


def restore_adam(
    leaves: dict[str, Tensor], optimizer: torch.optim.Adam, tensors: dict[str, Tensor], adam_step: int
) -> None:
    """Put leaves and Adam's state where `write_adam` found them; tensors: of `read_tensors`."""
    for name, leaf in leaves.items():
        with torch.no_grad():
            leaf.copy_(tensors[name])
        if adam_step:
            state: dict[str, Any] = {moment: tensors[f"{name}.{moment}"] for moment in _MOMENTS}
            optimizer.state[leaf] = {"step": torch.tensor(float(adam_step)), **state}


def read_config(path: Path) -> Config:
    """The configuration of the run that wrote the checkpoint. Errors: ArtifactError."""
    with reading(path) as file:
        file.check_version(FORMAT_VERSION)
        values = file.json("config", dict)
        try:
            return Config.from_dict(values)
        except (TypeError, ValueError) as error:
            raise file.fail(f"attribute 'config' is not a configuration of this release ({error})") from error


def written_by(path: Path) -> str:
    """The version of revdistill that wrote the checkpoint."""
    with reading(path) as file:
        return file.text("revdistill_version")


def restore(path: Path, distiller: Distiller) -> None:
    """Put a distiller of the same configuration where `save` was called. Errors: ArtifactError."""
    with reading(path) as file:
        outer_step, adam_step, averaged = (file.integer(name) for name in ("outer_step", "adam_step", "averaged"))
        if not 0 <= averaged <= adam_step <= outer_step <= distiller.config.outer_steps:
            raise file.fail(
                f"attributes outer_step {outer_step}, adam_step {adam_step} and averaged {averaged} do not go with its "
                "configuration"
            )
        leaves = distiller.synthetic.leaves
        tensors = read_tensors(file, leaves, (*_MOMENTS, _AVERAGE) if distiller.averages else _MOMENTS)
    restore_adam(leaves, distiller.optimizer, tensors, adam_step)
    for name, average in distiller.averages.items():
        average.copy_(tensors[f"{name}.{_AVERAGE}"])
    distiller.outer_step, distiller.averaged = outer_step, averaged


def describe_difference(ours: Config, theirs: Config) -> str | None:
    """The first field in which two configurations differ, in words."""
    a, b = ours.to_dict(), theirs.to_dict()
    for name in a:
        if a[name] != b[name]:
            return f"{name} is {a[name]!r} here, but {b[name]!r} in the run to be resumed"
    return None
