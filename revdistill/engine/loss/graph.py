"""Looking into an autograd graph: its nodes, what they hold, and whether they have second derivatives."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
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
    return [] if value.grad_fn is None else nodes_from(value.grad_fn, until)


def nodes_from(node: Any, until: Iterable[Tensor] = (), walls: Collection[Any] = ()) -> list[Any]:
    """As `graph_nodes`, from one node on. walls: nodes behind which it does not go on."""
    found: list[Any] = [node]
    seen = {*found, *(t.grad_fn for t in until)}
    for node in found:  # which grows meanwhile
        if node in walls:
            continue
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                found.append(parent)
    return found


def saved_tensors(value: Tensor, until: Iterable[Tensor] = ()) -> Iterator[Tensor]:
    """Every tensor that the autograd graph behind `value` holds for its backward, but for those behind hooks.

    To look at what activation checkpointing left out of the graph would be to compute it again.

    Args:
        value: any tensor.
        until: tensors whose own graphs are no part of it.

    Returns:
        The tensors, one after another; one that several nodes hold comes several times.
    """
    for node in graph_nodes(value, until):
        for name, raw in _names_of_saved(type(node)):  # type: ignore[arg-type]
            packed = getattr(node, raw)
            packed = packed if isinstance(packed, (tuple, list)) else (packed,)
            if all(getattr(one, "unpack_hook", None) is None for one in packed):
                found = getattr(node, name)
                yield from (t for t in (found if isinstance(found, (tuple, list)) else (found,)) if t is not None)


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
        return id(t), t.numel() * t.element_size() if t.layout == torch.strided else sum(
            part.nbytes for part in parts_of(t)
        )


def parts_of(t: Tensor) -> tuple[Tensor, ...]:
    """The tensors with memory that a tensor consists of.

    Args:
        t: any tensor.

    Returns:
        Itself; of a sparse one its indices and values; () for those of torch.func, whose memory cannot be asked for.
    """
    if t.layout == torch.strided:
        try:
            t.untyped_storage().data_ptr()
        except (NotImplementedError, RuntimeError):
            return ()
        return (t,)
    if t.layout == torch.sparse_coo:
        return t._indices(), t._values()
    rows = t.layout in (torch.sparse_csr, torch.sparse_bsr)
    indices = (t.crow_indices(), t.col_indices()) if rows else (t.ccol_indices(), t.row_indices())
    return *indices, t.values()


@lru_cache(maxsize=1024)
def _names_of_saved(kind: type) -> list[tuple[str, str]]:
    """What nodes of this type hold, by its names unpacked and packed; to look for these takes longer than the rest."""
    names = set(dir(kind))
    unpacked = {name: name.removeprefix("_raw") for name in names if name.startswith("_raw_saved_")}
    if "_raw_saved_tensors" in unpacked:  # of a custom Function
        unpacked["_raw_saved_tensors"] = "saved_tensors"
    return [(name, raw) for raw, name in sorted(unpacked.items()) if name in names]


def is_custom(node: Any) -> bool:
    """Whether a node is of a torch.autograd.Function written in Python."""
    return getattr(node, "_forward_cls", None) is not None


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
