"""What the graph of a loss reaches beside what the unroll gave it: a way back would miss the derivatives through it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.graph import graph_nodes, is_once_differentiable

_Shapes = tuple[tuple[int, ...], ...]
_Leaf = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]  # the node of every leaf


class Strangers:
    """Looks through the graph of each step's loss, at its first evaluation.

    Args:
        taken: steps of the training before the first one here, for messages.
    """

    def __init__(self, taken: int) -> None:
        self._taken = taken
        self._known_types: set[type] = {_Leaf}
        self._own: set[_Shapes] = set()
        self._theta: Callable[[], Tensor | None] = lambda: None

    def check(self, k: int, value: Tensor, leaf: Tensor, leaves: Sequence[Tensor], again: Callable[[], Tensor]) -> None:
        """Check the graph of a loss.

        Args:
            k: the step.
            value: the loss, 0-dim.
            leaf: the parameters [numel] that it was computed from.
            leaves: of the batch and of hyper.
            again: evaluates the loss of this step once more, with the same random numbers.

        Raises:
            UnsupportedError: it has an operator without second derivatives, or reaches an earlier step's parameters.
            ValueError: it reaches a tensor that requires grad and was not passed to the unroll.
        """
        nodes = graph_nodes(value)
        for node in nodes:
            if type(node) not in self._known_types:  # each custom Function has a type of its own
                if is_once_differentiable(node):
                    raise UnsupportedError(
                        "the loss uses an operator marked once_differentiable, which has no second derivatives, and a "
                        "hypergradient needs them; replace it by one built of differentiable operations"
                    )
                self._known_types.add(type(node))
        found = [node.variable for node in nodes if type(node) is _Leaf]
        if len(found) > 1 or (found and found[0] is not leaf):
            known = {id(leaf), *map(id, leaves)}
            strangers = [t for t in found if id(t) not in known]
            if strangers:
                self._judge(k, strangers, again)
        self._theta = weakref.ref(leaf)

    def _judge(self, k: int, strangers: list[Tensor], again: Callable[[], Tensor]) -> None:
        theta = self._theta()
        if any(t is theta for t in strangers):
            raise UnsupportedError(
                "the loss keeps a tensor computed from params from one call to the next (in an attribute of a module, "
                "say), and so a step depends on the one before beside the parameters; detach() what is kept"
            )
        # A leaf that the loss made itself (for a gradient penalty) is another at each call, of the same shape mostly.
        shapes = tuple(sorted(tuple(t.shape) for t in strangers))
        if shapes in self._own:
            return
        reached = [node.variable for node in graph_nodes(again()) if type(node) is _Leaf]
        passed_by = [t for t in strangers if any(t is other for other in reached)]
        if passed_by:
            raise ValueError(
                f"the loss uses a tensor of shape {list(passed_by[0].shape)} at step {k + self._taken} that requires "
                "grad but was not passed to unroll, so it would silently get no gradient; pass it in params (what is trained), batches (a "
                "tuple of tensors [s, ...]) or hyper= (anything else), or detach it"
            )
        self._own.add(shapes)
