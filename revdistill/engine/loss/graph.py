"""Looking into an autograd graph: its nodes, what they hold, and whether they have second derivatives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

LEAF = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]  # the node of every leaf


def graph_nodes(value: Tensor, until: Iterable[Tensor] = ()) -> list[Any]:
    """Every node of the autograd graph behind `value`.

    Args:
        value: any tensor; without a graph there are no nodes.
        until: tensors whose own graphs are no part of it.

    Returns:
        The nodes, each once, from the value on.
    """
    if value.grad_fn is None:
        return []
    found: list[Any] = [value.grad_fn]
    seen = {*found, *(t.grad_fn for t in until)}
    for node in found:  # which grows meanwhile
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                found.append(parent)
    return found


def saved_tensors(value: Tensor) -> Iterator[Tensor]:
    """Every tensor that the autograd graph behind `value` holds for its backward, but for those behind hooks.

    To look at what activation checkpointing left out of the graph would be to compute it again.

    Args:
        value: any tensor.

    Returns:
        The tensors, one after another; one that several nodes hold comes several times.
    """
    for node in graph_nodes(value):
        names = [name for name in dir(node) if name.startswith("_saved_") and not _behind_hooks(node, f"_raw{name}")]
        held = [getattr(node, name) for name in names]
        if not _behind_hooks(node, "_raw_saved_tensors"):
            held += getattr(node, "saved_tensors", ())
        for entry in held:
            yield from (t for t in _entries(entry) if isinstance(t, Tensor))


def memory_of(t: Tensor) -> tuple[int, int]:
    """The memory that a tensor lies in.

    Args:
        t: any tensor; those of torch.func and sparse ones have no memory that could be asked for.

    Returns:
        What tells it from other memory, and its size in bytes.
    """
    try:
        storage = t.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):
        return id(t), t.numel() * t.element_size() if t.layout == torch.strided else _sparse_bytes(t)


def _sparse_bytes(t: Tensor) -> int:
    if t.layout == torch.sparse_coo:
        return t._indices().nbytes + t._values().nbytes
    rows = t.layout in (torch.sparse_csr, torch.sparse_bsr)
    indices = (t.crow_indices(), t.col_indices()) if rows else (t.ccol_indices(), t.row_indices())
    return sum(part.nbytes for part in (*indices, t.values()))


def _behind_hooks(node: Any, name: str) -> bool:
    return any(getattr(saved, "unpack_hook", None) is not None for saved in _entries(getattr(node, name, None)))


def _entries(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def is_once_differentiable(node: Any) -> bool:
    """Whether torch.autograd.function.once_differentiable wraps the backward of a custom Function.

    Such a backward drops what its result depends on through saved tensors: a second derivative would be 0, and nothing
    would say so.

    Args:
        node: of an autograd graph.

    Returns:
        True for such a Function, False for every other node.
    """
    function = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(function, "__code__", None) is _ONCE_DIFFERENTIABLE


_ONCE_DIFFERENTIABLE = torch.autograd.function.once_differentiable(lambda ctx: None).__code__
