"""The one gradient function of an unroll, and its product with a vector.

Both directions call `Gradient.linearize`, which always evaluates the gradient with a graph: plain autograd takes other
kernels for some operators when no graph is asked for (torch's silu; forward-mode differs for most), and a gradient
that is one bit different on the way back ruins the reversal (invariant 1 of the engine).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.integers.fingerprint import Fingerprints
from revdistill.engine.layout import Layout
from revdistill.engine.loss.determinism import CUBLAS_SETTINGS, CUBLAS_VARIABLE, Ambient

CHANGED_IN_PLACE = (
    "the loss (or on_step) changes {} in place, so a second evaluation would see other values; compute new tensors "
    "instead"
)
Batch = tuple[Any, ...]
Loss = Callable[..., Tensor]
Hyper = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Products:
    """d<g, vector>/d(theta, batch entries, hyper entries): float tensors, None where there is no dependence."""

    theta: Tensor | None
    batch: tuple[Tensor | None, ...]
    hyper: tuple[Tensor | None, ...]


class Linearization(Protocol):
    """The loss and its gradient at one theta and step."""

    @property
    def loss(self) -> Tensor:
        """0-dim, detached."""

    @property
    def gradient(self) -> Tensor:
        """[numel], detached; bit-identical in both directions."""

    @property
    def nbytes(self) -> int:
        """Bytes that keeping this would hold; 0 where it holds no graph, and keeping it would save nothing."""

    def product(self, vector: Tensor) -> Products:
        """One double-backward product with vector [numel]; once only."""


class Data:
    """What the loss takes beside the parameters: batches (a table of s of them, or a function of k) and hyper.

    tensors: the table's tensors, [s, ...] each, or () for a function. Gradients flow to those that require grad.
    """

    def __init__(self, batches: Sequence[Tensor] | Callable[[int], Any], hyper: Hyper) -> None:
        self.function = batches if callable(batches) else None
        self.tensors: tuple[Tensor, ...] = () if callable(batches) else tuple(batches)
        self._rows = [t.detach().unbind(0) for t in self.tensors]
        self.hyper_names = tuple(hyper) if isinstance(hyper, Mapping) else None
        self.hyper_kind = type(hyper)
        if hyper is None:
            self.hypers: tuple[Tensor, ...] = ()
        elif isinstance(hyper, Tensor):
            self.hypers = (hyper,)
        else:
            self.hypers = tuple(hyper.values() if isinstance(hyper, Mapping) else hyper)

    def row(self, k: int) -> int:
        """The row of the table that step k uses."""
        return k % len(self.tensors[0])

    def rows(self, k: int) -> tuple[Tensor, ...]:
        """Step k's batch of the table, detached; () where a function gives the batches."""
        return tuple(rows[self.row(k)] for rows in self._rows)

    def from_function(self, k: int) -> Any:
        """Step k's batch, where a function gives the batches."""
        assert self.function is not None
        batch = self.function(k)
        wanting = [t for t in (batch if isinstance(batch, (tuple, list)) else [batch]) if _wants_gradient(t)]
        if wanting:
            raise ValueError(
                f"batches({k}) returned a tensor of shape {list(wanting[0].shape)} that requires grad, but batches "
                "given as a "
                "function are not differentiated; pass a tuple of tensors as batches, or pass the tensor in hyper="
            )
        return batch

    def pack_hyper(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The loss's arguments after the batch: none, or hyper in the form it was given in."""
        if self.hyper_kind is type(None):
            return ()
        if self.hyper_names is not None:
            return (dict(zip(self.hyper_names, tensors, strict=True)),)
        return (tensors[0],) if issubclass(self.hyper_kind, Tensor) else (tuple(tensors),)


class Gradient:
    """The gradient of one loss over `steps` steps, by eager autograd. fingerprints: of each step's gradient, as first
    evaluated.
    """

    def __init__(self, loss: Loss, layout: Layout, data: Data, ambient: Ambient, steps: int) -> None:
        self.loss, self.layout, self.data, self.ambient = loss, layout, data, ambient
        self.fingerprints = Fingerprints(steps, layout.device)
        self._checked = False

    def linearize(self, k: int, theta: Tensor) -> EagerLinearization:
        """Evaluate at theta [numel] and step k; the result holds the graph of this one evaluation."""
        leaf = theta.detach().requires_grad_()
        batch, batch_leaves = self._batch(k)
        hyper_leaves = tuple(_leaf(t, t.requires_grad) for t in self.data.hypers)
        with self.ambient.step(k), named_errors():
            value = self.loss(self.layout.views(leaf), batch, *self.data.pack_hyper(hyper_leaves))
            self._check(value, leaf, (*batch_leaves, *hyper_leaves))
            (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        return EagerLinearization(value.detach(), leaf, batch_leaves, hyper_leaves, gradient, self.ambient, k)

    def _batch(self, k: int) -> tuple[Any, tuple[Tensor, ...]]:
        if self.data.function is not None:
            return self._from_function(k), ()
        rows = zip(self.data.rows(k), self.data.tensors, strict=True)
        leaves = tuple(_leaf(row, t.requires_grad) for row, t in rows)
        return leaves, leaves

    def _from_function(self, k: int) -> Any:
        with self.ambient.outside():
            return self.data.from_function(k)

    def _check(self, value: object, leaf: Tensor, leaves: tuple[Tensor, ...]) -> None:
        if self._checked:
            return
        check_loss(value)
        assert isinstance(value, Tensor)
        nodes = graph_nodes(value)
        if any(map(is_once_differentiable, nodes)):
            raise UnsupportedError(
                "the loss uses an operator marked once_differentiable, which has no second derivatives, and a "
                "hypergradient needs "
                "them; replace it by one built of differentiable operations"
            )
        leaves_reached = [node.variable for node in nodes if hasattr(node, "variable")]
        strangers = [t for t in leaves_reached if t is not leaf and not any(t is known for known in leaves)]
        if strangers:
            raise ValueError(
                f"the loss uses a tensor of shape {list(strangers[0].shape)} that requires grad but was not passed "
                "to unroll, so "
                "it would silently get no gradient; pass it in params (what is trained), batches (a tuple of tensors "
                "[s, ...]) or hyper= (anything else), or detach it"
            )
        if not value.requires_grad:
            raise ValueError(
                "the loss does not depend on params: loss(params, batch) must be computed from its first argument"
            )
        self._checked = True


@dataclass
class EagerLinearization:
    """The loss and its gradient at one theta and step, with the graph of the gradient."""

    loss: Tensor
    leaf: Tensor
    batch_leaves: tuple[Tensor, ...]
    hyper_leaves: tuple[Tensor, ...]
    graph: Tensor
    ambient: Ambient
    k: int

    @property
    def gradient(self) -> Tensor:
        return self.graph.detach()

    @property
    def nbytes(self) -> int:
        data = {t.untyped_storage().data_ptr() for t in (*self.batch_leaves, *self.hyper_leaves)}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved_tensors(self.graph)}
        return sum(size for pointer, size in storages.items() if pointer not in data) + self.leaf.nbytes

    def product(self, vector: Tensor) -> Products:
        leaves = (self.leaf, *self.batch_leaves, *self.hyper_leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found: Iterator[Tensor | None] = iter([None] * len(wanted))
        if self.graph.requires_grad:  # a loss that is linear in theta has no second derivative at all
            with self.ambient.step(self.k), named_errors():
                found = iter(torch.autograd.grad(self.graph, wanted, grad_outputs=vector, allow_unused=True))
        values = [next(found) if leaf.requires_grad else None for leaf in leaves]
        split = 1 + len(self.batch_leaves)
        return Products(values[0], tuple(values[1:split]), tuple(values[split:]))


def check_loss(value: object) -> None:
    """Raise unless `value` is a scalar floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a scalar tensor, got {type(value).__name__}")
    if value.ndim or not value.is_floating_point():
        raise ValueError(
            f"loss must return a scalar floating-point tensor, got shape {list(value.shape)}, {value.dtype}"
        )


def check_arity(loss: Loss, has_hyper: bool) -> None:
    """Raise where `loss` cannot take (params, batch) or, with hyper, (params, batch, hyper)."""
    if not callable(loss):
        raise TypeError(f"loss must be callable as loss(params, batch), got {type(loss).__name__}")
    arguments = [None] * (3 if has_hyper else 2)
    try:
        inspect.signature(loss).bind(*arguments)
    except TypeError:
        wanted = "loss(params, batch, hyper), because hyper= is given" if has_hyper else "loss(params, batch)"
        raise TypeError(f"loss must be callable as {wanted}; its signature is {inspect.signature(loss)}") from None
    except ValueError:
        return  # a builtin without a signature: the call itself will tell


def graph_nodes(value: Tensor) -> list[Any]:
    """Every node of the autograd graph behind `value`."""
    seen: set[Any] = set()
    queue: list[Any] = [value.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        queue.extend(parent for parent, _ in node.next_functions)
    return list(seen)


def saved_tensors(value: Tensor) -> Iterator[Tensor]:
    """Every tensor that the autograd graph behind `value` holds for its backward."""
    for node in graph_nodes(value):
        held = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        held += getattr(node, "saved_tensors", ())
        for entry in held:
            yield from (t for t in (entry if isinstance(entry, (tuple, list)) else (entry,)) if isinstance(t, Tensor))


def is_once_differentiable(node: Any) -> bool:
    """Whether a node is a custom Function whose backward torch.autograd.function.once_differentiable wraps.

    Such a backward drops what its result depends on through saved tensors: a second derivative would be 0 in silence.
    """
    function = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(function, "__code__", None) is _ONCE_DIFFERENTIABLE


_ONCE_DIFFERENTIABLE = torch.autograd.function.once_differentiable(lambda ctx: None).__code__


@contextmanager
def named_errors() -> Iterator[None]:
    """Turn torch's errors about operators that cannot serve here into UnsupportedError."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "CuBLAS" in text and CUBLAS_VARIABLE in text:
            raise UnsupportedError(f"{_why_cublas_refuses()}. torch said: {text}") from error
        if "does not have a deterministic implementation" in text:
            raise UnsupportedError(
                "the loss uses an operator that has no deterministic implementation on this device, so the way back "
                "could differ; "
                f"replace it, or use adjoint=rd.Backprop(), which needs no second evaluation. torch said: {text}"
            ) from error
        if (
            "differentiate twice" in text
            or ("derivative for" in text and "is not implemented" in text)
            or ("double backwards is not supported" in text)
        ):
            raise UnsupportedError(
                "the loss uses an operator without second derivatives, which a hypergradient needs; replace it by "
                "one built of "
                "differentiable operations (for cuDNN recurrent layers: torch.backends.cudnn.flags(enabled=False)). "
                f"torch said: {text}"
            ) from error
        if "not implemented for sparse tensors" in text:
            raise UnsupportedError(
                "the loss has a sparse gradient, which has no way back; make it dense: torch.nn.Embedding(..., "
                "sparse=False). "
                f"torch said: {text}"
            ) from error
        if "is a view and its base or another view of its base has been modified inplace" in text:
            raise UnsupportedError(f"{CHANGED_IN_PLACE.format('params or a batch')}. torch said: {text}") from error
        raise


def _why_cublas_refuses() -> str:
    accepted, found = " or ".join(CUBLAS_SETTINGS), os.environ.get(CUBLAS_VARIABLE)
    if found not in CUBLAS_SETTINGS:
        return (
            "matrix products on a GPU repeat themselves to the bit only where the environment variable "
            f"{CUBLAS_VARIABLE} is "
            f"{accepted}, and here it is {found!r}; set it so before the process starts, or unset it (importing "
            "revdistill sets it)"
        )
    return (
        f"torch reads the environment variable {CUBLAS_VARIABLE} once, at the process's first matrix product on a "
        "GPU, and it was "
        "not set by then: import revdistill, which sets it, before anything is computed there, or start the process "
        "with "
        f"{CUBLAS_VARIABLE}={CUBLAS_SETTINGS[0]}"
    )


def _leaf(t: Tensor, wants_gradient: bool) -> Tensor:
    """A leaf over the same memory."""
    return t.detach().requires_grad_(wants_gradient)


def _wants_gradient(t: object) -> bool:
    return isinstance(t, Tensor) and t.requires_grad
