"""RUN/checkpoint.h5: everything that a distillation needs to go on to the same result, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import revdistill
from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.distill.hdf5 import reading, writing

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
        file.attrs["adam_step"] = _adam_step(distiller)
        file.attrs["averaged"] = distiller.averaged
        for name, leaf in distiller.synthetic.leaves.items():
            file.create_dataset(name, data=leaf.detach().cpu().numpy())
            state = distiller.optimizer.state.get(leaf, {})
            for moment in _MOMENTS:
                value: Tensor = state.get(moment, torch.zeros_like(leaf))
                file.create_dataset(f"{name}.{moment}", data=value.cpu().numpy())
            if name in distiller.averages:
                file.create_dataset(f"{name}.{_AVERAGE}", data=distiller.averages[name].cpu().numpy())


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
        kept = (*_MOMENTS, _AVERAGE) if distiller.averages else _MOMENTS
        tensors: dict[str, Tensor] = {}
        for name, leaf in distiller.synthetic.leaves.items():
            for key in (name, *(f"{name}.{part}" for part in kept)):
                values = torch.from_numpy(file.array(key, "float32"))
                if values.shape != leaf.shape:
                    raise file.fail(f"{key!r} has shape {list(values.shape)}; expected {list(leaf.shape)}")
                tensors[key] = values.to(leaf.device)
    for name, leaf in distiller.synthetic.leaves.items():
        with torch.no_grad():
            leaf.copy_(tensors[name])
            if distiller.averages:
                distiller.averages[name].copy_(tensors[f"{name}.{_AVERAGE}"])
        if adam_step:
            state: dict[str, Any] = {moment: tensors[f"{name}.{moment}"] for moment in _MOMENTS}
            distiller.optimizer.state[leaf] = {"step": torch.tensor(float(adam_step)), **state}
    distiller.outer_step, distiller.averaged = outer_step, averaged


def _adam_step(distiller: Distiller) -> int:
    states = list(distiller.optimizer.state.values())
    return int(states[0]["step"]) if states else 0


def describe_difference(ours: Config, theirs: Config) -> str | None:
    """The first field in which two configurations differ, in words."""
    a, b = ours.to_dict(), theirs.to_dict()
    for name in a:
        if a[name] != b[name]:
            return f"{name} is {a[name]!r} here, but {b[name]!r} in the run to be resumed"
    return None
