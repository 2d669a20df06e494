"""The threads that a command computes with: asked for, or those of the run to be resumed, or by the work's size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

import click
import torch

from revdistill.attribute.config import AttributeConfig
from revdistill.distill.config import Config
from revdistill.outer.data import Dataset
from revdistill.outer.networks import NetworkStack
from revdistill.outer.threads import default_threads, own_threads, using_threads
from revdistill.tune.config import TuneConfig

from .processes import processes_of

C = TypeVar("C", Config, TuneConfig, AttributeConfig)


def with_threads(ctx: click.Context, config: C, data: Dataset, *, networks: int, samples: int, resume: bool) -> C:
    """The configuration with its number of threads, which is in force until the command ends.

    Args:
        ctx: of the command.
        config: of the job.
        data: that it trains on.
        networks: that are trained side by side.
        samples: in a training step.
        resume: whether the job goes on with the number that it began with; None, in checkpoints of earlier releases, is
            torch's own.

    Raises:
        ValueError: there is no such network, or it does not take the data.
    """
    if config.threads is None and not resume:
        names = config.architectures if isinstance(config, Config) else (config.arch,)
        work = work_of(names, data, networks, samples)
        config = replace(config, threads=default_for(ctx, config.device, work))
    ctx.with_resource(using_threads(config.threads))
    return config


def default_for(ctx: click.Context, device: str, work: Callable[[], Iterable[float]]) -> int | None:
    """See `default_threads`; on a CPU torch's own number where somebody has set it."""
    return own_threads() if device == "cpu" and set_outside(ctx) else default_threads(device, work)


def set_outside(ctx: click.Context) -> bool:
    """Whether somebody has set torch's number of threads: by OMP_NUM_THREADS, or by starting torchrun."""
    return processes_of(ctx).started or "OMP_NUM_THREADS" in os.environ


def work_of(names: Iterable[str], data: Dataset, networks: int, samples: int) -> Callable[[], Iterable[float]]:
    """Floating-point operations of a forward pass of each of these architectures."""

    def work() -> Iterable[float]:
        for name in names:
            yield NetworkStack(name, networks, data.input_shape, data.classes, torch.device("cpu")).work(samples)

    return work
