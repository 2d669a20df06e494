"""Custom autograd.Functions whose backward loses its graph: second derivatives through it would be 0, in silence.

A backward that works under torch.no_grad(), in numpy or on detached tensors gives the right gradient. torch knows of it
only where once_differentiable marks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.graph import LEAF, graph_nodes, is_custom, is_once_differentiable, nodes_from
from revdistill.engine.loss.randomness import seeded

# What is moved is moved by _FARTHEST roots of its precision, and by halves of that: rounding is small beside it.
_FARTHEST, _HALVINGS = 16.0, 4


class Functions:
    """Looks at the custom Functions of losses, at each one's first use: what follows costs a look at types."""

    def __init__(self) -> None:
        self._known_types: set[type] = {LEAF}
        self._known: set[Any] = set()

    def check(self, nodes: Sequence[Any], first: Any) -> None:
        """Check that every custom Function between the parameters and the loss has second derivatives. One that
        only the data go through is differentiated once.

        Args:
            nodes: of the graph of a loss, which is not used up.
            first: the node through which every path to the parameters goes.

        Raises:
            UnsupportedError: one has none, or its backward loses its graph.
        """
        functions = set()
        for node in nodes:
            if type(node) in self._known_types:
                continue
            if not is_custom(node):
                self._known_types.add(type(node))
                continue
            # By what it is differentiated by, too: another use may need what the first did not.
            use = (node._forward_cls, tuple(node.needs_input_grad))
            if use in self._known or first not in nodes_from(node):
                continue
            if is_once_differentiable(node):
                raise UnsupportedError(
                    "the loss uses an operator marked once_differentiable, which has no second derivatives, and a "
                    "hypergradient needs them; replace it by one built of differentiable operations"
                )
            function = _function_of(node)
            if function is not None and (function, use[1]) not in self._known:
                functions.add((function, use[1]))
                _check_backward(function, node)
            functions.add(use)
        self._known |= functions


def _function_of(node: Any) -> Any:
    """The class of the custom Function that made a node; None for operators, and for torch's Functions and those of
    this package, which tell themselves that they cannot be differentiated twice.
    """
    if not is_custom(node):
        return None
    cls = node._forward_cls
    # torch.func makes a new class at every call, and a new type of node; its methods refer to the class that was given.
    for cell in getattr(cls.backward, "__closure__", None) or ():
        if isinstance(cell.cell_contents, type) and issubclass(cell.cell_contents, torch.autograd.Function):
            cls = cell.cell_contents
    return None if cls.__module__.partition(".")[0] in ("torch", __name__.partition(".")[0]) else cls


def _check_backward(function: Any, node: Any) -> None:
    """Check that the backward of a custom Function is differentiable.

    A backward is a function of the gradients of the outputs and of the tensors that were saved. So it is called with
    copies of them that are leaves, and what it returns must have a path in its graph to each of them that it depends
    on. That the path is missing is no proof: what is used in comparisons only (a straight-through estimator's bounds),
    or not at all (the gradient of an auxiliary loss is 1), needs none. So where it is missing, the copy is moved a
    little, which must change nothing, or only by jumps: in double precision, where a move can be so small that hardly
    any number jumps, and as it was, for a backward that rounds. The gradients of the outputs are drawn, because those
    of a step can be 0, where nothing could be told. A Function that saves what its forward computed beside its outputs
    is not found: such a tensor looks like data.
    """
    for dtype in (torch.float64, None):
        try:
            lost = _Trial(node, dtype).lost()
        except Exception:  # no kernel for this, or what the context here has not: autograd's own call will tell
            continue
        if lost is not None:
            raise UnsupportedError(
                f"the loss uses {function.__name__}, a torch.autograd.Function whose backward loses its graph: what it "
                f"returns depends on {lost}, and autograd does not know, so that a hypergradient would miss a part. "
                "Write backward in differentiable torch operations on the gradient and on ctx.saved_tensors, without "
                "no_grad, detach and numpy, or let it call a second Function that has the derivative"
            )


class _Trial:
    """Calls of a node's backward beside autograd's.

    Args:
        node: of a custom Function.
        dtype: of the tensors in these calls, None for their own.
    """

    def __init__(self, node: Any, dtype: torch.dtype | None) -> None:
        draw = torch.Generator().manual_seed(0)
        self._node = node
        gradients = [_drawn(m.shape, m.dtype, m.device, draw) for m in node._input_metadata]
        saved = list(node.saved_tensors or ())
        # What it keeps besides, in lists and dicts too. Put together again these are new ones, to be changed at will.
        rest, self._form = tree_flatten(dict(vars(node)))
        given = [*gradients, *saved, *rest]
        self._gradients, self._saved = len(gradients), len(saved)
        self._wanted = [_has_derivatives(t) and (i < len(gradients) or t.requires_grad) for i, t in enumerate(given)]
        self._device = gradients[0].device if gradients else torch.device("cpu")
        # A backward may well round to single precision within.
        own = max(torch.finfo(t.dtype).eps for t in [*gradients, torch.empty(0)] if _has_derivatives(t))
        self._eps = own if dtype is None else torch.finfo(dtype).eps
        if dtype is not None:
            given = [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in given]
        self._inputs = [
            t.detach().clone().requires_grad_() if want else t for t, want in zip(given, self._wanted, strict=True)
        ]

    def lost(self) -> str | None:
        """What the results depend on without a path to it, in words; None where there is no such thing."""
        results = self._call(self._inputs)
        for j, (r, needed) in enumerate(zip(results, self._node.needs_input_grad, strict=False)):
            if r is None or not needed or not r.numel():
                continue
            reached = {id(node.variable) for node in graph_nodes(r) if type(node) is LEAF}
            for i, (t, want) in enumerate(zip(self._inputs, self._wanted, strict=True)):
                if want and t.numel() and id(t) not in reached and self._follows(i, j, r.detach()):
                    return "the gradient that it is given" if i < self._gradients else "a tensor that was saved for it"
        return None

    def _follows(self, i: int, j: int, result: Tensor) -> bool:
        """Whether result j changes half as much each time that input i is moved half as far. Of many numbers that jump
        the sum does so now and then, but not each time.
        """
        t = self._inputs[i].detach()
        size = t.abs().square().mean().sqrt()
        direction = _drawn(t.shape, t.dtype, t.device, torch.Generator().manual_seed(i)) * (size if size > 0 else 1.0)

        def change(by: float) -> Tensor:
            found = self._call([*self._inputs[:i], (t + by * direction).requires_grad_(), *self._inputs[i + 1 :]])[j]
            return torch.zeros_like(result) if found is None else found.detach() - result

        step = _FARTHEST * self._eps**0.5
        noise = 4 * torch.finfo(result.dtype).eps * result.abs().amax()
        last = change(step)
        for halvings in range(1, _HALVINGS + 1):
            if not last.abs().amax() > noise:
                return False
            now = change(step / 2**halvings)
            if not (last - 2 * now).norm() <= 0.25 * last.norm():
                return False
            last = now
        return True

    def _call(self, inputs: Sequence[Any]) -> list[Tensor | None]:
        # A backward may write into what it is given, which autograd allows for no leaf.
        copies = [t.clone() if want else t for t, want in zip(inputs, self._wanted, strict=True)]
        gradients, rest = copies[: self._gradients], copies[self._gradients :]
        context = _Context(self._node, tuple(rest[: self._saved]), tree_unflatten(rest[self._saved :], self._form))
        with torch.enable_grad(), seeded(0, self._device):
            found = self._node._forward_cls.backward(context, *gradients)
        results = found if isinstance(found, (tuple, list)) else (found,)
        return [t if isinstance(t, Tensor) and _has_derivatives(t) else None for t in results]


class _Context:
    """A node's context with other tensors. What a backward notes in it does not reach the node."""

    def __init__(self, node: Any, saved: tuple[Tensor, ...], attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        self._node, self.saved_tensors, self.saved_variables = node, saved, saved

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)


def _has_derivatives(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout == torch.strided and (t.is_floating_point() or t.is_complex())


def _drawn(shape: Sequence[int], dtype: torch.dtype, device: torch.device, draw: torch.Generator) -> Tensor:
    """Of a generator of its own; zeros where the dtype has no derivatives."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    return torch.randn(tuple(shape), dtype=torch.float64, generator=draw).to(device=device, dtype=dtype)
