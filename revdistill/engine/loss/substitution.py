"""Calling a torch.nn.Module with other tensors in the place of its own: functional_call, without its search by name.

torch.func.functional_call walks the whole module twice at each call, to find which names share a tensor and where each
name leads: a sixth of the gradient of a small network. Here the places are found once. What was found is compared with
the module at every call, and found again where anything changed; where the places are not plain entries of
`_parameters` and `_buffers`, functional_call does the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

# (the dictionary that holds the module's own tensor, its key there, the name of the tensor to put in its place)
_Place = tuple[dict[str, Any], str, str]
# Without loops in Python: at every call the whole module is compared.
_HOLDERS, _VALUES = attrgetter("_parameters", "_buffers", "_modules"), methodcaller("values")


class Substitution:
    """A module that can be called with other tensors in the place of its own.

    Args:
        net: the module. It is as it was after every call, and after a call that raised.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._found: _Found | None = None

    def __call__(self, tensors: Mapping[str, Tensor], inputs: tuple[Any, ...]) -> Any:
        """The module's output, as torch.func.functional_call(net, tensors, inputs) gives it.

        Args:
            tensors: by the names of `named_parameters` and `named_buffers`. What shares a tensor with one of them is
                replaced too; what is not named stays the module's own.
            inputs: the module's arguments.

        Returns:
            What the module returns.
        """
        places = None if torch.compiler.is_compiling() else self._places(tensors)
        if places is None:
            return torch.func.functional_call(self._net, dict(tensors), inputs)
        own = [holder[key] for holder, key, _ in places]
        try:
            for holder, key, name in places:
                holder[key] = tensors[name]
            return self._net(*inputs)
        finally:
            for (holder, key, _), tensor in zip(places, own, strict=True):
                holder[key] = tensor

    def _places(self, tensors: Mapping[str, Tensor]) -> list[_Place] | None:
        """Where to put `tensors`; None where functional_call has to."""
        found = self._found
        if found is None or not found.still_holds(tensors):
            self._found = found = _find(self._net, tensors)
        return None if found is None else found.places


@dataclass(frozen=True)
class _Found:
    """The places of named tensors in a module, and what it was made of when they were found.

    names: of the tensors; modules: the module and those in it; lengths, keys, entries: of their dictionaries.
    """

    names: set[str]
    places: list[_Place]
    modules: list[nn.Module]
    lengths: list[int]
    keys: list[str]
    entries: list[Any]

    def still_holds(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the module is made of the very same modules and tensors as when the places were found."""
        holders = _holders(self.modules)
        return (
            tensors.keys() == self.names
            and list(map(len, holders)) == self.lengths
            and list(chain.from_iterable(holders)) == self.keys
            and all(map(is_, _entries(holders), self.entries))
        )


def _holders(modules: list[nn.Module]) -> list[dict[str, Any]]:
    """The dictionaries that a module keeps what it is made of in."""
    return list(chain.from_iterable(map(_HOLDERS, modules)))


def _entries(holders: list[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(_VALUES, holders))


def _find(net: nn.Module, tensors: Mapping[str, Tensor]) -> _Found | None:
    """The places of `tensors` in `net`; None where functional_call has to find them at each call."""
    if isinstance(net, (torch.jit.ScriptModule, nn.DataParallel)):
        return None  # functional_call refuses them
    modules = list(net.modules())
    holders = _holders(modules)
    if not all(isinstance(holder, dict) for holder in holders):
        return None
    slots = _slots(net)
    if slots is None or not tensors.keys() <= slots.keys():
        return None
    places: dict[tuple[int, str], _Place] = {}
    owners: dict[int, str] = {}  # id of a tensor of the module -> the name that replaces it
    for name in tensors:
        holder, key = slots[name]
        if owners.setdefault(id(holder[key]), name) != name:
            return None  # two names of one tensor, which functional_call compares
    for holder, key in slots.values():
        replacing = owners.get(id(holder[key]))
        if replacing is not None:
            places[id(holder), key] = (holder, key, replacing)
    lengths, keys = list(map(len, holders)), list(chain.from_iterable(holders))
    return _Found(set(tensors), list(places.values()), modules, lengths, keys, list(_entries(holders)))


def _slots(net: nn.Module) -> dict[str, tuple[dict[str, Any], str]] | None:
    """The holder and key of every tensor of `net`, by name; None while another call has put its tensors there."""
    slots: dict[str, tuple[dict[str, Any], str]] = {}
    for prefix, module in net.named_modules(remove_duplicate=False):
        if not all(p is None or isinstance(p, nn.Parameter) for p in module._parameters.values()):
            return None
        for holder in (module._parameters, module._buffers):
            for key, tensor in holder.items():
                if tensor is not None:
                    slots[f"{prefix}.{key}" if prefix else key] = holder, key
    return slots
