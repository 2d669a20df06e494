"""rd.jacobian: the derivatives of many outputs of one unroll, by one way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from revdistill.engine.adjoints.fixed_point import USED_UP, Unrolled
from revdistill.engine.cotangents import CHUNK_SIZE, Batching
from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.graph import graph_nodes
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
        Of each input its derivatives [K, *shape], in the form of `inputs`. Cost: about three times K x parameters x 4
        bytes (float32; 8 in float64) on top of what one way back takes.

    Raises:
        TypeError, ValueError: an argument will not do; the message names it.
        UnsupportedError: the unroll was gone back through before; `Backprop` with clip_back or on_step_back.
        ReversalError, NonFiniteError: see `rd.unroll`.
    """
    tensors = _checked(outputs, inputs, chunk_size)
    found: list[Tensor] = [t.new_zeros(0, *t.shape) for t in tensors]
    if len(outputs):
        found = _rows(outputs, tensors, chunk_size)
    if isinstance(inputs, Tensor):
        return found[0]
    return dict(zip(inputs, found, strict=True)) if isinstance(inputs, Mapping) else tuple(found)


def _rows(outputs: Tensor, inputs: Sequence[Tensor], chunk_size: int) -> list[Tensor]:
    unrolls = [node for node in graph_nodes(outputs) if isinstance(getattr(node, "unrolled", None), Unrolled)]
    if any(node.unrolled.recording is None for node in unrolls):
        raise UnsupportedError(USED_UP)
    direct, bars = _up_to_the_unrolls(outputs, inputs, unrolls, chunk_size)
    reached = [(node, found) for node, found in zip(unrolls, bars, strict=True) if found is not None]
    through: Sequence[Tensor | None] = [None] * len(inputs)
    if reached:
        for node in unrolls:
            node.unrolled.chunk_size = chunk_size
        through = _through_the_unrolls(reached, inputs)
    found = []
    for i, (t, a, b) in enumerate(zip(inputs, direct, through, strict=True)):
        if a is None and b is None:
            raise ValueError(
                f"no output depends on inputs[{i}], of shape {list(t.shape)}; give tensors that went into the unroll "
                "themselves, not copies or views of them made later"
            )
        found.append(b if a is None else a if b is None else a + b)
    return found  # type: ignore[return-value]


def _up_to_the_unrolls(
    outputs: Tensor, inputs: Sequence[Tensor], unrolls: Sequence[Any], chunk_size: int
) -> tuple[list[Tensor | None], list[tuple[Tensor, ...] | None]]:
    """What does not go through any unroll: dL/d(inputs) [K, ...]; and dL/d(each unroll's results) [K, ...]."""
    lengths: list[int] = []

    def product(vector: Tensor) -> list[Tensor | None]:
        for node in unrolls:
            node.unrolled.captured = []
        try:
            found = list(torch.autograd.grad(outputs, inputs, vector, allow_unused=True, retain_graph=True))
            captured = [node.unrolled.captured for node in unrolls]
        finally:
            for node in unrolls:
                node.unrolled.captured = None
        lengths[:] = [len(bars[0]) if bars else 0 for bars in captured]
        return found + [bar for bars in captured for bar in (bars[0] if bars else ())]

    identity = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
    chunks = [found for _, found in Batching(chunk_size)(product, identity)]
    columns = [None if column[0] is None else torch.cat(column) for column in zip(*chunks, strict=True)]
    direct, rest = columns[: len(inputs)], iter(columns[len(inputs) :])
    bars = [tuple(next(rest) for _ in range(length)) or None for length in lengths]
    return direct, bars  # type: ignore[return-value]


def _through_the_unrolls(
    reached: Sequence[tuple[Any, tuple[Tensor, ...]]], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """From dL/d(the unrolls' results) to dL/d(inputs), [K, ...]."""
    edges = [GradientEdge(node, i) for node, bars in reached for i in range(len(bars))]
    present: list[bool] = []

    def back(*bars: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(edges, inputs, bars, allow_unused=True, retain_graph=True)
        present[:] = [t is not None for t in found]
        return tuple(t for t in found if t is not None) or (bars[0],)

    values = iter(torch.func.vmap(back)(*(bar for _, bars in reached for bar in bars)))
    return [next(values) if there else None for there in present]


def _checked(outputs: Any, inputs: Any, chunk_size: Any) -> list[Tensor]:
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
    return list(named.values())
