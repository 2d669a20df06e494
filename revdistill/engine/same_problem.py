"""What must be the same of an unroll on all ranks of a group, in the types of JSON."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revdistill.engine.adjoints.adjoint import Adjoint
from revdistill.engine.integers.fingerprint import fingerprint_of
from revdistill.engine.optimizers.optimizer import Optimizer
from revdistill.engine.problem import Problem

_OWN = ("history", "graph_bytes")  # of an adjoint: where a rank keeps words, and with what memory


def what_is_shared(problem: Problem, theta0: Tensor, optimizer: Optimizer, adjoint: Adjoint | None) -> dict[str, Any]:
    """By the argument that it comes from, tensors as fingerprints.

    Args:
        problem: of one rank.
        theta0: float [numel], whole.
        optimizer: as given.
        adjoint: as given.
    """
    layout = problem.update.layout if problem.shards is None else problem.shards.all
    settings = {name: v for name, v in vars(adjoint).items() if name not in _OWN} if adjoint is not None else {}
    found: dict[str, Any] = {
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "shard": problem.shards is not None,
        "the names and shapes of params": [[n, list(s)] for n, s in zip(layout.names, layout.shapes, strict=True)],
        "params": str([layout.dtype, fingerprint_of(theta0)]),
        "whether params require grad": theta0.requires_grad,
        "whether anything requires grad": any(
            t.requires_grad
            for t in (
                theta0,
                *(table.values for table in problem.update.tables.values()),
                *problem.data.tensors,
                *problem.data.hypers,
                *problem.start.slots.values(),
            )
        ),
        "steps": problem.steps,
        "window": problem.first,
        "save_at": None if problem.save_at is None else list(problem.save_at),
        "adjoint": None if adjoint is None else f"{type(adjoint).__name__}({settings})",
        "optimizer": type(optimizer).__name__,
    }
    found |= {f"optimizer.{name}": _of(table.values) for name, table in problem.update.tables.items()}
    found |= {f"the optimizer's {name}": str(v) for name, v in vars(optimizer).items() if isinstance(v, (bool, float))}
    found |= {
        "hyper": [_of(t) for t in problem.data.hypers],
        "state": [problem.start.taken, {name: _of(flat) for name, flat in problem.start.slots.items()}],
        "average": None if problem.average is None else list(problem.average),
        "clip_back": None if problem.clip_back is None else float(problem.clip_back),
        "return_state": problem.returns_state,
    }
    if problem.shards is not None:  # what these are called with has to be put together
        found |= {"on_step": problem.on_step is not None, "on_step_back": problem.on_step_back is not None}
    return found


def _of(t: Tensor) -> list[Any]:
    return [list(t.shape), str(t.dtype), t.requires_grad, str(fingerprint_of(t))]
