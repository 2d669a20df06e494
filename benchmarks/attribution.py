"""Do scores say what leaving examples out does? Linear datamodeling scores (LDS) of rd.attribute and of other ways, on
the same trainings: {SGD, AdamW} x {ReLU, GELU} x {MLP, LeNet} x two rates, 5,000 MNIST images, 50 queries.

Per cell, retrainings without random subsets of 1, 5 and 10 % of the examples are made in plain torch (`leave_out.py`).
An LDS is, per query, the Spearman rank correlation of predicted and true losses over the retrainings; the figure is
the mean over the queries, with a 95 % interval by bootstrap over queries and retrainings both. Beside it the LDS of the
mean loss, the time of an attribution of all queries, the smoothness that `Attribution.check` tells, and its rank
correlation with the LDS over the cells. The rivals are in `attribution_rivals.py`; one that is not installed is left
out, and the results say so.

    python -m pip install traker==0.3.2
    python benchmarks/attribution.py --data-dir DIR                 all: hours on one core, most of them retrainings
    python benchmarks/attribution.py --data-dir DIR --again ours    rd.attribute's scores anew, for the same retrainings

What was computed is kept in --cache, retrainings and scores, and is not computed again; with a larger --retrainings
only what is missing is added. Writes results/attribution.json; `python benchmarks/report.py` makes the table of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attribution_rivals import RIVALS, checkpoints
from leave_out import (
    ARCHITECTURES,
    BATCH,
    BETAS,
    DROPS,
    EPOCHS,
    MOMENTUM,
    WEIGHT_DECAY,
    Cell,
    Images,
    cells,
    left_out,
    mnist,
    train,
    truth,
)
from measuring import arguments_of, load, machine, save, versions
from torch import Tensor

import revdistill as rd
from revdistill.attribute.check import Check, spearman
from revdistill.attribute.smoothness import smoothness

OURS = "ours"
_SCORES = "scores of "  # in the cache, before the name of the settings
Scored = dict[str, Any]  # {"scores": settings -> [K, n], "losses": [K], "seconds", "smoothness" of ours}


def optimizer_of(cell: Cell) -> rd.SGD | rd.AdamW:
    """The library's."""
    if cell.optimizer == "SGD":
        return rd.SGD(cell.lr, MOMENTUM)
    return rd.AdamW(cell.lr, betas=BETAS, eps=cell.eps, weight_decay=WEIGHT_DECAY)


def ours(cell: Cell, images: Images) -> Scored:
    """rd.attribute, and what its check says of smoothness."""
    loss, params = rd.from_module(cell.network(), torch.nn.CrossEntropyLoss(reduction="none"))
    started = time.perf_counter()
    found = rd.attribute(
        loss,
        params,
        (images.x, images.y),
        optimizer_of(cell),
        order=images.order,
        queries=(images.x_queries, images.y_queries),
        seed=0,
    )
    seconds = time.perf_counter() - started
    assert found.run is not None
    return {
        "scores": {"": found.scores},
        "losses": found.losses,
        "seconds": seconds,
        "smoothness": smoothness(found.run, DROPS[0]),
    }


def rival(name: str, cell: Cell, images: Images) -> Scored:
    """The time is that of the scores and of the training whose checkpoints they take."""
    started = time.perf_counter()
    along = checkpoints(cell, images)
    scores = RIVALS[name].scores(cell, images, along)
    seconds = time.perf_counter() - started
    return {"scores": scores, "losses": torch.zeros(len(images.x_queries)), "seconds": seconds}


def kept(path: Path, again: bool, make: Callable[[], Scored]) -> Scored:
    """From the cache, or made and put there."""
    if path.exists() and not again:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        scores = {name.removeprefix(_SCORES): t for name, t in arrays.items() if name.startswith(_SCORES)}
        numbers = {name: float(arrays[name]) for name in ("seconds", "smoothness") if name in arrays}
        return {"scores": scores, "losses": arrays["losses"], **numbers}
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = {_SCORES + settings: t.numpy() for settings, t in found["scores"].items()}
    np.savez(path, **scores, **{name: np.asarray(value) for name, value in found.items() if name != "scores"})
    return found


def figures(scored: Scored, dropped: Tensor, actual: Tensor, drop: float) -> dict[str, Any]:
    """The LDS of one way's scores; of several settings, that which does best on these very retrainings.

    Args:
        scored: what `ours` or `rival` gave.
        dropped: bool [R, n], the subsets.
        actual: [R, K], the true losses.
        drop: the share left out.
    """
    best: dict[str, Any] = {}
    for settings, scores in scored["scores"].items():
        check = Check.of(scores, scored["losses"], dropped, actual, drop=drop, seed=0, smoothness=1.0)
        if not best or check.mean > best["lds"]:
            best = {
                "settings": settings,
                "lds": check.mean,
                "interval": list(check.interval),
                "mean_loss": check.mean_query,
                "mean_loss_interval": list(check.mean_query_interval),
            }
    return best


def grid_cell(cell: Cell, inputs: dict[str, Images], options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one training."""
    images = inputs[cell.inputs]
    count = options.retrainings[ARCHITECTURES.index(cell.architecture)]
    methods = {}
    for name in (OURS, *RIVALS):
        if name != OURS and RIVALS[name].missing():
            continue
        make = (lambda: ours(cell, images)) if name == OURS else (lambda name=name: rival(name, cell, images))
        methods[name] = kept(options.cache / f"{cell.name}-{name}.npz", name in options.again, make)
    rows = []
    for drop, retrainings in zip(DROPS, count, strict=True):
        dropped = torch.stack([left_out(drop, number, len(images.x)) for number in range(retrainings)])
        actual = truth(cell, images, drop, retrainings, options.cache)
        found = {name: figures(scored, dropped, actual, drop) for name, scored in methods.items()}
        rows.append({"drop": drop, "retrainings": retrainings, "methods": found})
        said = ", ".join(f"{name} {one['lds']:.3f}" for name, one in found.items())
        print(f"{cell.name}, {drop:.0%} left out, {retrainings} retrainings: {said}", flush=True)
    net = train(cell, images, torch.ones(len(images.x)))
    with torch.no_grad():
        right = net(images.x).argmax(1) == images.y
    return {
        **vars(cell),
        "training_accuracy": float(right.float().mean()),
        "smoothness": methods[OURS]["smoothness"],
        "seconds": {name: scored["seconds"] for name, scored in methods.items()},
        "drops": rows,
    }


def foretold(found: list[dict[str, Any]]) -> dict[str, float]:
    """The rank correlation over the cells of smoothness and rd.attribute's LDS, for each drop."""
    told = [cell["smoothness"] for cell in found]
    return {
        f"{drop:g}": float(
            spearman(
                torch.tensor(told).numpy(),
                torch.tensor([cell["drops"][i]["methods"][OURS]["lds"] for cell in found]).numpy(),
            )
        )
        for i, drop in enumerate(DROPS)
    }


def main() -> None:
    """The command."""
    parser = arguments_of(__doc__)
    parser.add_argument("--data-dir", required=True, help="the folder that holds mnist/")
    parser.add_argument("--cache", type=Path, default=Path("runs/attribution"), help="what was computed before")
    parser.add_argument("--again", nargs="+", default=[], choices=[OURS, *RIVALS], help="scores to compute anew")
    parser.add_argument("--cells", default="", help="only those whose name contains this; the others' results stay")
    parser.add_argument(
        "--retrainings", type=int, nargs=6, default=[100] * 6, metavar="R", help="MLP 1, 5, 10 %%, LeNet 1, 5, 10 %%"
    )
    options = parser.parse_args()
    options.retrainings = (options.retrainings[:3], options.retrainings[3:])
    torch.set_num_threads(1)
    inputs = mnist(options.data_dir)
    chosen = {cell.name: grid_cell(cell, inputs, options) for cell in cells() if options.cells in cell.name}
    before = {Cell.of(entry).name: entry for entry in (load("attribution") or {"cells": []})["cells"]}
    found = [(before | chosen)[cell.name] for cell in cells() if cell.name in before | chosen]
    images = inputs["pixels"]
    results = {
        "machine": machine("cpu", 1),
        "versions": versions(),
        "settings": {
            "examples": len(images.x),
            "queries": len(images.x_queries),
            "batch": BATCH,
            "epochs": EPOCHS,
            "steps": len(images.order),
            "momentum": MOMENTUM,
            "betas": BETAS,
            "weight_decay": WEIGHT_DECAY,
        },
        "missing": {name: one.missing() for name, one in RIVALS.items() if one.missing()},
        "foretold": foretold(found),
        "cells": found,
    }
    save("attribution", results)


if __name__ == "__main__":
    main()
