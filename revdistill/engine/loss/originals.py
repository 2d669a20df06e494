"""Whether a loss reads the parameters as they were given to the unroll, beside the ones that it is given at each step.

A training loop of torch changes its parameters in place, so that whoever holds them sees them as they are. An unroll
leaves them as they are: a criterion that calls the network for a target, or a list that holds a weight, would see the
start at every step. With a gradient that is a tensor from nowhere, which is refused anyway (`Strangers`); detached,
nothing else would tell. To look is to make every operator's call in Python, so it is done at the steps whose number,
of all that a loss was ever evaluated at, is a power of two.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.evaluation import Modules
from revdistill.engine.loss.graph import LEAF, graph_nodes
from revdistill.engine.loss.marking import CannotFollowError, Marking, Reads, memory_in
from revdistill.engine.loss.tree import contents
from revdistill.engine.loss.uncompiled import uncompiled

NO_GROUP = (
    "the loss calls {}, and the unroll has no group: nothing would tell that the processes drift apart, or that one of "
    "them failed. Give group= to rd.unroll, and exchange what is differentiated by rd.distributed.copy, sum and gather"
)
BY_ITSELF = (
    "the loss calls {} of torch.distributed on a tensor that requires grad: {}. Use rd.distributed.sum, copy and "
    "gather, whose derivatives are exchanges too, and in which every rank hears of another's error"
)
# By loss, without a group and with one: a loss that is fine with one need not be so without.
_evaluations: tuple[weakref.WeakKeyDictionary[Any, int], ...] = (
    weakref.WeakKeyDictionary(),
    weakref.WeakKeyDictionary(),
)


class Originals:
    """Of one unroll.

    Args:
        loss: whose evaluations are looked at.
        params: as they were given, by name.
        hypers: may share the parameters' memory: what the loss is given it may read.
        modules: those that the loss calls.
        steps: of the unroll.
        taken: steps of the training before the first one here, for messages.

    Attributes:
        next: the next step to be looked at.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        params: Mapping[str, Tensor],
        hypers: Iterable[Tensor],
        modules: Modules,
        steps: int,
        taken: int = 0,
    ) -> None:
        self._params, self._modules, self._taken = params, modules, taken
        self._given = {memory_in(t)[0] for t in hypers}
        self._loss, self._before = loss, 0
        try:
            self._before = self._known.get(loss, 0)
            self._known[loss] = self._before + steps
        except Exception:  # nothing can be remembered of it, whatever its __hash__ raises
            self._before = 0
        self.next = self._after(-1)

    def watch(self, k: int, evaluate: Callable[[], Tensor], batch: Any, leaf: Tensor | None = None) -> Tensor:
        """Evaluate the loss of the step that is next.

        Args:
            k: the step.
            evaluate: returns the loss.
            batch: which the loss is given.
            leaf: that the step's parameters are views of, where a gradient through the originals counts: what is
                reached with one is no error then.

        Returns:
            What `evaluate` returned.

        Raises:
            UnsupportedError: the loss reads parameters as they were given.
        """
        self.next = self._after(k)
        try:
            return self._watched(k, evaluate, batch, leaf)
        except Exception:
            with suppress(Exception):  # see above
                self._known.pop(self._loss, None)  # called once more, it is looked at once more
            raise

    @property
    def _known(self) -> weakref.WeakKeyDictionary[Any, int]:
        return _evaluations[self._modules.grouped]

    def _watched(self, k: int, evaluate: Callable[[], Tensor], batch: Any, leaf: Tensor | None) -> Tensor:
        given = {memory_in(t)[0] for _, t in contents(batch, "") if isinstance(t, Tensor)} | self._given
        self._modules.uncompiled.add(k)
        try:
            following = _Following(self._params, self._modules, given)
            with uncompiled(), following, Reads(following, addresses=False):
                value = evaluate()
        except CannotFollowError:
            self._modules.uncompiled.discard(k)
            return evaluate()
        if following.calls and isinstance(value, Tensor):
            _refuse_others(value)
        names = following.was_read | (following.of(value) if isinstance(value, Tensor) else frozenset())
        if names and leaf is not None:
            reached = {id(node.variable) for node in graph_nodes(value, until=(leaf,)) if type(node) is LEAF}
            names -= {name for name, t in self._params.items() if id(t) in reached}
        if names:
            raise UnsupportedError(
                f"the loss reads params[{min(names)!r}] as it was given to unroll, at step {k + self._taken}: a "
                "criterion that calls the network does so, or a list that holds a layer's weight. It would be the "
                "start's at every step, and no derivative would flow to it. Compute everything from the params that "
                "the loss is given: make the criterion a module that holds the network, or write loss(params, batch) "
                "with torch.func.functional_call. What is to stay as it is at the start goes into hyper=, or is a "
                "copy made before rd.unroll is called: .detach().clone()"
            )
        return value

    def _after(self, k: int) -> int:
        """The first step after k to be looked at."""
        return (1 << (self._before + k + 1).bit_length()) - self._before - 1


class _Following(Marking):  # type: ignore[no-untyped-call]
    """Marks what is computed from the originals: those that were given, and those that calls of modules replace.

    Args:
        params: as they were given, by name.
        modules: those that the loss calls; which they are shows while it is evaluated.
        given: the memory of what the loss is given beside them.

    Attributes:
        calls: whether a collective was called.
    """

    def __init__(self, params: Mapping[str, Tensor], modules: Modules, given: AbstractSet[int]) -> None:
        super().__init__({})
        self._modules, self._given, self._known, self.calls = modules, given, 0, False
        # By memory the names and the first and last bytes: frozen layers and buffers may lie in it too.
        self._originals: dict[int, list[tuple[str, int, int]]] = {}
        # What was computed, by an outer unroll say, is in nobody's module.
        self._add((name, t) for name, t in params.items() if t.is_leaf)

    def of(self, t: Tensor) -> frozenset[str]:
        """See `Marking.of`."""
        replaced = self._modules.replaced
        if len(replaced) > self._known:
            self._add(replaced)
            self._known = len(replaced)
        here = self._originals.get(memory_in(t)[0])
        if here is None:
            return super().of(t)
        first, last = _bytes_of(t)
        return frozenset(name for name, begin, end in here if first < end and begin < last)

    def exchanged(self, func: Any, tensors: Sequence[Tensor]) -> None:
        """Raises: UnsupportedError."""
        name = func._schema.name.split("::")[-1].rstrip("_")
        if not self._modules.grouped:
            raise UnsupportedError(NO_GROUP.format(f"{name} of torch.distributed"))
        self.calls = True
        if any(t.requires_grad for t in tensors):
            raise UnsupportedError(
                BY_ITSELF.format(name, "autograd does not see it, and the derivative would be that of another loss")
            )

    def _mark(self, t: Tensor, names: frozenset[str]) -> None:
        if memory_in(t)[0] not in self._originals:  # a view of an original: that is marked already
            super()._mark(t, names)

    def _add(self, named: Iterable[tuple[str, Tensor]]) -> None:
        for name, t in named:
            memory = memory_in(t)[0]
            if memory not in self._given and t.numel():
                self._originals.setdefault(memory, []).append((name, *_bytes_of(t)))


def _refuse_others(value: Tensor) -> None:
    """Raise UnsupportedError where the graph of a loss has an exchange of torch's in it."""
    for node in graph_nodes(value):
        cls = getattr(node, "_forward_cls", None)
        if cls is not None and cls.__module__.startswith("torch.distributed."):
            raise UnsupportedError(
                BY_ITSELF.format(cls.__name__.lstrip("_"), "where one rank fails before it, the others wait for long")
            )


def _bytes_of(t: Tensor) -> tuple[int, int]:
    """The first byte in its storage and the one behind the last; of what is sparse all that there are."""
    if t.layout != torch.strided:
        return 0, sys.maxsize
    begin = int(t.storage_offset())
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return begin * t.element_size(), (begin + int(extent)) * t.element_size()
