"""Whether the exchanges in a loss give the gradient of the mean over ranks of the ranks' losses.

`copy` and `sum` are each other's derivative by a convention that holds where they come in pairs. There are two of
them, for rank r's loss L_r and its own copy of theta:

    copy(sum(h_r))          back a sum, then the identity: d(L_1 + ... + L_W)/d h_r, what each rank made of the sum
    sum(part(copy(theta)))  back the identity, then a sum: every rank finds what all parts say of theta

The engine takes the mean over ranks of what each finds for theta and hyper: right for both. To batches, of which each
rank has its own, it gives what that rank found, over W: right for the first, W times too small for the second.
What is not paired is wrong in any case: by `sum` alone a rank misses what the others made of its part, and by `copy`
alone it counts W times. `gather` is a pair by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.graph import LEAF

_PAIR = "rd.distributed.copy(rd.distributed.sum(x))"
_State = tuple[frozenset[tuple[int, int]], bool]  # by group how many sums more than copies; whether ever more


class Paired(torch.autograd.Function):
    """A sum, or a copy: linear, so that nothing is kept but the place. more: sums than copies, 1 or -1."""

    more: int

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.place = inputs[0]


def check_paths(value: Tensor, theta: Tensor, batches: Sequence[Tensor], hypers: Sequence[Tensor]) -> None:
    """Check every path from a loss back to what it is differentiated by.

    Args:
        value: the loss of this rank, with its graph.
        theta: the parameters [numel], a leaf.
        batches: leaves, of this rank alone.
        hypers: leaves, the same on all ranks.

    Raises:
        UnsupportedError: the derivative along one would be wrong.
    """
    own = {id(t): f"batches[{i}]" for i, t in enumerate(batches)}
    shared = {id(theta): "params", **{id(t): "hyper" for t in hypers}}
    start: tuple[Any, _State] = value.grad_fn, (frozenset(), False)
    seen, left = {start}, [start]
    while left:
        node, state = left.pop()
        if type(node) is LEAF:
            leaf = id(node.variable)
            if leaf in own or leaf in shared:
                _check_end(state, own.get(leaf) or shared[leaf], alone=leaf in own)
            continue
        state = _beyond(node, state)
        for parent, _ in node.next_functions:
            if parent is not None and (parent, state) not in seen:
                seen.add((parent, state))
                left.append((parent, state))


def _beyond(node: Any, state: _State) -> _State:
    """What is known of a path behind a node."""
    cls = getattr(node, "_forward_cls", None)
    if cls is None or not issubclass(cls, Paired):
        return state
    counts = dict(state[0])
    key = id(node.place.ranks)
    count = counts.pop(key, 0) + cls.more
    return frozenset({**counts, key: count}.items() if count else counts.items()), state[1] or count > 0


def _check_end(state: _State, what: str, *, alone: bool) -> None:
    counts, ever = state
    before = f"the loss depends on {what} through rd.distributed."
    if any(count > 0 for _, count in counts):
        raise UnsupportedError(
            f"{before}sum without copy: its derivative is the identity, so that a rank would miss what the others make "
            f"of its part of the sum. Write {_PAIR}, whose derivative is the sum over ranks"
        )
    if counts:
        raise UnsupportedError(
            f"{before}copy without sum: its derivative is summed over ranks, and rd.unroll takes the mean over ranks "
            "of that once more. Leave copy out: each rank's loss is a function of its own copy of theta and hyper; for "
            f"what is computed of all ranks' samples write {_PAIR}"
        )
    if alone and ever:
        raise UnsupportedError(
            f"{before}sum outside and copy inside: every rank would find the whole derivative by params, and the "
            f"derivative by its own {what} would be divided by the number of ranks. Write {_PAIR} for the sum, and "
            "leave copy out elsewhere"
        )
