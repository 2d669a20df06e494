"""Every way to a hypergradient that the benchmarks compare: ours, plain autograd, its checkpointed forms, and public
libraries.

Each is a function (task, steps) -> (dL/dx [s, B, ...], dL/drates [T] or None where the library has no rate per step).
The loops written here are what a user would write by hand: dicts of tensors, momentum as in torch.optim.SGD.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from tasks import MOMENTUM, Task
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revdistill as rd

Gradients = tuple[Tensor, Tensor | None]
State = dict[str, Tensor]  # parameters by name, and their velocities as "v:" + name


@dataclass(frozen=True)
class Method:
    """run: the hypergradient; needs: a package it cannot do without; compiles: whether a first call takes long."""

    title: str
    run: Callable[[Task, int], Gradients]
    needs: str | None = None
    compiles: bool = False

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed (python -m pip install -e '.[bench]')"
        return None


def ours(adjoint: rd.Adjoint, *, compile: bool | Literal["graphs"] = False) -> Callable[[Task, int], Gradients]:
    """`rd.unroll` with an adjoint."""

    def run(task: Task, steps: int) -> Gradients:
        rates = task.rates(steps)
        theta = rd.unroll(
            task.loss, task.params, task.batches, task.optimizer(rates), steps=steps, adjoint=adjoint, compile=compile
        )
        x, lr = torch.autograd.grad(task.outer(theta), [task.batches[0], rates])
        return x, lr

    return run


def start(task: Task) -> State:
    """The state before the first step."""
    state = {name: p.detach().requires_grad_() for name, p in task.params.items()}
    return state | {f"v:{name}": torch.zeros_like(p) for name, p in task.params.items()}


def outer_loss(task: Task, state: State) -> Tensor:
    """The outer loss of a state's parameters."""
    return task.outer({name: state[name] for name in task.params})


def sgd_step(
    task: Task, state: State, batch: tuple[Tensor, Tensor], rate: Tensor, *, differentiable: bool = True
) -> State:
    """One step of SGD with momentum; differentiable through everything."""
    params = {name: state[name] for name in task.params}
    if not differentiable:
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
    with torch.enable_grad():
        value = task.loss(params, batch)
        gradients = torch.autograd.grad(value, list(params.values()), create_graph=differentiable)
    after: State = {}
    for (name, p), g in zip(params.items(), gradients, strict=True):
        after[f"v:{name}"] = MOMENTUM * state[f"v:{name}"] + g
        after[name] = p - rate * after[f"v:{name}"]
    return after if differentiable else {name: t.detach() for name, t in after.items()}


def rows_of(task: Task, rates: Tensor) -> tuple[Callable[[int], tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
    """(k -> batch, rate of each step): unbound once, so that autograd stacks the gradients once."""
    (x, y), each = task.batches, rates.to(task.batches[0].dtype).unbind(0)
    xs = x.unbind(0)
    return lambda k: (xs[k % len(xs)], y[k % len(xs)]), each


def autograd(task: Task, steps: int) -> Gradients:
    """Plain autograd: the graph of every step is kept."""
    rates = task.rates(steps)
    batch, rate = rows_of(task, rates)
    state = start(task)
    for k in range(steps):
        state = sgd_step(task, state, batch(k), rate[k])
    x, lr = torch.autograd.grad(outer_loss(task, state), [task.batches[0], rates])
    return x, lr


@functools.cache
def compiled_step(loss: Callable[..., Tensor]) -> Callable[..., tuple[State, State]]:
    """torch.compile of one whole step of SGD with momentum. The gradient is torch.func's: torch.compile refuses to go
    back twice through what autograd took within it.
    """
    gradient = torch.func.grad(loss)

    def step(params: State, v: State, batch: tuple[Tensor, Tensor], rate: Tensor) -> tuple[State, State]:
        g = gradient(params, batch)
        v = {name: MOMENTUM * v[name] + g[name] for name in params}
        return {name: p - rate * v[name] for name, p in params.items()}, v

    return torch.compile(step)


def autograd_compiled(task: Task, steps: int) -> Gradients:
    """Plain autograd through steps that torch.compile has fused: the graph of every step is kept."""
    rates = task.rates(steps)
    batch, rate = rows_of(task, rates)
    params = {name: p.detach().requires_grad_() for name, p in task.params.items()}
    v = {name: torch.zeros_like(p).requires_grad_() for name, p in params.items()}  # or step 0 is compiled apart
    step = compiled_step(task.loss)
    for k in range(steps):
        params, v = step(params, v, batch(k), rate[k])
    x, lr = torch.autograd.grad(task.outer(params), [task.batches[0], rates])
    return x, lr


def torch_checkpoint(every: Callable[[int], int]) -> Callable[[Task, int], Gradients]:
    """torch.utils.checkpoint (non-reentrant) around each segment of `every(T)` steps."""

    def run(task: Task, steps: int) -> Gradients:
        rates = task.rates(steps)
        batch, rate = rows_of(task, rates)
        names, tensors = zip(*start(task).items(), strict=True)

        def segment(first: int, last: int, *tensors: Tensor) -> tuple[Tensor, ...]:
            state = dict(zip(names, tensors, strict=True))
            for k in range(first, last):
                state = sgd_step(task, state, batch(k), rate[k])
            return tuple(state[name] for name in names)

        size = every(steps)
        for first in range(0, steps, size):
            last = min(first + size, steps)
            tensors = checkpoint(segment, first, last, *tensors, use_reentrant=False, preserve_rng_state=False)
        x, lr = torch.autograd.grad(outer_loss(task, dict(zip(names, tensors, strict=True))), [task.batches[0], rates])
        return x, lr

    return run


def replay_tree(arity: int) -> Callable[[Task, int], Gradients]:
    """A lazy k-ary tree of re-runs, as in REPLAY (Engstrom et al. 2025): k log_k T states, each step run log_k T times
    more.
    """

    def run(task: Task, steps: int) -> Gradients:
        rates = task.rates(steps)
        rate = rates.detach().to(task.batches[0].dtype)
        x, y = task.batches
        x_bar, rates_bar = torch.zeros_like(x), torch.zeros_like(rates)

        def batch(k: int) -> tuple[Tensor, Tensor]:
            return x.detach()[k % len(x)], y[k % len(x)]

        def forward(state: State, first: int, last: int) -> State:
            for k in range(first, last):
                state = sgd_step(task, state, batch(k), rate[k], differentiable=False)
            return state

        def backward(state: State, first: int, last: int, bar: State) -> State:
            if last - first == 1:
                return one_step_back(state, first, bar)
            width = -(-(last - first) // arity)
            cuts = [*range(first, last, width), last]
            starts = [state]
            for a, b in pairwise(cuts[:-1]):
                starts.append(forward(starts[-1], a, b))
            for a, b in reversed(list(pairwise(cuts))):
                bar = backward(starts.pop(), a, b, bar)
            return bar

        def one_step_back(state: State, k: int, bar: State) -> State:
            leaves = {name: t.detach().requires_grad_() for name, t in state.items()}
            row, labels = batch(k)
            row, r = row.requires_grad_(), rate[k].detach().requires_grad_()
            after = sgd_step(task, leaves, (row, labels), r)
            names = list(leaves)
            inputs = [*(leaves[name] for name in names), row, r]
            found = torch.autograd.grad([after[name] for name in names], inputs, [bar[name] for name in names])
            x_bar[k % len(x)] += found[-2]
            rates_bar[k] += found[-1]
            return dict(zip(names, found, strict=False))

        begin = {name: t.detach() for name, t in start(task).items()}
        end = {name: t.detach().requires_grad_() for name, t in forward(begin, 0, steps).items()}
        names = list(task.params)
        outer = torch.autograd.grad(outer_loss(task, end), [end[name] for name in names])
        bar = {name: torch.zeros_like(t) for name, t in end.items()} | dict(zip(names, outer, strict=True))
        backward(begin, 0, steps, bar)
        return x_bar, rates_bar

    return run


class LossModule(nn.Module):
    """A task's loss as a module, for libraries that take modules."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task = task
        self._names = {name: name.replace(".", "_") for name in task.params}
        for name, p in task.params.items():
            self.register_parameter(self._names[name], nn.Parameter(p.detach().clone()))

    def theta(self) -> dict[str, Tensor]:
        """The parameters under the task's names."""
        return {name: getattr(self, plain) for name, plain in self._names.items()}

    def forward(self, batch: tuple[Tensor, Tensor] | None) -> Tensor:
        """The training loss, or without a batch the outer loss."""
        return self._task.outer(self.theta()) if batch is None else self._task.loss(self.theta(), batch)


def higher_library(task: Task, steps: int) -> Gradients:
    """facebookresearch/higher 0.2.1."""
    import higher

    rates = task.rates(steps)
    batch, rate = rows_of(task, rates)
    net: Any = LossModule(task)
    optimizer = torch.optim.SGD(net.parameters(), lr=task.rate, momentum=MOMENTUM)
    with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (model, diffopt):
        for k in range(steps):
            diffopt.step(model(batch(k)), override={"lr": [rate[k]]})
        x, lr = torch.autograd.grad(model(None), [task.batches[0], rates])
    return x, lr


def torchopt_library(task: Task, steps: int) -> Gradients:
    """metaopt/torchopt's MetaSGD; its rate is one number, so only the data's gradient is found."""
    import torchopt

    net = LossModule(task)
    optimizer = torchopt.MetaSGD(net, lr=task.rate, momentum=MOMENTUM)
    batch, _ = rows_of(task, task.rates(steps))
    for k in range(steps):
        optimizer.step(net(batch(k)))
    (x,) = torch.autograd.grad(net(None), [task.batches[0]])
    return x, None


def plain_training(task: Task, steps: int) -> Gradients:
    """torch.optim.SGD, no hypergradient: what a training run costs."""
    params = {name: p.detach().clone().requires_grad_() for name, p in task.params.items()}
    optimizer = torch.optim.SGD(params.values(), lr=task.rate, momentum=MOMENTUM)
    x, y = task.batches[0].detach(), task.batches[1]
    for k in range(steps):
        optimizer.zero_grad()
        task.loss(params, (x[k % len(x)], y[k % len(x)])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return x[:0], None


GRAPHS = 2**30  # bytes: room for the graphs of every task's 100 steps but the ConvNet's
METHODS = {
    "training": Method("torch.optim.SGD (training only)", plain_training),
    "autograd": Method("plain autograd", autograd),
    "autograd-compiled": Method("plain autograd, torch.compile'd steps", autograd_compiled, compiles=True),
    "reversible": Method("Reversible, no graphs", ours(rd.Reversible(graph_bytes=0))),
    "reversible-default": Method("Reversible", ours(rd.Reversible())),
    "reversible-graphs": Method("Reversible, 1 GiB of graphs", ours(rd.Reversible(graph_bytes=GRAPHS))),
    "reversible-replayed": Method("Reversible, replayed", ours(rd.Reversible(), compile="graphs")),
    "reversible-compiled": Method("Reversible, compiled", ours(rd.Reversible(), compile=True), compiles=True),
    "storeall": Method("StoreAll", ours(rd.StoreAll())),
    "storeall-compiled": Method("StoreAll, compiled", ours(rd.StoreAll(), compile=True), compiles=True),
    "checkpoint": Method("Checkpoint", ours(rd.Checkpoint())),
    "backprop": Method("Backprop (autograd, flat buffer)", ours(rd.Backprop())),
    "torch-checkpoint-1": Method("torch checkpoint, each step", torch_checkpoint(lambda _: 1)),
    "torch-checkpoint-sqrt": Method(
        "torch checkpoint, sqrt(T) steps", torch_checkpoint(lambda t: max(1, round(t**0.5)))
    ),
    "replay": Method("4-ary re-run tree (REPLAY)", replay_tree(4)),
    "higher": Method("higher", higher_library, needs="higher"),
    "torchopt": Method("TorchOpt", torchopt_library, needs="torchopt"),
}


BETAS, EPS = (0.9, 0.999), 1e-8


def our_adam(adjoint: rd.Adjoint) -> Callable[[Task, int], Gradients]:
    """`rd.unroll` with Adam; rates a tenth of SGD's."""

    def run(task: Task, steps: int) -> Gradients:
        rates = task.rates(steps)
        optimizer = rd.Adam(rates / 10, BETAS, EPS)
        theta = rd.unroll(task.loss, task.params, task.batches, optimizer, steps=steps, adjoint=adjoint)
        x, lr = torch.autograd.grad(task.outer(theta), [task.batches[0], rates])
        return x, lr

    return run


def adam_by_autograd(task: Task, steps: int) -> Gradients:
    """Plain autograd through Adam as torch.optim writes it; a root of 0 has derivative 0, or all would be NaN."""
    rates = task.rates(steps)
    batch, rate = rows_of(task, rates / 10)
    params = {name: p.detach().requires_grad_() for name, p in task.params.items()}
    first, second = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for k in range(steps):
        gradients = torch.autograd.grad(task.loss(params, batch(k)), list(params.values()), create_graph=True)
        c1, c2 = (1 - beta ** (k + 1) for beta in BETAS)
        for (name, p), g in zip(list(params.items()), gradients, strict=True):
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * g
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * g.square()
            positive = second[name] > 0
            root = torch.where(positive, torch.where(positive, second[name], 1.0).sqrt(), 0.0)
            params[name] = p - rate[k] / c1 * first[name] / (root / c2**0.5 + EPS)
    x, lr = torch.autograd.grad(task.outer(params), [task.batches[0], rates])
    return x, lr


ADAM_METHODS = {
    "adam-autograd": Method("plain autograd", adam_by_autograd),
    "adam-reversible": Method("Reversible, no graphs", our_adam(rd.Reversible(graph_bytes=0))),
    "adam-reversible-default": Method("Reversible", our_adam(rd.Reversible())),
    "adam-reversible-graphs": Method("Reversible, 1 GiB of graphs", our_adam(rd.Reversible(graph_bytes=GRAPHS))),
    "adam-storeall": Method("StoreAll", our_adam(rd.StoreAll())),
    "adam-checkpoint": Method("Checkpoint", our_adam(rd.Checkpoint())),
}
