"""Which chunk of the text taught a language model this? Attribution on a GPT of 1 M parameters, on one core.

A GPT (gpt.py) is trained on 2,000 chunks of 64 characters in 1,000 steps of AdamW. The metagradient of held-out losses
with respect to the weight of each chunk is exact, in the memory of one step. Parts, each of which renews its own
figures in results/language_model.json:

    scores    the scores of the mean held-out loss and of single held-out chunks, each query's most helpful and most
              harmful chunks in print, and the errors of scores in float32
    lds       20 trainings without a random 1 % of the chunks, in a plain loop with torch.optim.AdamW, and the rank
              correlation of their held-out losses with those that the scores predict
    memory    the peak of one metagradient at T = 250, 500 and 1,000, each in a fresh process
    speed     one metagradient against the plain loop, in turn; many queries against one
    bergson   MAGIC of the bergson package on a tiny GPT-2, beside ours on the same module, data and order; needs an
              environment that has it: --bergson-python FILE (pip install bergson==2.5.1)
    adam      two fixed-point Adams there and back: reversible_adam.py

    python benchmarks/language_model.py                           all but bergson: about an hour on one core
    python benchmarks/language_model.py --parts speed memory      what must be measured on a machine at rest
    python benchmarks/language_model.py --scratch DIR             keeps scores and trainings there and reads them again

Writes results/language_model.json; `python benchmarks/report.py` makes the tables of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import gpt
import numpy as np
import reversible_adam
import torch
from measuring import MIB, PeakMemory, arguments_of, load, machine, save, versions
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

import revdistill as rd

RETRAININGS, DROPPED, QUERIES, SHOWN = 20, 0.01, 8, 3
HORIZONS = (250, 500, 1_000)
GRAPH_HORIZONS = (4, 8)  # plain autograd's: its memory grows on a line
TIMED_STEPS, ROUNDS, CHECKED_STEPS, WARM_UP = 20, 5, 8, 3
ADJOINT = rd.Reversible(graph_bytes=0)  # keep no graphs: they make short runs look faster than long ones
SMALL = {"width": 32, "layers": 1, "heads": 1}  # the network of reversible_adam.py
MAGIC = {"train": 500, "held_out": QUERIES, "batch": 8, "steps": 250}  # what bergson is compared on
# who, how bergson spaces its checkpoints, how many queries; log takes many times sqrt's steps again
COMPARED = (
    ("bergson", "sqrt", 1),
    ("bergson", "sqrt", QUERIES),
    ("bergson", "log", 1),
    ("ours", "", 1),
    ("ours", "", QUERIES),
)
NAME = "language_model"


class Scratch:
    """Arrays kept in a folder under what they were computed from; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, run: gpt.Run) -> None:
        stated = json.dumps([run.said["sha256"], repr(run.size), str(torch.__version__)])
        self._folder, self._stem = folder, hashlib.sha256(stated.encode()).hexdigest()[:12]

    def get(self, name: str, compute: Callable[[], Any]) -> np.ndarray:
        """The array of that name, computed where the folder lacks it."""
        if self._folder is None:
            return np.asarray(compute())
        path = self._folder / f"{self._stem}-{name}.npy"
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            np.save(path, np.asarray(compute()))
        return np.load(path)


# Scores


def outputs(run: gpt.Run, theta: dict[str, Tensor], queries: int) -> Tensor:
    """The mean held-out loss, then the losses of the first held-out chunks [1 + queries]."""
    found = run.losses(theta, run.held_out)
    return torch.cat([found.mean()[None], found[:queries]])


def metagradient(run: gpt.Run, steps: int, queries: int, adjoint: rd.Adjoint = ADJOINT) -> tuple[Tensor, Tensor]:
    """(losses [1 + queries], their derivatives with respect to each chunk's weight [1 + queries, n])."""
    weights = torch.ones(run.size.train, dtype=run.params["norm.weight"].dtype, requires_grad=True)
    batches = rd.Minibatches((weights, run.train), run.order[:steps])
    theta = rd.unroll(run.weighted, run.params, batches, run.optimizer(steps), steps=steps, adjoint=adjoint)
    found = outputs(run, theta, queries)
    if not queries:
        return found.detach(), torch.autograd.grad(found.sum(), weights)[0][None]
    return found.detach(), rd.jacobian(found, weights)


def scores(run: gpt.Run, scratch: Scratch, queries: int) -> dict[str, np.ndarray]:
    """{"losses" [1 + queries], "scores" [1 + queries, n]} of the whole training."""

    def compute() -> np.ndarray:
        losses, found = metagradient(run, run.size.steps, queries)
        return torch.cat([losses[:, None], found], 1).double().numpy()

    kept = scratch.get(f"scores-{queries}", compute)
    return {"losses": kept[:, 0], "scores": kept[:, 1:]}


def in_print(run: gpt.Run, found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Each single query with the chunks whose leaving out would raise its loss most, and lower it most."""
    shown = []
    for query, (loss, row) in enumerate(zip(found["losses"][1:], found["scores"][1:], strict=True)):
        ranks = np.argsort(row)
        shown.append(
            {
                "text": gpt.text(run.held_out[query]),
                "loss": float(loss),
                "helpful": [_entry(run, row, i) for i in ranks[:SHOWN]],
                "harmful": [_entry(run, row, i) for i in ranks[::-1][:SHOWN]],
            }
        )
    return shown


def _entry(run: gpt.Run, row: np.ndarray, i: int) -> dict[str, Any]:
    return {"chunk": int(i), "score": float(row[i]), "text": gpt.text(run.train[i])}


def scores_part(run: gpt.Run, scratch: Scratch, options: argparse.Namespace) -> dict[str, Any]:
    """What the scores say, and how far a short run's are from those of plain autograd in float64."""
    found = scores(run, scratch, options.queries)
    print(f"held-out loss {found['losses'][0]:.4f}", flush=True)
    return {
        "held_out_loss": float(found["losses"][0]),
        "largest": float(np.abs(found["scores"][0]).max()),
        "typical": float(np.median(np.abs(found["scores"][0]))),
        "queries": in_print(run, found),
        "difference_from_autograd": {"steps": CHECKED_STEPS, "relative": difference(run)},
    }


def difference(run: gpt.Run) -> float:
    """Of a short run's metagradient in float32 from plain autograd's in float64, relative to its norm."""
    _, mine = metagradient(run, CHECKED_STEPS, 0)
    exact = replace(run, net=gpt.network(run.size).double())
    _, expected = metagradient(exact, CHECKED_STEPS, 0, rd.Backprop())
    return float((mine - expected).norm() / expected.norm())


# Truth


def dropped(run: gpt.Run, retraining: int) -> Tensor:
    """The chunks that a retraining leaves out."""
    generator = torch.Generator().manual_seed(1_000 + retraining)
    return torch.randperm(run.size.train, generator=generator)[: round(DROPPED * run.size.train)]


def retrain(run: gpt.Run, without: Tensor) -> np.ndarray:
    """Held-out losses [held_out] after a plain training in which those chunks weigh nothing."""
    weights = torch.ones(run.size.train)
    weights[without] = 0
    params = gpt.train_by_hand(run, weights, run.size.steps)
    with torch.no_grad():
        return run.losses(params, run.held_out).double().numpy()


def retrainings(run: gpt.Run, scratch: Scratch, count: int) -> np.ndarray:
    """Held-out losses [1 + count, held_out]: with every chunk, then without some."""
    found = []
    for i in range(-1, count):
        started = time.perf_counter()
        name, without = ("plain", torch.tensor([], dtype=torch.long)) if i < 0 else (f"retraining-{i}", dropped(run, i))
        found.append(scratch.get(name, lambda without=without: retrain(run, without)))  # type: ignore[misc]
        print(f"{name}: {found[-1].mean():.5f}, {time.perf_counter() - started:.0f} s", flush=True)
    return np.stack(found)


def lds_part(run: gpt.Run, scratch: Scratch, options: argparse.Namespace) -> dict[str, Any]:
    """Rank correlations over retrainings of predicted and true losses."""
    truth = retrainings(run, scratch, options.retrainings)
    found = scores(run, scratch, options.queries)
    true = np.concatenate([truth.mean(1, keepdims=True), truth[:, : options.queries]], 1)  # as `outputs`
    changes = true[1:] - true[0]
    predicted = np.stack([-found["scores"][:, dropped(run, i).numpy()].sum(1) for i in range(options.retrainings)])
    ranks = [float(spearmanr(p, t).statistic) for p, t in zip(predicted.T, changes.T, strict=True)]
    lines = [float(pearsonr(p, t).statistic) for p, t in zip(predicted.T, changes.T, strict=True)]
    print(f"LDS {ranks[0]:.3f} (mean loss), {np.mean(ranks[1:]):.3f} (single queries)", flush=True)
    return {
        "retrainings": options.retrainings,
        "dropped": DROPPED,
        "plain_held_out_loss": float(true[0, 0]),
        "spearman_mean_loss": ranks[0],
        "spearman_queries": ranks[1:],
        "pearson_mean_loss": lines[0],
        "pearson_queries": lines[1:],
        "changes_mean_loss": {"predicted": predicted[:, 0].tolist(), "true": changes[:, 0].tolist()},
    }


# Memory and speed


def one_peak(run: gpt.Run, method: str, steps: int) -> dict[str, Any]:
    """{"bytes", "seconds"} above what was there, in this process, after a warm-up."""
    ways: dict[str, Callable[[int], Any]] = {
        "ours": lambda steps: metagradient(run, steps, 0),
        "autograd": lambda steps: metagradient(run, steps, 0, rd.Backprop()),
        "training": lambda steps: gpt.train_by_hand(run, torch.ones(run.size.train), steps),
    }
    ways[method](WARM_UP)
    with PeakMemory("cpu") as peak:
        started = time.perf_counter()
        ways[method](steps)
        seconds = time.perf_counter() - started
    return {"method": method, "steps": steps, "bytes": peak.nbytes, "seconds": seconds}


def memory_part(run: gpt.Run, scratch: Scratch, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peaks in fresh processes; of plain autograd two short runs, between which its memory grows on a line."""
    wanted = [("training", HORIZONS[0]), *(("ours", T) for T in HORIZONS), *(("autograd", T) for T in GRAPH_HORIZONS)]
    rows = []
    for method, steps in wanted:
        command = [sys.executable, __file__, "--peak-of", method, "--peak-steps", str(steps)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(answer.splitlines()[-1]))
        print(f"{method} {steps}: {rows[-1]['bytes'] / MIB:.0f} MiB, {rows[-1]['seconds']:.0f} s", flush=True)
    return rows


def speed_part(run: gpt.Run, scratch: Scratch, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per step of the plain loop, of one metagradient and of many, taken in turn."""
    ways: dict[str, Callable[[], Any]] = {
        "training": lambda: gpt.train_by_hand(run, torch.ones(run.size.train), TIMED_STEPS),
        "one": lambda: metagradient(run, TIMED_STEPS, 0),
        "many": lambda: metagradient(run, TIMED_STEPS, options.queries),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):  # the first warms up
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - started)
    found: dict[str, Any] = {"steps": TIMED_STEPS, "rounds": ROUNDS, "queries": options.queries + 1}
    for name, seconds in times.items():
        found[name] = {
            "ms_per_step": 1e3 * median(seconds) / TIMED_STEPS,
            "ratio_to_training": median(s / t for s, t in zip(seconds, times["training"], strict=True)),
        }
        print(f"{name}: {found[name]['ms_per_step']:.1f} ms, {found[name]['ratio_to_training']:.2f}", flush=True)
    return found


# Others


def bergson_part(run: gpt.Run, scratch: Scratch, options: argparse.Namespace) -> dict[str, Any]:
    """MAGIC of the bergson package and ours on a tiny GPT-2, each in fresh processes of bergson's environment."""
    task = gpt.prepare(replace(run.size, **MAGIC))
    found: dict[str, Any] = {"size": {**MAGIC, "length": task.size.length}, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        np.savez(data, chunks=task.train.numpy(), queries=task.held_out.numpy(), order=task.order.numpy())
        kept = {}
        for who, mode, queries in COMPARED:
            out = Path(folder) / f"{who}-{mode}-{queries}.npz"
            command = [str(options.bergson_python), str(Path(__file__).with_name("bergson_magic.py"))]
            command += ["--who", who, "--data", str(data), "--out", str(out), "--queries", str(queries)]
            command += ["--save-mode", mode] if mode else []
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(answer.splitlines()[-1])
            found["rows"].append(row | {"save_mode": mode})
            kept[who, mode, queries] = np.load(out)["scores"]
            print(f"{who} {mode} {queries}: {row['seconds']:.1f} s, {row['bytes'] / MIB:.0f} MiB", flush=True)
    mine, theirs = kept["ours", "", QUERIES], kept["bergson", "sqrt", QUERIES]
    found["agreement"] = {
        "pearson": [float(pearsonr(a, b).statistic) for a, b in zip(mine, theirs, strict=True)],
        "spearman": [float(spearmanr(a, b).statistic) for a, b in zip(mine, theirs, strict=True)],
        "difference": float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)),
    }
    return found


def adam_part(run: gpt.Run, scratch: Scratch, options: argparse.Namespace) -> dict[str, Any]:
    """Adam there and back on a small network, four ways."""
    return reversible_adam.compare(gpt.prepare(replace(run.size, **SMALL)))


PARTS = {
    "scores": scores_part,
    "lds": lds_part,
    "memory": memory_part,
    "speed": speed_part,
    "bergson": bergson_part,
    "adam": adam_part,
}


def main() -> None:
    """The command."""
    parser = arguments_of(__doc__)
    usual = [part for part in PARTS if part != "bergson"]
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help=f"default: {' '.join(usual)}")
    parser.add_argument("--scratch", type=Path, help="a folder for scores and trainings; without it nothing is kept")
    parser.add_argument("--retrainings", type=int, default=RETRAININGS)
    parser.add_argument("--queries", type=int, default=QUERIES, help="single held-out chunks beside the mean loss")
    parser.add_argument("--bergson-python", type=Path, help="a Python that has bergson and revdistill")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--peak-steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device != "cpu":
        parser.error("--device: this benchmark is for a CPU")
    torch.set_num_threads(1)
    run = gpt.prepare(gpt.Size())
    if options.peak_of:
        print(json.dumps(one_peak(run, options.peak_of, options.peak_steps)))
        return
    parts = options.parts or usual
    if "bergson" in parts and options.bergson_python is None:
        parser.error("--parts bergson needs --bergson-python FILE, the Python of an environment with bergson in it")
    scratch = Scratch(options.scratch, run)
    for part in parts:
        found = PARTS[part](run, scratch, options)
        results = load(NAME) or {}
        results |= {
            "text": run.said,
            "size": {**asdict(run.size), "parameters": sum(p.numel() for p in run.net.parameters())},
        }
        results |= {"machine": machine("cpu", 1), "versions": versions()}  # of the last part
        measured = found["rows"][0]["versions"] if part == "bergson" else versions()
        results[part] = {"machine": machine("cpu", 1), "versions": measured, "found": found}
        save(NAME, results)


if __name__ == "__main__":
    main()
