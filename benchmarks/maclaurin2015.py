"""Hyperparameters by the hundred, learned through whole trainings on MNIST, after Maclaurin, Duvenaud & Adams 2015.

    python benchmarks/maclaurin2015.py --data-dir DIR                  about half an hour on a CPU
    python benchmarks/maclaurin2015.py --data-dir DIR --only images    one experiment

schedule: rates per layer and step, momentum per step, an initial scale per layer, for 784-50-50-50-10 trained for 100
steps.
penalties: an L2 penalty for each of the 7,840 weights of a logistic regression. images: ten training images, one per
class.
long: one rate per step over 2,000 steps; and how long dL/dtheta_k is on the way back, at rates that are fine and that
are not.

Each is compared with its start, and with a random search (a constant rate and momentum, one penalty for all weights,
real images) that is given the same time; all choose by the same held-out data, and are measured with fresh networks on
test data that chose nothing. Each experiment runs in a process of its own. Writes results/maclaurin2015.json, and what
pictures show to results/maclaurin_drawn.json (with --pictures that alone, in eight minutes);
`python benchmarks/report.py` makes tables and pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import MIB, PeakMemory, load, machine, save, versions
from torch import Tensor
from trainings import Mnist, Train, descend, network, plain_training, random_search, regression

import revdistill as rd
from revdistill.outer.data import DATA_DIR
from revdistill.outer.data import load as load_data

OUTER_STEPS, STEPS, RESTARTS = 50, 100, 20
NETWORKS = 4  # in each outer step that learns a schedule
LONG, LONG_OUTER_STEPS, LONG_START, LONG_CLIP = 2_000, 12, 0.01, 10.0  # a rate at which nothing explodes yet
SMALL = 1_000  # training samples of the penalties: few enough that a penalty matters

# Rates, momenta, initial scales


def schedule(mnist: Mnist, quick: bool, learn_only: bool = False) -> dict[str, Any]:
    """The paper's section 3.1 and 3.2."""
    layers = 4
    start = {
        "lr": torch.full((STEPS, layers), math.log(0.1)),
        "momentum": torch.zeros(STEPS),
        "scale": torch.zeros(layers),
    }
    leaves = {name: t.clone().requires_grad_() for name, t in start.items()}
    drawn = mnist.batch(0)
    table = [drawn(k) for k in range(STEPS)]  # one order of the data, as in the paper; each training starts elsewhere

    def batch(k: int) -> tuple[Tensor, Tensor]:
        return table[k]

    def outer_loss(k: int) -> Tensor:
        loss, params = rd.stack_modules([network(k * NETWORKS + i) for i in range(NETWORKS)], F.cross_entropy)
        scales, columns = leaves["scale"].exp(), list(leaves["lr"].exp().unbind(1))
        layer = {name: i // 2 for i, name in enumerate(params)}  # a weight and a bias each
        scaled = {name: p * scales[layer[name]] if p.ndim == 3 else p for name, p in params.items()}
        optimizer = rd.SGD({name: columns[layer[name]] for name in params}, leaves["momentum"].sigmoid())
        theta = rd.unroll(loss, scaled, batch, optimizer, steps=STEPS)
        return loss(theta, mnist.held_out(k)) / NETWORKS

    with PeakMemory("cpu") as peak:
        learned = descend(leaves, outer_loss, rate=0.04, steps=3 if quick else OUTER_STEPS)
    values = {name: t.detach() for name, t in leaves.items()}

    def train_with(found: dict[str, Tensor]) -> Train:
        def train(seed: int) -> Callable[[Tensor], Tensor]:
            net = network(seed)
            with torch.no_grad():
                for scale, layer in zip(found["scale"].exp(), net[1::2], strict=True):
                    layer.weight.mul_(scale)  # type: ignore[operator,union-attr]
            return plain_training(net, batch, found["lr"].exp(), found["momentum"].sigmoid())

        return train

    def draw(generator: torch.Generator) -> tuple[Any, Train]:
        lr, rest = torch.rand(2, generator=generator).tolist()
        chosen = {"lr": 10 ** (-3 + 3 * lr), "momentum": 1 - 10 ** (-2 * rest)}  # 0.001 to 1; 0 to 0.99, finer near 1
        constant = {
            "lr": torch.full((STEPS, layers), math.log(chosen["lr"])),
            "momentum": torch.full((STEPS,), chosen["momentum"]).logit(),
            "scale": torch.zeros(layers),
        }
        return chosen, train_with(constant)

    drawn = {"curve": learned["curve"], "start": {name: float(t.flatten()[0]) for name, t in start.items()}}
    drawn |= {name: rounded(t) for name, t in values.items()}
    if learn_only:
        return {"drawn": drawn}
    best, train_best, tried = random_search(mnist, draw, learned["seconds"])
    print(f"  random search: {tried} tried, {best}", flush=True)
    return {
        "drawn": drawn,
        "title": f"784-50-50-50-10, {STEPS} steps: {STEPS * layers} rates, {STEPS} momenta, {layers} initial scales",
        "learned_numbers": sum(t.numel() for t in leaves.values()),
        "seconds": learned["seconds"],
        "peak_bytes": peak.nbytes,
        "curve": learned["curve"],
        "search": {"tried": tried, "best": best},
        "start": mnist.measured(train_with(start), RESTARTS),
        "learned": mnist.measured(train_with(values), RESTARTS),
        "random_search": mnist.measured(train_best, RESTARTS),
    }


# A penalty per weight


def penalties(mnist: Mnist, quick: bool, learn_only: bool = False) -> dict[str, Any]:
    """The paper's section 3.3 of 7,840 penalties; half the loss's L2 term, penalty_ij w_ij^2 / 2."""
    lr, momentum = torch.full((STEPS, 1), 0.02), torch.full((STEPS,), 0.9)
    raw = torch.full((10, 784), math.log(1e-3), requires_grad=True)

    def outer_loss(k: int) -> Tensor:
        net = regression(k)
        plain, params = rd.from_module(net, F.cross_entropy)

        def loss(params: dict[str, Tensor], batch: Any, penalty: Tensor) -> Tensor:
            return plain(params, batch) + (penalty * params["1.weight"].square()).sum() / 2

        theta = rd.unroll(loss, params, mnist.batch(k, of=SMALL), rd.SGD(0.02, 0.9), steps=STEPS, hyper=raw.exp())
        x, y = mnist.held_out(k)
        return F.cross_entropy(torch.func.functional_call(net, theta, (x,)), y)

    def train_with(penalty: Tensor | float) -> Train:
        return lambda seed: plain_training(regression(seed), mnist.batch(seed, of=SMALL), lr, momentum, penalty)

    def draw(generator: torch.Generator) -> tuple[Any, Train]:
        penalty = 10 ** (-5 + 6 * float(torch.rand((), generator=generator)))
        return {"penalty": penalty}, train_with(penalty)

    with PeakMemory("cpu") as peak:
        learned = descend({"raw": raw}, outer_loss, rate=0.3, steps=3 if quick else OUTER_STEPS)
    drawn = {"log10": rounded(raw.detach() / math.log(10))}
    if learn_only:
        return {"drawn": drawn}
    best, train_best, tried = random_search(mnist, draw, learned["seconds"])
    print(f"  random search: {tried} tried, {best}", flush=True)
    return {
        "drawn": drawn,
        "title": f"logistic regression on {SMALL} images, {STEPS} steps: 7,840 penalties",
        "learned_numbers": raw.numel(),
        "seconds": learned["seconds"],
        "peak_bytes": peak.nbytes,
        "curve": learned["curve"],
        "search": {"tried": tried, "best": best},
        "start": mnist.measured(train_with(1e-3), RESTARTS),
        "learned": mnist.measured(train_with(raw.detach().exp()), RESTARTS),
        "random_search": mnist.measured(train_best, RESTARTS),
    }


# Training images


def images(mnist: Mnist, quick: bool, learn_only: bool = False) -> dict[str, Any]:
    """The paper's section 3.4: ten images, one of each class, that a logistic regression is trained on."""
    data = mnist.data
    lr, momentum = torch.full((STEPS, 1), 0.02), torch.full((STEPS,), 0.9)
    of_class = [(data.y == c).nonzero()[:, 0] for c in range(10)]
    labels = torch.arange(10)

    def real(generator: torch.Generator) -> Tensor:
        return torch.stack([data.x[own[int(torch.randint(len(own), (), generator=generator))]] for own in of_class])

    start = real(torch.Generator().manual_seed(1))
    x = start[None].clone().requires_grad_()

    def outer_loss(k: int) -> Tensor:
        net = regression(k)
        loss, params = rd.from_module(net, F.cross_entropy)
        theta = rd.unroll(loss, params, (x, labels[None]), rd.SGD(0.02, 0.9), steps=STEPS)
        xs, ys = mnist.held_out(k)
        return F.cross_entropy(torch.func.functional_call(net, theta, (xs,)), ys)

    def train_with(pictures: Tensor) -> Train:
        return lambda seed: plain_training(regression(seed), lambda _: (pictures, labels), lr, momentum)

    def draw(generator: torch.Generator) -> tuple[Any, Train]:
        pictures = real(generator)
        return None, train_with(pictures)

    with PeakMemory("cpu") as peak:
        learned = descend({"x": x}, outer_loss, rate=0.1, steps=3 if quick else OUTER_STEPS)
    drawn = {"start": rounded(start[:, 0]), "learned": rounded(x.detach()[0, :, 0])}
    if learn_only:
        return {"drawn": drawn}
    _, train_best, tried = random_search(mnist, draw, learned["seconds"])
    return {
        "drawn": drawn,
        "title": f"logistic regression, {STEPS} steps on ten images: 7,840 pixels",
        "learned_numbers": x.numel(),
        "seconds": learned["seconds"],
        "peak_bytes": peak.nbytes,
        "curve": learned["curve"],
        "search": {"tried": tried, "best": "ten real images"},
        "start": mnist.measured(train_with(start), RESTARTS),
        "learned": mnist.measured(train_with(x.detach()[0]), RESTARTS),
        "random_search": mnist.measured(train_best, RESTARTS),
    }


# Long horizons


def long(mnist: Mnist, quick: bool, learn_only: bool = False) -> dict[str, Any]:
    """A rate per step over T = 2,000; and the norms of dL/dtheta_k at several constant rates."""
    steps = 200 if quick else LONG
    raw = torch.full((steps,), math.log(LONG_START), requires_grad=True)

    def held_out_loss(k: int, lr: Tensor | float, horizon: int, **options: Any) -> Tensor:
        net = network(k)
        loss, params = rd.from_module(net, F.cross_entropy)
        theta = rd.unroll(loss, params, mnist.batch(k), rd.SGD(lr, 0.9), steps=horizon, **options)
        x, y = mnist.held_out(k)
        return F.cross_entropy(torch.func.functional_call(net, theta, (x,)), y)

    memory = []
    held_out_loss(0, raw[:3].exp(), 3).backward()  # type: ignore[no-untyped-call]  # what a first call needs once
    for horizon in (steps // 20, steps):
        with PeakMemory("cpu") as peak:
            held_out_loss(0, raw[:horizon].exp(), horizon).backward()  # type: ignore[no-untyped-call]
        memory.append({"steps": horizon, "bytes": peak.nbytes})
        print(f"  T = {horizon}: {peak.nbytes / MIB:.1f} MiB", flush=True)
    raw.grad = None
    norms = [
        norms_at(rate, clip, held_out_loss, steps)
        for rate, clip in ((0.01, None), (0.05, None), (0.5, None), (0.5, LONG_CLIP))
    ]
    learned = descend(
        {"raw": raw},
        lambda k: held_out_loss(k, raw.exp(), steps, clip_back=LONG_CLIP),
        rate=0.1,
        steps=2 if quick else LONG_OUTER_STEPS,
    )

    def train_with(rates: Tensor, momentum: float = 0.9) -> Train:
        return lambda seed: plain_training(
            network(seed), mnist.batch(seed), rates[:, None], torch.full((steps,), momentum)
        )

    def draw(generator: torch.Generator) -> tuple[Any, Train]:
        lr, rest = torch.rand(2, generator=generator).tolist()
        chosen = {"lr": 10 ** (-3 + 3 * lr), "momentum": 1 - 10 ** (-2 * rest)}
        return chosen, train_with(torch.full((steps,), chosen["lr"]), chosen["momentum"])

    drawn = {"rates": rounded(raw.detach().exp()), "start": LONG_START, "norms": norms}
    if learn_only:
        return {"drawn": drawn}
    best, train_best, tried = random_search(mnist, draw, learned["seconds"])
    print(f"  random search: {tried} tried, {best}", flush=True)
    restarts = 5
    return {
        "drawn": drawn,
        "title": f"784-50-50-50-10, {steps} steps: {steps} rates",
        "learned_numbers": steps,
        "seconds": learned["seconds"],
        "peak_bytes": memory[-1]["bytes"],
        "curve": learned["curve"],
        "memory": memory,
        "norms": norms,
        "search": {"tried": tried, "best": best},
        "start": mnist.measured(train_with(torch.full((steps,), LONG_START)), restarts),
        "learned": mnist.measured(train_with(raw.detach().exp()), restarts),
        "random_search": mnist.measured(train_best, restarts),
    }


def norms_at(rate: float, clip: float | None, held_out_loss: Callable[..., Tensor], steps: int) -> dict[str, Any]:
    """How long dL/dtheta_k is at a constant rate, from where it explodes, and whether it ended as infinity."""
    kept, ended = rd.BackwardNorms(), "finite"
    start = torch.full((steps,), rate, requires_grad=True)
    try:
        held_out_loss(0, start, steps, on_step_back=kept, clip_back=clip).backward()
    except rd.NonFiniteError as error:
        ended = f"NonFiniteError at step {error.step}"
    most = max(kept.norms.values())
    print(f"  rate {rate}, clip_back {clip}: explodes from {kept.explosion()}, at most {most:.1e}, {ended}", flush=True)
    sampled = sorted(kept.norms)[:: max(1, steps // 200)]
    return {
        "rate": rate,
        "clip_back": clip,
        "explosion": kept.explosion(),
        "largest": most,
        "ended": ended,
        "steps": sampled,
        "norms": [kept.norms[k] for k in sampled],
    }


def rounded(values: Tensor) -> Any:
    """To four digits, as lists: what a picture can show."""
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: float(f"{float(text):.4g}"))


EXPERIMENTS = {"schedule": schedule, "penalties": penalties, "images": images, "long": long}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=DATA_DIR)
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="three outer steps each, nothing kept")
    parser.add_argument("--pictures", action="store_true", help="learn again what pictures show, and measure nothing")
    parser.add_argument("--into", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.into:  # the process of one experiment
        torch.set_num_threads(1)
        mnist = Mnist(load_data("mnist", options.data_dir))
        found = EXPERIMENTS[options.only[0]](mnist, options.quick, options.pictures)
        (Path(options.into) / "found.json").write_text(json.dumps(found))
        return
    for name in options.only:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--data-dir", str(options.data_dir), "--only", name, "--into", folder]
            command += ["--quick"] * options.quick + ["--pictures"] * options.pictures
            subprocess.run(command, check=True)
            found = json.loads((Path(folder) / "found.json").read_text())
        for who in ("start", "random_search", "learned"):
            if who in found:
                print(f"  {who}: {found[who]}", flush=True)
        drawn = found.pop("drawn")
        if not options.quick:  # after each: what is stopped has not been for nothing
            keep("maclaurin_drawn", name, drawn)
        if not options.quick and not options.pictures:
            keep("maclaurin2015", name, found)


def keep(file: str, name: str, found: dict[str, Any]) -> None:
    """An experiment beside the others."""
    kept = (load(file) or {"experiments": {}})["experiments"] | {name: found}
    experiments = {key: kept[key] for key in EXPERIMENTS if key in kept}
    results = {"machine": machine("cpu", 1), "versions": versions(), "experiments": experiments}
    save(file, results, indent=None if file == "maclaurin_drawn" else 1)  # thousands of numbers: not a line for each


if __name__ == "__main__":
    main()
