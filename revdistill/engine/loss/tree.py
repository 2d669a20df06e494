"""Nested dicts, tuples and lists of tensors: taken apart, and put together again with other tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# What a tree is without its leaves: hashable, so that compiled functions can be kept by it.
Structure = tuple[Any, ...]
_LEAF: Structure = ("leaf",)


def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a tree, in order.

    Args:
        tree: dicts, tuples (also named ones) and lists within one another; anything else is a leaf.
        path: what the tree is called.

    Returns:
        Where each leaf is, such as hyper['a'][0], and the leaf.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif isinstance(tree, (tuple, list)):
        for i, value in enumerate(tree):
            yield from leaves(value, f"{path}[{i}]")
    else:
        yield path, tree


def structure_of(tree: Any) -> Structure:
    """What is left of a tree without its leaves."""
    if isinstance(tree, Mapping):
        return ("dict", tuple((key, structure_of(value)) for key, value in tree.items()))
    if isinstance(tree, (tuple, list)):
        return (type(tree), tuple(map(structure_of, tree)))
    return _LEAF


def rebuild(structure: Structure, values: Sequence[Any]) -> Any:
    """The tree of this structure with these leaves, in order; every mapping becomes a dict."""
    return _rebuild(structure, iter(values))


def _rebuild(structure: Structure, values: Iterator[Any]) -> Any:
    if structure == _LEAF:
        return next(values)
    kind, parts = structure
    if kind == "dict":
        return {key: _rebuild(part, values) for key, part in parts}
    entries = [_rebuild(part, values) for part in parts]
    return kind(*entries) if hasattr(kind, "_fields") else kind(entries)
