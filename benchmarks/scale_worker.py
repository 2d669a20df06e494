"""One process of a group that benchmarks/scale.py measures: it answers requests, a line of JSON each.

python benchmarks/scale_worker.py RANK SIZE THREADS STORE
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from measuring import PeakMemory, give_back
from torch import Tensor, nn
from torch.nn import functional as F

import revdistill as rd
from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.engine import unrolled
from revdistill.engine.ranks.group import Ranks
from revdistill.outer import models
from revdistill.outer.data import load
from revdistill.outer.ranks import ALONE, Processes

ROWS = 4  # batches, gone through again and again
SHAPE, CLASSES = (1, 28, 28), 10
INPUTS = 28 * 28
OPTIMIZERS: dict[str, Callable[[], rd.Optimizer]] = {
    # decays that put bits away within few steps
    "SGD": lambda: rd.SGD(0.01, 0.05),
    "AdamW": lambda: rd.AdamW(1e-4, betas=(0.05, 0.999)),
}


class Noted(Ranks):
    """Ranks whose `sent` can be read."""

    found: list[Ranks] = []  # noqa: RUF012

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.found.append(self)

    @classmethod
    def all_sent(cls) -> int:
        """Bytes, by all of them."""
        return sum(ranks.sent for ranks in cls.found)


class Member:
    """This process."""

    def __init__(self, rank: int, size: int, store: str) -> None:
        self.rank, self.size = rank, size
        self.group: dist.ProcessGroup | None = None
        if size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(minutes=5)
            )
            self.group = dist.group.WORLD
        self._distillers: dict[str, Distiller] = {}

    def share(self, t: Tensor, dim: int) -> Tensor:
        """This rank's rows."""
        return t.tensor_split(self.size, dim)[self.rank].contiguous()

    def train(self, config: dict[str, Any], data_dir: str, steps: int) -> dict[str, Any]:
        """So many outer steps more of a distillation, and the bits that it has then."""
        name = json.dumps(config)
        if name not in self._distillers:
            ranks = None if self.group is None else Ranks(self.group, torch.device("cpu"))
            processes = ALONE if ranks is None else Processes(ranks)
            made = Config.from_dict(config)
            self._distillers[name] = Distiller(made, load(made.dataset, data_dir), processes)
        distiller = self._distillers[name]
        started = time.perf_counter()
        for _ in range(steps):
            distiller.step()
        seconds = (time.perf_counter() - started) / steps
        bits = hashlib.sha256()
        for leaf in distiller.synthetic.leaves.values():
            bits.update(leaf.detach().numpy().tobytes())
        return {"seconds": seconds, "bits": bits.hexdigest()}

    def unroll(
        self, network: str, batch: int, steps: int, shard: bool, dtype: str, path: str | None = None
    ) -> dict[str, Any]:
        """One hypergradient with respect to data and step sizes; path: where it is written, without rank and end."""
        torch.manual_seed(0)
        net = models.build(network, SHAPE, CLASSES).to(getattr(torch, dtype))
        loss, params = rd.from_module(net, F.cross_entropy)
        params = {name: p.detach() for name, p in params.items()}
        x = torch.randn(ROWS, batch, *SHAPE, dtype=getattr(torch, dtype))
        y = torch.arange(ROWS * batch).reshape(ROWS, batch) % CLASSES
        held_out = (x[0].flip(0) * 0.9, y[0].flip(0))
        mine = (self.share(x, 1).requires_grad_(), self.share(y, 1))
        rates = torch.full((steps,), 0.01, dtype=torch.float64, requires_grad=True)
        Noted.found.clear()
        started = time.perf_counter()
        own = {} if self.group is None else {"group": self.group, "shard": shard}
        theta = rd.unroll(loss, params, mine, rd.SGD(rates, 0.9), steps=steps, adjoint=rd.Reversible(), **own)
        halfway, sent = time.perf_counter(), Noted.all_sent()
        outer = loss(theta, held_out)
        before_back = time.perf_counter()
        grads = torch.autograd.grad(outer, [mine[0], rates])
        ended = time.perf_counter()
        if path is not None:
            np.savez(f"{path}-{self.rank}.npz", x=grads[0].double().numpy(), rates=grads[1].numpy())
        return {
            "parameters": sum(p.numel() for p in params.values()),
            "seconds_forward": (halfway - started) / steps,
            "seconds_back": (ended - before_back) / steps,
            "sent_forward": sent / steps,
            "sent_back": (Noted.all_sent() - sent) / steps,
        }

    def memory(self, optimizer: str, width: int, batch: int, steps: int, shard: bool) -> dict[str, Any]:
        """The peak of one hypergradient of a network 784-width-width-10."""
        once = self._once
        once(optimizer, 8, batch, 3, shard)
        started = time.perf_counter()
        nbytes, stats = once(optimizer, width, batch, steps, shard)
        return {
            "parameters": wide_parameters(width),
            "state_bytes": stats.state_bytes,
            "history_bytes": stats.history_bytes,
            "peak_bytes": nbytes,
            "seconds": time.perf_counter() - started,
        }

    def _once(self, optimizer: str, width: int, batch: int, steps: int, shard: bool) -> tuple[int, rd.UnrollStats]:
        loss, params = wide(width)
        x, y = torch.randn(1, batch, INPUTS), torch.arange(batch)[None] % CLASSES
        mine = (self.share(x, 1).requires_grad_(), self.share(y, 1))
        own = {} if self.group is None else {"group": self.group, "shard": shard}
        with PeakMemory("cpu") as peak:
            adjoint, chosen = rd.Reversible(graph_bytes=0), OPTIMIZERS[optimizer]()
            theta, stats = rd.unroll(loss, params, mine, chosen, steps=steps, adjoint=adjoint, return_stats=True, **own)
            torch.autograd.grad(loss(theta, (x[0, :8], y[0, :8])), mine[0])
        return peak.nbytes, stats

    def attribution(self, width: int, queries: int, batch: int, steps: int) -> dict[str, Any]:
        """The peak of a training and the way back of so many losses at once; in parts, where there is a group."""
        self._attribute(8, queries, batch, 3)
        started = time.perf_counter()
        nbytes = self._attribute(width, queries, batch, steps)
        return {
            "parameters": wide_parameters(width),
            "peak_bytes": nbytes,
            "seconds": time.perf_counter() - started,
        }

    def _attribute(self, width: int, queries: int, batch: int, steps: int) -> int:
        loss, params = wide(width, reduction="none")
        x, y = torch.randn(batch + queries, INPUTS), torch.arange(batch + queries) % CLASSES
        mine = (self.share(x[:batch], 0), self.share(y[:batch], 0))
        order = torch.arange(len(mine[0])).repeat(steps, 1)
        own = {} if self.group is None else {"group": self.group, "shard": True}
        with PeakMemory("cpu") as peak:
            rd.attribute(
                loss,
                params,
                mine,
                rd.SGD(0.01, 0.9),
                order=order,
                queries=(x[batch:], y[batch:]),
                adjoint=rd.Reversible(graph_bytes=0),
                **own,
            )
        return peak.nbytes


def wide(width: int, reduction: str = "mean") -> tuple[Any, dict[str, Tensor]]:
    """A network 784-width-width-10, the same on all ranks: almost all of its memory is its parameters'."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES)
    )
    loss, params = rd.from_module(net, nn.CrossEntropyLoss(reduction=reduction))
    return loss, {name: p.detach() for name, p in params.items()}


def wide_parameters(width: int) -> int:
    """How many `wide` has."""
    return (INPUTS + 1) * width + (width + 1) * width + (width + 1) * CLASSES


def main(rank: int, size: int, threads: int, store: str) -> None:
    """Answer requests until there are no more."""
    torch.set_num_threads(threads)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def reply(answer: dict[str, Any]) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    unrolled.Ranks = Noted  # type: ignore[misc]
    member = Member(rank, size, store)
    reply({"started": True})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(member, request.pop("do"))(**request)
        except Exception as error:  # a failure is a result
            text = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {text[0][:300] if text else ''}"}
        give_back()
        reply(answer)
    os._exit(0)  # a group whose other processes are gone cannot be taken down in order


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
