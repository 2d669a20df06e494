"""Besides the rows of images.py: accuracy against the time of distilling, and where it may start and how far it goes
back.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from image_cells import NETWORKS
from measuring import machine, versions

from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.distill.evaluation import evaluate
from revdistill.distill.presets import settings
from revdistill.outer.data import Dataset

RACE_NETWORKS = 20  # as for the reference code's figures
RACE_EVERY = 10.0  # seconds of distilling between two looks
CHOICE_SECONDS = 60.0
_BEST: dict[str, Any] = settings("best", "", ())
# Short trainings from real images, large rates that are learned fast, few samples.
RACE = Config(
    dataset="mnist",
    architectures=("LeNet",),
    **_BEST
    | {
        "epochs": 3,
        "momentum": 0.6,
        "weight_decay": 0.0,
        "window": None,
        "start": "real",
        "batch_size": 256,
        "lr": 0.05,
        "outer_lr": 0.05,
        "outer_lr_rates": 0.01,
        "outer_steps": 450,
        "clip": 1.0,
        "average": 0.2,
    },
)
# T = 100, its Adam rates constant: a comparison by time cannot know how many outer steps there will be.
CHOICE = Config(
    dataset="mnist",
    architectures=("LeNet",),
    **_BEST | {"epochs": 10, "weight_decay": 0.0, "lr": 0.01, "outer_decay": "none", "average": 0.0},
)


def distilling(
    config: Config, data: Dataset, every: float, seconds: float = math.inf
) -> Iterator[tuple[float, Distiller]]:
    """Distil on one core until all is done or the seconds are over; a look each `every` seconds and at the end, not
    counted.

    The start counts: centroids take some seconds. One outer step is taken in any case.
    """
    torch.set_num_threads(1)
    began = time.perf_counter()
    distiller, looked = Distiller(config, data), 0.0
    spent = time.perf_counter() - began
    while distiller.outer_step < config.outer_steps and (spent < seconds or distiller.outer_step == 0):
        started = time.perf_counter()
        distiller.step()
        spent += time.perf_counter() - started
        if spent - looked >= every or spent >= seconds or distiller.outer_step == config.outer_steps:
            looked = spent
            yield spent, distiller


def race(data: Dataset, quick: bool) -> dict[str, Any]:
    """Test accuracy against the seconds that distilling took."""
    config = replace(RACE, outer_steps=3, batch_size=64) if quick else RACE
    curve = []
    for seconds, distiller in distilling(config, data, RACE_EVERY):
        found = evaluate(distiller.artifact(), data, "LeNet", restarts=2 if quick else RACE_NETWORKS)
        curve.append({"seconds": seconds, "outer_step": distiller.outer_step, "mean": found.mean, "std": found.std})
        print(f"race: {seconds:.0f} s, {found.mean:.1%} +- {found.std:.1%}", flush=True)
    return {"config": config.to_dict(), "curve": curve, "machine": machine("cpu", 1), "versions": versions()}


def starts_and_windows(data: Dataset, quick: bool) -> dict[str, Any]:
    """Test accuracy after the same time: from real images and from centroids, back over a window and over all steps."""
    found = []
    for start, window in itertools.product(("real", "kmeans"), (40, None)):
        config = replace(CHOICE, start=start, window=window)
        for seconds, distiller in distilling(config, data, math.inf, 0.0 if quick else CHOICE_SECONDS):
            reached = evaluate(distiller.artifact(), data, "LeNet", restarts=2 if quick else NETWORKS)
            found.append({"start": start, "window": window, "seconds": seconds, "outer_steps": distiller.outer_step})
            found[-1] |= {"mean": reached.mean, "std": reached.std, "restarts": reached.restarts}
            print(
                f"{start}, window {window}: {distiller.outer_step} steps, {reached.mean:.1%} +- {reached.std:.1%}",
                flush=True,
            )
    return {"config": CHOICE.to_dict(), "found": found, "machine": machine("cpu", 1), "versions": versions()}


# What is no row of the table; all of MNIST.
BESIDES: dict[str, Callable[[Dataset, bool], dict[str, Any]]] = {
    "race": race,
    "starts_and_windows": starts_and_windows,
}
