"""A network of GPT-2's size (124 M parameters, random weights, random tokens), AdamW, 512 tokens a chunk: the memory
and the seconds of a step forward and back, for the derivative of a held-out loss with respect to every chunk's weight.

    python -m gpu.gpt2 --device cuda

Two small batches say what a chunk takes; the largest power of two that fits, at most 64, is then trained on: four
steps, and as many of 72 as there is time for by these. Too little memory is a result. (A state of that size is stepped
eagerly: its steps are long.)
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gpt
import torch
from measuring import PeakMemory
from torch import Tensor
from torch.nn import functional as F

import revdistill as rd
from gpu.apart import apart, left, shared
from gpu.lines import options_of, write
from gpu.place import here, synchronise

SIZE, VOCABULARY = gpt.Size(width=768, layers=12, heads=12, length=512, batch=64, steps=72), 50_257
QUICK, QUICK_VOCABULARY = gpt.Size(width=16, layers=2, heads=2, length=8, batch=8, steps=6), 40
PROBES, FIRST, HELD_OUT = (2, 4), 4, 2  # batches (of 1, the integers would take more than the loss), steps, chunks
SHARE, ROOM = 0.8, 0.95  # of the time, and of the memory, that is planned for
TRIAL = 60.0  # seconds


@dataclass(frozen=True)
class Trial:
    """One hypergradient of so many steps on batches of so many chunks."""

    size: gpt.Size
    vocabulary: int
    batch: int
    steps: int

    def run(self, name: str) -> dict[str, Any]:
        """What it took."""
        torch.manual_seed(0)
        if name == "cuda":
            torch.cuda.empty_cache()  # what an earlier trial held in pieces
        with here(name) as device, PeakMemory(name) as peak:
            with torch.device(device):
                net = gpt.GPT(self.size, self.vocabulary)
                chunks = torch.randint(self.vocabulary, (self.steps * self.batch + HELD_OUT, self.size.length + 1))
                order = torch.arange(self.steps * self.batch).reshape(self.steps, self.batch)
                weights = torch.ones(self.steps * self.batch, requires_grad=True)

            def losses(params: dict[str, Tensor], chunks: Tensor) -> Tensor:
                logits = torch.func.functional_call(net, params, (chunks[:, :-1],))
                # of two dimensions: torch has no deterministic kernel for more
                found = F.cross_entropy(logits.flatten(0, 1), chunks[:, 1:].flatten(), reduction="none")
                return found.view(len(chunks), -1).mean(1)

            def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
                return (batch[0] * losses(params, batch[1])).mean()

            params = {name: p.detach() for name, p in net.named_parameters()}
            synchronise(device)
            started = time.perf_counter()
            theta, stats = rd.unroll(
                loss,
                params,
                rd.Minibatches((weights, chunks[:-HELD_OUT]), order),
                rd.AdamW(self.size.rate, eps=self.size.eps),
                steps=self.steps,
                adjoint=rd.Reversible(graph_bytes=0),
                return_stats=True,
            )
            outer = losses(theta, chunks[-HELD_OUT:]).mean()
            synchronise(device)
            halfway = time.perf_counter()
            (scores,) = torch.autograd.grad(outer, weights)
            synchronise(device)
            ended = time.perf_counter()
        return {
            "parameters": stats.parameters,
            "seconds_forward": (halfway - started) / self.steps,
            "seconds_back": (ended - halfway) / self.steps,
            "peak_bytes": peak.nbytes,
            "state_bytes": stats.state_bytes,
            "history_bytes": stats.history_bytes,
            "finite": bool(scores.isfinite().all()),
        }

    @property
    def what(self) -> dict[str, Any]:
        """Names it in a line."""
        return {"batch": self.batch, "length": self.size.length, "steps": self.steps}


def memory(name: str) -> int:
    """Bytes of the device; of a CPU any number."""
    return int(torch.cuda.get_device_properties(0).total_memory) if name == "cuda" else 2**36


def probe(size: gpt.Size, vocabulary: int, name: str, answer: Any) -> None:
    """One step on two small batches; answer takes (bytes without chunks, bytes per chunk, bytes of the device)."""
    found = []
    for batch in PROBES:
        trial = Trial(size, vocabulary, batch, 1)
        found.append(trial.run(name)["peak_bytes"])
        write("gpt2", **trial.what, probe=True, peak_bytes=found[-1])
    each = (found[1] - found[0]) / (PROBES[1] - PROBES[0])
    answer[:] = [found[0] - PROBES[0] * each, each, memory(name)]


def estimated(trial: Trial, name: str) -> None:
    """The first steps of a trial, and then as many as there is time for."""
    short = Trial(trial.size, trial.vocabulary, trial.batch, min(FIRST, trial.steps))
    found = short.run(name)
    write("gpt2", **short.what, **found)
    steps = min(trial.steps, int(SHARE * left() / (found["seconds_forward"] + found["seconds_back"])))
    if steps > short.steps:
        whole = Trial(trial.size, trial.vocabulary, trial.batch, steps)
        write("gpt2", **whole.what, **whole.run(name))


def main() -> None:
    """The command."""
    options = options_of(__doc__).parse_args()
    if options.device == "standin":
        write("gpt2", skipped="the stand-in's memory is the CPU's")
        return
    size, vocabulary = (QUICK, QUICK_VOCABULARY) if options.quick else (SIZE, VOCABULARY)
    answer = shared(3)
    apart("gpt2", probe, size, vocabulary, options.device, answer, limit=TRIAL, what="probe")
    base, each, there = answer
    batch = size.batch
    while batch > 1 and each and base + batch * each > ROOM * there:
        batch //= 2
    write("gpt2", needed_for_the_whole_batch=base + size.batch * each, whole_batch=size.batch, memory=there, fits=batch)
    while batch and left() > 0:
        trial = Trial(size, vocabulary, batch, size.steps)
        if apart("gpt2", estimated, trial, options.device, **trial.what):
            break
        batch //= 2


if __name__ == "__main__":
    main()
