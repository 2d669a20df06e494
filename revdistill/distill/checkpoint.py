"""RUN/checkpoint.h5: everything that a distillation needs to go on to the same result, bit for bit."""

from __future__ import annotations

from pathlib import Path

from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.outer import checkpoint as checkpoints

FORMAT_VERSION = 2
FILE_NAME = "checkpoint.h5"


def save(path: Path, distiller: Distiller) -> None:
    """Write the file whole, or leave what was there. Raises OSError."""
    config = distiller.config.to_dict()
    data = distiller.data
    checkpoints.save(path, distiller.descent, version=FORMAT_VERSION, config=config, averages=True, data=data)


def read_config(path: Path) -> Config:
    """The configuration of the run that wrote the checkpoint.

    Raises:
        ValueError: there is no such file.
        ArtifactError: names the file and what is wrong with it.
    """
    return checkpoints.read_config(path, FORMAT_VERSION, Config.from_dict)


def restore(path: Path, distiller: Distiller) -> None:
    """Put a distiller where `save` was called; it stays as it was where that is impossible.

    Raises:
        ValueError: there is no such file, or its configuration or data are not the distiller's.
        ArtifactError: names the file and what is wrong with it.
    """
    checkpoints.check_same(path, distiller.config.to_dict(), read_config(path).to_dict())
    checkpoints.check_same_data(path, distiller.data)
    checkpoints.restore(path, distiller.descent, steps=distiller.config.outer_steps, averages=True)
