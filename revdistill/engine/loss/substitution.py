"""Calling a torch.nn.Module with other tensors in the place of its own: functional_call, without its search by name.

torch.func.functional_call walks the whole module twice at each call, to find which names share a tensor and where each
name leads: a sixth of the gradient of a small network. Here the places are found once. What was found is compared with
the module at every call, and found again where anything changed; where the places are not plain entries of
`_parameters` and `_buffers`, functional_call does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.checkpointing import Watched
from revdistill.engine.loss.evaluation import evaluating, flags_of, set_flags
from revdistill.engine.loss.turn import turn

# (the dictionary that holds the module's own tensor, its key there, the name of the tensor to put in its place)
_Place = tuple[dict[str, Any], str, str]
# Without loops in Python: at every call the whole module is compared.
_NONE: dict[str, Any] = {}
_HOLDERS, _VALUES = attrgetter("_parameters", "_buffers", "_modules"), methodcaller("values")


class Substitution:
    """A module that can be called with other tensors in the place of its own.

    Args:
        net: the module. It is as it was after every call, and after a call that raised.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._found: _Found | None = None
        self.rebound: set[str] = set()

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        inputs: tuple[Any, ...],
        keywords: Mapping[str, Any] | None = None,
        *,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The module's output, as torch.func.functional_call(net, tensors, inputs, keywords) gives it.

        Args:
            tensors: by the names of `named_parameters` and `named_buffers`. What shares a tensor with one of them is
                replaced too; what is not named stays the module's own.
            inputs: the module's arguments.
            keywords: its keyword arguments.
            buffers: those of `tensors` that are copies, and what they are copies of: where the module checkpoints its
                activations, it computes them again with new copies.

        Returns:
            What the module returns. `rebound` are the names in whose places it left other tensors than `tensors`.
        """
        keywords = _NONE if keywords is None else keywords
        if torch.compiler.is_compiling():
            return torch.func.functional_call(self._net, dict(tensors), inputs, dict(keywords))
        places, unroll = self._places(tensors), evaluating()
        if unroll is not None:
            unroll.calls(self._net, self.modules(), tensors.keys())
        if places is None:
            self.rebound = set()
            with Watched(_NotHeld()):
                return torch.func.functional_call(self._net, dict(tensors), inputs, dict(keywords))
        own = [holder[key] for holder, key, _ in places]
        with Watched(_Held(self.modules(), places, tensors, buffers or _NONE)):
            try:
                for holder, key, name in places:
                    holder[key] = tensors[name]
                return self._net(*inputs, **keywords)
            finally:
                if buffers:
                    self.rebound = {name for holder, key, name in places if holder.get(key) is not tensors[name]}
                for (holder, key, _), tensor in zip(places, own, strict=True):
                    holder[key] = tensor

    def modules(self) -> list[nn.Module]:
        """The module and those in it."""
        return list(self._net.modules()) if self._found is None else self._found.modules

    def _places(self, tensors: Mapping[str, Tensor]) -> list[_Place] | None:
        """Where to put `tensors`; None where functional_call has to."""
        found = self._found
        if found is None or not found.still_holds(tensors):
            self._found = found = _find(self._net, tensors)
        return None if found is None else found.places


class _Held:
    """One call: the module in its mode, with these tensors. A `checkpointing.Held`."""

    def __init__(
        self,
        modules: list[nn.Module],
        places: list[_Place],
        tensors: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> None:
        self._modules, self._places, self._tensors, self._buffers = modules, places, tensors, buffers

    def again(self) -> Callable[[], AbstractContextManager[None]]:
        """The context of the call, as it is now, to be entered later."""
        flags = flags_of(self._modules)

        @contextmanager
        def call() -> Iterator[None]:
            tensors = {**self._tensors, **{name: b.clone() for name, b in self._buffers.items()}}
            turn().acquire()
            own, modes = [holder.get(key) for holder, key, _ in self._places], flags_of(self._modules)
            try:
                set_flags(self._modules, flags)
                for holder, key, name in self._places:
                    holder[key] = tensors[name]
                yield
            finally:
                set_flags(self._modules, modes)
                for (holder, key, _), tensor in zip(self._places, own, strict=True):
                    holder[key] = tensor
                turn().release()

        return call


class _NotHeld:
    """A call by functional_call, which puts the module's own tensors back by its own means."""

    def again(self) -> Callable[[], AbstractContextManager[None]]:
        raise UnsupportedError(
            "a module that checkpoints its activations (torch.utils.checkpoint) is called within a call of itself, or "
            "holds entries that are no parameters; switch checkpointing off"
        )


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
