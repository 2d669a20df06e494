"""Nested dicts, tuples and lists of tensors: taken apart, and put together again with other tensors."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

# What a tree is without its leaves: hashable, so that compiled functions can be kept by it.
Structure = tuple[Any, ...]
_LEAF: Structure = ("leaf",)
_CODE = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
_WHOLE = (
    Tensor,
    np.ndarray,
    np.generic,
    str,
    bytes,
    int,
    float,
    complex,
    nn.Module,
    Dataset,
    torch.Generator,
    Optimizer,
    *_CODE,
)
_MOST_OBJECTS = 10_000
PLAIN = (int, float, complex, str, bool, bytes, type(None), torch.dtype, torch.device)  # leaves that are what they show


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


def contents(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a tree and of the objects in it: dataclasses, and whatever else has attributes or slots.

    Modules, data sets and code are leaves. Of an object that refers to half the world no more is looked at than 10,000
    others.

    Args:
        value: a batch, say.
        path: what it is called.

    Returns:
        Where each leaf is, such as batch[0].x, and the leaf; each object is entered once.
    """
    yield from _contents(value, path, {}, None)


def _contents(value: Any, path: str, seen: dict[int, Any], first: int | None) -> Iterator[tuple[str, Any]]:
    """seen: what was entered; first: how many those were when an object was, None outside of objects."""
    if isinstance(value, _WHOLE) or value is None:
        yield path, value
        return
    if id(value) in seen or (first is not None and len(seen) - first >= _MOST_OBJECTS):
        return
    seen[id(value)] = value  # kept, so that no other gets its number
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _contents(entry, f"{path}[{key!r}]", seen, first)
    elif isinstance(value, (tuple, list, deque, set, frozenset)):
        for i, entry in enumerate(value):
            yield from _contents(entry, f"{path}[{i}]", seen, first)
    if type(value) not in (tuple, list, dict):
        for name, entry in _attributes(value):
            yield from _contents(entry, f"{path}.{name}", seen, len(seen) if first is None else first)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from list(getattr(value, "__dict__", {}).items())
    for cls in type(value).__mro__:
        for name, member in vars(cls).items():
            if type(member) is MemberDescriptorType:  # a slot
                try:
                    yield name, member.__get__(value)
                except AttributeError:  # which holds nothing
                    continue


def structure_of(tree: Any) -> Structure:
    """What is left of a tree without its leaves."""
    if isinstance(tree, Mapping):
        kind = (type(tree), tree.default_factory) if isinstance(tree, defaultdict) else (type(tree),)
        return (kind, tuple((key, structure_of(value)) for key, value in tree.items()))
    if isinstance(tree, (tuple, list)):
        return (type(tree), tuple(map(structure_of, tree)))
    return _LEAF


def form_of(tree: Any) -> tuple[Any, ...]:
    """What a tree is without its tensors' numbers: hashable. Of leaves that are neither tensors nor `PLAIN`, the type
    only.
    """
    return structure_of(tree), *(_form_of_leaf(leaf) for _, leaf in leaves(tree, ""))


def _form_of_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (
            tuple(leaf.shape),
            leaf.dtype,
            leaf.device,
            leaf.stride() if leaf.layout == torch.strided else leaf.layout,
        )
    # By what is written: -0.0 equals 0.0, and no NaN equals itself.
    return type(leaf), repr(leaf) if isinstance(leaf, PLAIN) else None


def rebuild(structure: Structure, values: Sequence[Any]) -> Any:
    """The tree of this structure with these leaves, in order."""
    return _rebuild(structure, iter(values))


def _rebuild(structure: Structure, values: Iterator[Any]) -> Any:
    if structure == _LEAF:
        return next(values)
    kind, parts = structure
    if isinstance(kind, tuple):
        named = {key: _rebuild(part, values) for key, part in parts}
        return named if kind == (dict,) else kind[0](*kind[1:], named)
    entries = [_rebuild(part, values) for part in parts]
    return kind(*entries) if hasattr(kind, "_fields") else kind(entries)


def check_form(tree: Any, path: str) -> None:
    """Check that a tree can be put together again: a dict of another type is made by calling the type with a dict.

    Args:
        tree: see `leaves`.
        path: what it is called.

    Raises:
        TypeError: one of its dicts, tuples and lists comes out otherwise.
    """
    if not isinstance(tree, (Mapping, tuple, list)):
        return
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        check_form(value, f"{path}[{key!r}]")
    if type(tree) in (dict, OrderedDict, tuple, list):  # a state_dict() has attributes that no loss reads
        return
    kind = type(tree).__name__
    try:
        again = rebuild(structure_of(tree), [value for _, value in leaves(tree, path)])
        same = _same_form(tree, again)
    except Exception as error:  # whatever a type raises that is called in a way that is not its own
        raise TypeError(_NOT_AGAIN.format(path, kind, f"raises {type(error).__name__}: {error}")) from error
    if not same:
        raise TypeError(_NOT_AGAIN.format(path, kind, "makes another one of them"))


_NOT_AGAIN = (
    "{0} is a {1}, which cannot be put together again with other tensors: calling {1} with its entries {2}; give a "
    "plain dict, tuple or list of its entries"
)


def _same_form(tree: Any, again: Any) -> bool:
    """Whether `again` has the type, leaves and attributes of `tree`."""
    if type(again) is not type(tree) or structure_of(again) != structure_of(tree):
        return False
    pairs = zip(leaves(tree, ""), leaves(again, ""), strict=True)
    own, others = getattr(tree, "__dict__", {}), getattr(again, "__dict__", {})
    return (
        all(a is b for (_, a), (_, b) in pairs)
        and own.keys() == others.keys()
        and all(
            value is others[key] or isinstance(value, (Mapping, tuple, list)) or bool(value == others[key])
            for key, value in own.items()
        )
    )
