"""Several trainings of one start as one unroll, and how many of them are best made at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from revdistill.attribute.arguments import Tensors
from revdistill.attribute.run import Params, Run
from revdistill.engine import SGD, unroll
from revdistill.engine.layout import stacked
from revdistill.engine.loss.randomness import seeded

MOST = 64
NUMBERS = 2**21  # parameters of all on a CPU: beyond, caches are left, and malloc gives memory back at each step
BYTES = 2**30  # for the states and activations of all
_STATE = 128  # bytes per parameter: integers, gradient and temporary tensors of Adam's step; SGD's needs half of it
_GRAPHS = 4  # what a gradient with a graph holds, in activations of the loss alone
_SAME = {torch.float32: 1e-3, torch.float64: 1e-8}  # relative; rounding is far below, other random numbers far above


class Stack:
    """E trainings side by side: the same start, order and random numbers, other weights.

    Args:
        run: the training.
        count: E.
    """

    def __init__(self, run: Run, count: int) -> None:
        self._run, self._count = run, count

    def loss(self) -> Callable[[Params, Tensors], Tensor]:
        """The sum of the trainings' losses, from parameters [E, ...], weights [B, E] and the step's examples."""

        def loss(params: Params, batch: Tensors) -> Tensor:
            weights, *examples = batch

            def one(params: Params, weights: Tensor) -> Tensor:
                return self._run.weighted(params, (weights, *examples))

            summed: Tensor = torch.func.vmap(one, in_dims=(0, 1), randomness="same")(params, weights).sum()
            return summed

        loss.networks = self._count  # type: ignore[attr-defined]  # rd.unroll clips each by its own norm
        return loss

    def train(self, weights: Tensor, *, progress: bool = False) -> Params:
        """theta_T [E, ...]. weights: [E, n]."""
        run = self._run
        return unroll(
            self.loss(),
            {name: stacked([p] * self._count) for name, p in run.params.items()},
            run.batches(weights.T.contiguous()),
            run.optimizer,
            steps=run.steps,
            adjoint=run.adjoint,
            seed=run.seed,
            progress=progress,
        )


def how_many(run: Run) -> int:
    """How many trainings are best made at once: of two runs that are alike, the same."""
    if run.side_by_side is None:
        run.side_by_side = _how_many(run)
    return run.side_by_side


def _how_many(run: Run) -> int:
    row = run.order[0]
    chosen = row[row >= 0].to(run.device)
    batch = tuple(t[chosen] for t in run.data)
    params = {name: p.detach().requires_grad_() for name, p in run.params.items()}
    saved: dict[int, Tensor] = {}
    saving = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t)
    with torch.enable_grad(), seeded(run.seed, run.device), _Convolutions() as convolutions, saving:
        run.loss(params, batch)
    # As `NetworkStack.parts` has it: on a CPU the grouped convolutions of a stack take longer.
    if convolutions.found and run.device.type == "cpu":
        return 1
    size = sum(p.numel() for p in run.params.values())
    graph = sum(t.nbytes for t in saved.values())
    most = min(MOST, NUMBERS // size) if run.device.type == "cpu" else MOST
    count = max(1, min(most, BYTES // (size * _STATE + graph * _GRAPHS)))
    if count > 1:
        reason = _why_not(run)
        if reason:
            warnings.warn(
                f"torch.func.vmap cannot evaluate this loss for several trainings at once ({reason}), so they are made "
                "one after another, which takes longer",
                stacklevel=5,
            )
            return 1
    return count


def _why_not(run: Run) -> str:
    """What keeps two trainings from being made at once; empty where nothing does. Tried at the first step."""
    found: list[Tensor] = []
    weights = torch.ones(run.examples, 2, dtype=run.dtype, device=run.device)
    start = {name: stacked([p, p]) for name, p in run.params.items()}
    try:
        for loss, params, each in ((run.weighted, run.params, weights[:, 0]), (Stack(run, 2).loss(), start, weights)):
            unroll(
                loss,
                params,
                run.batches(each),
                SGD(1.0, 0.0),
                steps=1,
                seed=run.seed,
                on_step=lambda k, theta, value: found.append(value.clone()),
            )
    except Exception as error:  # whatever a user's loss raises under vmap; alone it did not
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    alone, both = found
    close = torch.allclose(both / 2, alone, rtol=_SAME[run.dtype])
    return "" if close else "it gives other losses there, as of other random numbers"


class _Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whether what is evaluated inside convolves."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to skip it is to import it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))
