"""Can the loss's gradient, and its product with a vector, be captured in a CUDA graph, and what would that save?

    python -m gpu.capture

Static inputs, a warm-up on a side stream, then a capture; are replays with new numbers in those inputs bit-equal to
eager?
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from tasks import KINDS, Task, make
from torch import Tensor

from gpu.lines import attempt, in_words, options_of, write
from gpu.place import here, milliseconds
from revdistill.engine.loss.determinism import repeatable

TASKS = ("mlp", "convnet")
WARM_UP, REPEATS = 3, 30

Outputs = tuple[Tensor, ...]


class Static:
    """The tensors that a captured function reads, and the functions: what a step forward and a step back evaluate."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.names = list(task.params)
        self.theta = [p.detach().clone().requires_grad_() for p in task.params.values()]
        self.x = task.batches[0][0].detach().clone().requires_grad_()
        self.y = task.batches[1][0].clone()
        self.vector = [torch.randn_like(p) for p in self.theta]

    def gradient(self) -> Outputs:
        """With a graph, as the engine always takes it."""
        value = self.task.loss(dict(zip(self.names, self.theta, strict=True)), (self.x, self.y))
        return torch.autograd.grad(value, self.theta, create_graph=True)

    def product(self) -> Outputs:
        """The gradient, and its product's with respect to theta and the data."""
        found = self.gradient()
        return tuple(torch.autograd.grad(found, [*self.theta, self.x], self.vector))

    def renew(self, seed: int) -> None:
        """Other numbers in the same memory."""
        draw = torch.Generator(device=self.x.device).manual_seed(seed)
        with torch.no_grad():
            for t in (*self.theta, self.x, *self.vector):
                t.copy_(0.1 * torch.randn(t.shape, generator=draw, device=t.device))


def captured(function: Callable[[], Outputs]) -> tuple[Any, Outputs]:
    """(graph, the memory that its replays fill)"""
    cuda: Any = torch.cuda
    side = cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filled = tuple(t.detach() for t in function())
    return graph, filled


def measure(name: str, what: str, device: torch.device) -> None:
    """One line."""
    static = Static(make(name, device=str(device)))
    function: Callable[[], Outputs] = getattr(static, what)
    with repeatable(device):
        eager = median(milliseconds(function, device) for _ in range(REPEATS))
        told = {"task": name, "title": KINDS[name].title, "what": what, "eager_ms": eager}
        try:
            graph, filled = captured(function)
        except RuntimeError as error:
            write("capture", **told, captured=False, reason=in_words(error))
            return
        same = True
        for seed in range(3):
            static.renew(seed)
            graph.replay()
            found = [t.clone() for t in filled]
            same = same and all(map(torch.equal, found, [t.detach() for t in function()]))
        replay = median(milliseconds(graph.replay, device) for _ in range(REPEATS))
    write("capture", **told, captured=True, bit_equal=same, replay_ms=replay)


def main() -> None:
    """The command."""
    options = options_of(__doc__).parse_args()
    if options.device != "cuda":
        write("capture", skipped="only CUDA has graphs to capture")
        return
    with here(options.device) as device:
        for name in TASKS[:1] if options.quick else TASKS:
            for what in ("gradient", "product"):
                with attempt("capture", task=name, what=what):
                    measure(name, what, device)


if __name__ == "__main__":
    main()
