"""What the graph of a loss reaches beside what the unroll gave it: a way back would miss the derivatives through it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.functions import Functions
from revdistill.engine.loss.graph import LEAF, graph_nodes

_Shapes = tuple[tuple[int, ...], ...]


class Strangers:
    """Looks through the graph of each step's loss, at its first evaluation.

    Args:
        taken: steps of the training before the first one here, for messages.
    """

    def __init__(self, taken: int) -> None:
        self._taken = taken
        self._functions = Functions()
        self._own: set[_Shapes] = set()
        self._thetas: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def check(
        self,
        k: int,
        value: Tensor,
        leaf: Tensor,
        first: Any,
        leaves: Sequence[Tensor],
        again: Callable[[], Tensor],
    ) -> None:
        """Check the graph of a loss.

        Args:
            k: the step.
            value: the loss, 0-dim.
            leaf: the parameters [numel] that it was computed from.
            first: the first node that was made of them, in this evaluation.
            leaves: of the batch and of hyper.
            again: evaluates the loss of this step once more, with the same random numbers.

        Raises:
            UnsupportedError: it has a Function without second derivatives, or reaches an earlier step's parameters.
            ValueError: it reaches a tensor that requires grad and was not passed to the unroll.
        """
        nodes = graph_nodes(value)
        self._functions.check(nodes, first)
        passed = {id(leaf), *map(id, leaves)}
        strangers = [node for node in nodes if type(node) is LEAF and id(node.variable) not in passed]
        if strangers:
            # Nodes count up: one from before this evaluation is of a graph that somebody holds, and its leaves with it.
            begin = first._sequence_nr()
            older = any(type(node) is not LEAF and node._sequence_nr() < begin for node in nodes)
            self._judge(k, value, strangers, again, held=older)
        self._thetas[id(leaf)] = leaf

    def _judge(self, k: int, value: Tensor, nodes: list[Any], again: Callable[[], Tensor], *, held: bool) -> None:
        if any(self._thetas.get(id(node.variable)) is node.variable for node in nodes):
            raise UnsupportedError(
                "the loss keeps a tensor computed from params from one call to the next (in an attribute of a module, "
                "say), and so a step depends on the one before beside the parameters; detach() what is kept"
            )
        strangers = [node.variable for node in nodes] if held else _held(nodes)
        # A leaf that the loss makes itself and keeps is another at each call, of the same shape mostly.
        shapes = tuple(sorted(tuple(t.shape) for t in strangers))
        if not strangers or shapes in self._own:
            return
        repeated = again()
        reached = {id(node.variable) for node in graph_nodes(repeated) if type(node) is LEAF}
        where = f"at step {k + self._taken} a tensor of shape {list(strangers[0].shape)} that requires grad"
        if any(id(t) in reached for t in strangers):
            raise ValueError(
                f"the loss uses {where} but was not passed to unroll, so it would silently get no gradient; pass it in "
                "params (what is trained), batches (a tuple of tensors [s, ...]) or hyper= (anything else), or detach "
                "it"
            )
        if not torch.equal(repeated, value):
            raise UnsupportedError(
                f"the loss keeps {where}, and evaluated twice it had two values, so that it cannot be told whether a "
                "gradient would be missing; detach() what is kept, and draw random numbers from torch's generator only"
            )
        self._own.add(shapes)


def _held(nodes: list[Any]) -> list[Tensor]:
    """The leaves that Python code holds, beside their graphs: not what a loss made on its way and let go.

    To tell by evaluating the loss once more would move whatever counts its calls.

    Args:
        nodes: of leaves.
    """
    kept: list[Tensor] = []
    free, held = _graph_of_a_leaf(None), _graph_of_a_leaf(kept)
    leaves = [node.variable for node in (*nodes, *(node for graph in (free, held) for node, _ in graph.next_functions))]
    *counts, count_free, count_held = map(sys.getrefcount, leaves)
    if count_free >= count_held:  # a Python that counts otherwise
        return leaves[:-2]
    return [t for t, count in zip(leaves, counts, strict=False) if count > count_free]


def _graph_of_a_leaf(kept: list[Tensor] | None) -> Any:
    leaf = torch.zeros((), requires_grad=True)
    if kept is not None:
        kept.append(leaf)
    return leaf.exp().grad_fn
