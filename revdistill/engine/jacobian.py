"""rd.jacobian: the derivatives of many outputs of one unroll, by one way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from revdistill.engine.adjoints.fixed_point import USED_UP, Unrolled
from revdistill.engine.cotangents import CHUNK_SIZE, Batching, Identity, Rows
from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.graph import nodes_from
from revdistill.engine.scalars import is_integer

Key = TypeVar("Key")


@overload
def jacobian(outputs: Tensor, inputs: Tensor, *, chunk_size: int = ...) -> Tensor: ...
@overload
def jacobian(outputs: Tensor, inputs: Mapping[Key, Tensor], *, chunk_size: int = ...) -> dict[Key, Tensor]: ...
@overload
def jacobian(outputs: Tensor, inputs: Sequence[Tensor], *, chunk_size: int = ...) -> tuple[Tensor, ...]: ...


def jacobian(outputs: Tensor, inputs: Any, *, chunk_size: int = CHUNK_SIZE) -> Any:
    """The derivatives of each of many outputs that were computed from the result of an unroll.

    The trajectory is walked back once for all of them, and the loss's gradient evaluated once at each step; what is
    carried is K vectors dL/dtheta, and at each step they are multiplied with the second derivatives `chunk_size` at a
    time. It uses the unroll up, as one backward does.

    `torch.func.vmap(lambda v: torch.autograd.grad(outputs, inputs, v))(torch.eye(K))` does the same, without chunks of
    what comes between the unroll and the outputs.

    Args:
        outputs: [K], as stacked losses of K test examples, or of `save_at` steps; with a graph to the inputs.
        inputs: a tensor, or a tuple, list or dict of tensors: any that went into the unroll (params, batches, hyper,
            the optimizer's) or into the outputs. They must require grad.
        chunk_size: how many products of second derivatives are evaluated at once: more take more memory, K x a step's
            activations, and from some 64 on no less time. Where torch has no batching rule for an operator, a warning
            says so and they are evaluated one by one.

    Returns:
        Of each input its derivatives [K, *shape], in the form of `inputs`. Cost: six to nine times K x parameters x 4
        bytes (float32; 8 in float64) on top of what one way back takes; and the result.

    Raises:
        TypeError, ValueError: an argument will not do; the message names it.
        UnsupportedError: the unroll was gone back through before; `Backprop` with clip_back or on_step_back; inside
            torch.inference_mode() or a transform of torch.func.
        ReversalError, NonFiniteError: see `rd.unroll`.
    """
    named = _checked(outputs, inputs, chunk_size)
    found = [t.new_zeros(0, *t.shape) for t in named.values()]
    if len(outputs):
        found = _rows(_Graph(outputs, named), outputs, chunk_size)
    if isinstance(inputs, Tensor):
        return found[0]
    return dict(zip(inputs, found, strict=True)) if isinstance(inputs, Mapping) else tuple(found)


class _Graph:
    """What lies between outputs and inputs.

    Attributes:
        inputs: the edges at which the inputs' derivatives arrive.
        unrolls: the nodes of the unrolls that these went into, each before those whose results went into it.

    Raises:
        ValueError: an input is not in it.
        UnsupportedError: the way back of an unroll that is needed is used up.
    """

    def __init__(self, outputs: Tensor, inputs: Mapping[str, Tensor]) -> None:
        self.inputs = {label: get_gradient_edge(t) for label, t in inputs.items()}
        every = nodes_from(get_gradient_edge(outputs).node)
        absent = {edge.node for edge in self.inputs.values()}.difference(every)
        for label, edge in self.inputs.items():
            if edge.node in absent:
                raise ValueError(
                    f"no output depends on {label}, of shape {list(inputs[label].shape)}; give tensors that went into "
                    "the unroll themselves, not copies or views of them made later"
                )
        ends = {edge.node for edge in self.inputs.values()}
        behind = {
            node: set(nodes_from(node)) for node in every if isinstance(getattr(node, "unrolled", None), Unrolled)
        }
        behind = {node: nodes for node, nodes in behind.items() if not ends.isdisjoint(nodes)}
        self.unrolls = sorted(behind, key=lambda node: sum(node in nodes for nodes in behind.values()))
        if any(node.unrolled.recording is None for node in self.unrolls):
            raise UnsupportedError(USED_UP)

    def gradients(
        self, start: Sequence[GradientEdge], batching: Batching, *vectors: Rows
    ) -> Iterator[tuple[GradientEdge, Tensor]]:
        """From dL/d(what is at some edges) to dL/d(the inputs, and the results of unrolls), where no unroll is between.

        What is behind an unroll is not asked for: the hooks there would be called with what is no gradient.

        Args:
            start: where to start.
            batching: how it is evaluated.
            vectors: of each edge, [K, *shape].

        Returns:
            Pairs of an edge and what arrives there, [K, *shape].
        """
        reached = {node for edge in start for node in nodes_from(edge.node, walls=self.unrolls)}
        targets = {edge: None for edge in self.inputs.values() if edge.node in reached}
        for node in self.unrolls:
            if node in reached:
                targets |= {GradientEdge(node, i): None for i in range(node.unrolled.results)}
        if not targets:
            return

        def product(*bars: Tensor) -> Sequence[Tensor | None]:
            return torch.autograd.grad(start, list(targets), bars, allow_unused=True, retain_graph=True)

        count = len(vectors[0])
        chunks = (
            (rows, self._taken(targets, batching(product, *(v[rows] for v in vectors))))
            for rows in batching.chunks(count)
        )
        columns = _together(chunks, count)
        yield from ((edge, t) for edge, t in zip(targets, columns, strict=True) if t is not None)

    def _taken(self, targets: Iterable[GradientEdge], found: list[Tensor | None]) -> list[Tensor | None]:
        """Some rows of what arrived at the results of unrolls, as their ways back take it: a part where ranks keep
        parts, so that no more than these rows are whole at once.
        """
        asked, taken = set(self.inputs.values()), list(found)
        for i, (edge, t) in enumerate(zip(targets, found, strict=True)):
            unrolled: Unrolled | None = getattr(edge.node, "unrolled", None) if edge.node in self.unrolls else None
            if unrolled is not None and t is not None:
                taken[i] = unrolled.taken([t], cut=edge not in asked)[0]
        return taken


def _rows(graph: _Graph, outputs: Tensor, chunk_size: int) -> list[Tensor]:
    count, sums = len(outputs), dict[GradientEdge, Tensor]()

    def add(found: Iterable[tuple[GradientEdge, Tensor]]) -> None:
        for edge, t in found:
            sums[edge] = sums[edge] + t if edge in sums else t

    for node in graph.unrolls:
        node.unrolled.held = True
    try:
        add(graph.gradients([get_gradient_edge(outputs)], Batching(chunk_size), Identity(outputs)))
        for node in graph.unrolls:
            bars = [sums.pop(GradientEdge(node, i), None) for i in range(node.unrolled.results)]
            if any(bar is not None for bar in bars):
                node.unrolled.chunk_size = chunk_size
                further = node.unrolled.rows_back(bars, count)
                del bars
                ways = [(e, t) for e, t in zip(node.next_functions, further, strict=True) if e[0] and t is not None]
                # All at once: what went in as it is, is found as it is, and not copied chunk by chunk.
                add(graph.gradients([GradientEdge(*e) for e, _ in ways], Batching(count), *(t for _, t in ways)))
    finally:
        for node in graph.unrolls:
            node.unrolled.held = False
    for label, edge in graph.inputs.items():
        if edge not in sums:
            raise ValueError(
                f"no output depends on {label}: what it went into does not influence them, or lies before the window "
                "of the unroll; leave it out"
            )
    return [sums[edge] for edge in graph.inputs.values()]


def _together(chunks: Iterable[tuple[slice, list[Tensor | None]]], count: int) -> list[Tensor | None]:
    """Of each column all rows; None where no chunk has it."""
    columns: list[Tensor | None] = []
    for rows, found in chunks:
        if rows == slice(0, count):
            return found
        columns = columns or [None] * len(found)
        for i, t in enumerate(found):
            if t is not None:
                column = columns[i]
                column = columns[i] = t.new_zeros(count, *t.shape[1:]) if column is None else column
                column[rows] = t
    return columns


def _checked(outputs: Any, inputs: Any, chunk_size: Any) -> dict[str, Tensor]:
    """The inputs by what they are called."""
    if torch.is_inference_mode_enabled():
        raise UnsupportedError("rd.jacobian cannot run in torch.inference_mode(); use torch.no_grad()")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            "rd.jacobian cannot run inside torch.func.grad, jacrev, jvp or vmap: it walks the unroll back itself; call "
            "it outside, on outputs that were computed outside"
        )
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"outputs must be a tensor [K], got {type(outputs).__name__}; torch.stack the losses, or let the loss be "
            "one of each example (reduction='none')"
        )
    if outputs.ndim != 1 or not outputs.is_floating_point():
        raise ValueError(
            f"outputs must be a floating-point tensor [K], got shape {list(outputs.shape)}, {outputs.dtype}; of one "
            "output call backward(), of several dimensions give outputs.flatten()"
        )
    if not is_integer(chunk_size):
        raise TypeError(f"chunk_size must be an int, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if isinstance(inputs, Tensor):
        named = {"inputs": inputs}
    elif isinstance(inputs, Mapping):
        named = {f"inputs[{key!r}]": t for key, t in inputs.items()}
    elif isinstance(inputs, (tuple, list)):
        named = {f"inputs[{i}]": t for i, t in enumerate(inputs)}
    else:
        raise TypeError(f"inputs must be a tensor, or a tuple, list or dict of them, got {type(inputs).__name__}")
    if not named:
        raise ValueError("inputs is empty; it must hold at least one tensor")
    for label, t in named.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{label} must be a tensor, got {type(t).__name__}")
        if not t.requires_grad:
            raise ValueError(f"{label} does not require grad; call requires_grad_() on it before rd.unroll")
    if not outputs.requires_grad:
        raise ValueError(
            "outputs does not require grad: it was computed under torch.no_grad(), or from nothing that requires grad"
        )
    return named
