"""RUN/checkpoint.h5: everything that a distillation needs to go on to the same result, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.distill.pool import AGES
from revdistill.outer import checkpoint as checkpoints
from revdistill.outer.hdf5 import Reader

FORMAT_VERSION = 2
FILE_NAME = "checkpoint.h5"


def save(path: Path, distiller: Distiller) -> None:
    """Write the file whole, or leave what was there. Raises OSError."""
    config = distiller.config.to_dict()
    data = distiller.data
    more = distiller.pool.tensors() if distiller.pool is not None else None
    checkpoints.save(
        path, distiller.descent, version=FORMAT_VERSION, config=config, averages=True, data=data, more=more
    )


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
    checkpoints.restore(
        path,
        distiller.descent,
        steps=distiller.config.outer_steps,
        averages=True,
        more=None if distiller.pool is None else partial(_pool, distiller),
    )


def _pool(distiller: Distiller, file: Reader) -> Callable[[], None]:
    """Read the networks of the pool, and check that they are of this distiller."""
    pool = distiller.pool
    assert pool is not None
    ages = file.array(AGES, "int64", ndim=1)
    longest = distiller.config.inner_steps
    if len(ages) != len(pool.members) or ages.min() < -1 or ages.max() > longest:
        raise file.fail(f"{AGES!r} has shape {list(ages.shape)}; expected [{len(pool.members)}], from -1 to {longest}")

    def read(name: str, like: Tensor) -> Tensor:
        values = torch.from_numpy(file.array(name, "float32"))
        if values.shape != like.shape:
            raise file.fail(f"{name!r} has shape {list(values.shape)}; expected {list(like.shape)}")
        return values.to(like.device)

    members = pool.read(ages.tolist(), distiller.fresh(0, 1), read)
    return lambda: pool.put(members)
