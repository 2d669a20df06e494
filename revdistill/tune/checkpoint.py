"""RUN/tuning.h5: everything that a tuning needs to go on to the same result, bit for bit."""

from __future__ import annotations

from pathlib import Path

from revdistill.outer import checkpoint as checkpoints
from revdistill.tune.config import TuneConfig
from revdistill.tune.tuner import Tuner

FORMAT_VERSION = 1
FILE_NAME = "tuning.h5"


def save(path: Path, tuner: Tuner) -> None:
    """Write the file whole, or leave what was there. Raises OSError."""
    checkpoints.save(path, tuner.descent, version=FORMAT_VERSION, config=tuner.config.to_dict(), data=tuner.data)


def read_config(path: Path) -> TuneConfig:
    """The configuration of the tuning that wrote the checkpoint.

    Raises:
        ValueError: there is no such file.
        ArtifactError: names the file and what is wrong with it.
    """
    return checkpoints.read_config(path, FORMAT_VERSION, TuneConfig.from_dict)


def restore(path: Path, tuner: Tuner) -> None:
    """Put a tuner where `save` was called; it stays as it was where that is impossible.

    Raises:
        ValueError: there is no such file, or its configuration or data are not the tuner's.
        ArtifactError: names the file and what is wrong with it.
    """
    checkpoints.check_same(path, tuner.config.to_dict(), read_config(path).to_dict())
    checkpoints.check_same_data(path, tuner.data)
    checkpoints.restore(path, tuner.descent, steps=tuner.config.outer_steps)
