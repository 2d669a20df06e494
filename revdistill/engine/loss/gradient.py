"""The one gradient function of an unroll, and its product with a vector.

Both directions call `Gradient.linearize`, which always evaluates the gradient with a graph: plain autograd takes other
kernels for some operators when no graph is asked for (torch's silu; forward-mode differs for most), and a gradient
that is one bit different on the way back ruins the reversal (invariant 1 of the engine).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.callables import check_callable
from revdistill.engine.errors import UnsupportedError
from revdistill.engine.integers.fingerprint import Fingerprints
from revdistill.engine.layout import Layout
from revdistill.engine.loss.data import Data, Loss
from revdistill.engine.loss.determinism import Determinism
from revdistill.engine.loss.linearization import EagerLinearization
from revdistill.engine.loss.originals import Originals
from revdistill.engine.loss.strangers import Strangers
from revdistill.engine.loss.tree import PLAIN, form_of, leaves
from revdistill.engine.loss.uncompiled import uncompiled
from revdistill.engine.loss.untouched import OpenLooks, Untouched, looked_at, settle
from revdistill.engine.loss.usage import UnusedParametersError, Usage

FIRST_ALIKE = 3  # the first step that may be taken to be like those before it

BACKWARD_INSIDE = (
    "the loss calls .backward() itself, and what that adds to gradients would be dropped; return the sum "
    "of all terms, of which the unroll takes the gradient, or call torch.autograd.grad(..., create_graph=True) for a "
    "gradient that the loss is computed from"
)


class Gradient:
    """The gradient of one loss over the steps of one unroll, by eager autograd.

    Args:
        loss: loss(params, batch), or loss(params, batch, hyper) where `data` has hyper.
        layout: of the parameters.
        data: what the loss takes beside them.
        determinism: what surrounds each evaluation.
        steps: of the unroll.
        usage: which parameters must have a gradient; by default any may lack it, at all steps.
        originals: watches that the loss does not read the parameters as they were given.
        alike: whether the steps after the first few are taken to be like these, and checked once in a while only.

    Attributes:
        fingerprints: of each step's gradient, as it was evaluated first.
        first: the first step's evaluation, where it was made before (see `UnusedParametersError`).
    """

    def __init__(
        self,
        loss: Loss,
        layout: Layout,
        data: Data,
        determinism: Determinism,
        steps: int,
        usage: Usage | None = None,
        originals: Originals | None = None,
        *,
        alike: bool = False,
    ) -> None:
        self._alike = alike
        self._forms = set[Hashable]()  # of the batches of steps that were looked at
        self.loss, self.layout, self.data, self.determinism = loss, layout, data, determinism
        self.usage = usage or Usage(layout.names)
        self.fingerprints = Fingerprints(steps, layout.device)
        self.first: Any = None
        self._batch_wanted = tuple(t.requires_grad for t in data.tensors)
        self._hyper_wanted = tuple(t.requires_grad for t in data.hypers)
        self._looks, self._next_look = looked_at(steps), 0
        self._open_looks: OpenLooks = []
        self._strangers, self._unseen = Strangers(self.usage.taken), 0
        self.originals = originals or Originals(loss, {}, data.hypers, determinism.modules, steps)

    def linearize(self, k: int, theta: Tensor) -> EagerLinearization:
        """Evaluate the loss and its gradient.

        Args:
            k: the step, from 0.
            theta: the parameters at that step, [numel].

        Returns:
            Both, with the graph of this one evaluation.

        Raises:
            TypeError, ValueError: at a step's first evaluation, where the loss is not a scalar that depends on params,
                or uses a tensor that requires grad and was not passed to the unroll.
            UnsupportedError: the loss uses an operator that has no second derivatives or does not repeat itself, or
                a parameter at some steps only, or changes its parameters or a module's frozen ones.
            UnusedParametersError: on the first call, see `Usage`.
        """
        return self._begun(theta) or self._linearize(k, theta, self._batch(k))

    def _begun(self, theta: Tensor) -> EagerLinearization | None:
        """The first step's evaluation, where it was made before; then once."""
        first, self.first = self.first, None
        return first if first is not None and torch.equal(first.leaf, theta) else None

    def bare(
        self, k: int, leaf: Tensor, batch: Any, batch_leaves: tuple[Tensor, ...], hyper_leaves: tuple[Tensor, ...]
    ) -> EagerLinearization:
        """What `linearize` gives, without its checks, for a step like others that had them; inside `Determinism.step`.

        Args:
            k: the step.
            leaf: theta [numel], requiring grad.
            batch: for the loss.
            batch_leaves: what of it is differentiated, () where a function gave it.
            hyper_leaves: in the place of hyper's tensors.
        """
        parts, views = self.layout.parts_and_views(leaf)
        value = self.loss(views, *self.data.arguments(batch, hyper_leaves))
        gradient = self.usage.gradient(k, value, parts)
        return EagerLinearization(
            value.detach(), leaf, batch_leaves, hyper_leaves, gradient, self.determinism, k, None, self.data.gives_views
        )

    def leaves_of(self, tensors: Sequence[Tensor], hypers: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        """New leaves over a batch's tensors and over those of hyper, which require grad where the unroll's do."""
        wanted = self._batch_wanted if tensors else ()
        return _leaves(tuple(tensors), wanted), _leaves(tuple(hypers), self._hyper_wanted)

    def look_at_all(self) -> None:
        """From now on no step is taken to be like those before it."""
        self._alike, self._unseen = False, 0

    def flush(self) -> None:
        """All steps have been evaluated: the checks that are still open. Raises: UnsupportedError."""
        settle(self._open_looks)

    def _batch(self, k: int) -> Any:
        """Step k's batch, detached where no function gives it."""
        if self.data.function is None:
            return self.data.rows(k)
        with self.determinism.outside():
            batch = self.data.from_function(k)
        return self.data.aligned(batch) if self._alike else batch

    def _linearize(self, k: int, theta: Tensor, batch: Any) -> EagerLinearization:
        leaf = theta.detach().requires_grad_()
        if self._alike and self._is_like_others(k, batch):
            return self._as_before(k, leaf, batch)
        batch_leaves: tuple[Tensor, ...] = ()
        given = None if self.data.function is None else batch
        if self.data.function is None:
            batch = batch_leaves = _leaves(batch, self._batch_wanted)
        hyper_leaves = _leaves(self.data.hypers, self._hyper_wanted)
        with self.determinism.step(k):
            parts, views = self.layout.parts_and_views(leaf)
            untouched = self._look(k, leaf, views)
            evaluate = partial(self.loss, views, *self.data.arguments(batch, hyper_leaves))
            value = self._evaluated(k, evaluate, batch)
            if leaf.grad is not None or any(t.grad is not None for t in (*batch_leaves, *hyper_leaves)):
                raise UnsupportedError(BACKWARD_INSIDE)
            if untouched is not None:
                untouched.check(self._open_looks)
            if k >= self._unseen:
                self._unseen = k + 1
                check_loss(value)
                again = partial(self._again, k, leaf, batch, hyper_leaves)
                self._strangers.check(k, value, leaf, parts[0].grad_fn, (*batch_leaves, *hyper_leaves), again)
                check = self.determinism.modules.check_exchanges
                if check is not None:
                    check(value, leaf, batch_leaves, hyper_leaves)
            gradient = self.usage.gradient(k, value, parts)
        found = EagerLinearization(
            value.detach(),
            leaf,
            batch_leaves,
            hyper_leaves,
            gradient,
            self.determinism,
            k,
            given,
            self.data.gives_views,
        )
        if self.usage.to_spare:
            raise UnusedParametersError(self.usage.unused, found)
        return found

    def _is_like_others(self, k: int, batch: Any) -> bool:
        """Whether a step is taken to be like others before it, which had a batch of its form."""
        form = form_of(batch)
        known = form in self._forms and all(isinstance(leaf, (Tensor, *PLAIN)) for _, leaf in leaves(batch, ""))
        self._forms.add(form)
        looked_at = k in self._looks or k == self.originals.next or k in self.determinism.modules.uncompiled
        return known and k >= FIRST_ALIKE and not looked_at

    def _as_before(self, k: int, leaf: Tensor, batch: Any) -> EagerLinearization:
        """Without looking whether the step is like those before it."""
        if self.data.function is None:
            batch, hyper_leaves = self.leaves_of(batch, self.data.hypers)
            batch_leaves = batch
        else:
            batch_leaves, hyper_leaves = self.leaves_of((), self.data.hypers)
        with self.determinism.step(k):
            found = self.bare(k, leaf, batch, batch_leaves, hyper_leaves)
        if self.data.function is not None:
            found.batch = batch
        return found

    def _evaluated(self, k: int, evaluate: Callable[[], Tensor], batch: Any) -> Tensor:
        if k == self.originals.next:
            return self.originals.watch(k, evaluate, batch)
        if k in self.determinism.modules.uncompiled:
            with uncompiled():
                return evaluate()
        return evaluate()

    def _look(self, k: int, leaf: Tensor, views: dict[str, Tensor]) -> Untouched | None:
        """At the first evaluation of some steps."""
        if k < self._next_look or k not in self._looks:
            return None
        self._next_look = k + 1
        return Untouched(leaf, views, self.determinism.modules)

    def _again(self, k: int, leaf: Tensor, batch: Any, hyper_leaves: tuple[Tensor, ...]) -> Tensor:
        """The loss once more, with the same random numbers."""
        with self.determinism.step(k):
            return self.loss(self.layout.views(leaf), *self.data.arguments(batch, hyper_leaves))


def check_loss(value: object) -> None:
    """Check what a loss returned.

    Args:
        value: the loss.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it is not a scalar of floating point.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a scalar tensor, got {type(value).__name__}")
    if value.ndim or not value.is_floating_point():
        raise ValueError(
            f"loss must return a scalar floating-point tensor, got shape {list(value.shape)}, {value.dtype}"
        )


def check_arity(loss: Loss, has_hyper: bool) -> None:
    """Check that a loss takes the arguments that an unroll gives it.

    Args:
        loss: to be called as loss(params, batch) or loss(params, batch, hyper).
        has_hyper: whether it is given hyper.

    Raises:
        TypeError: it is not callable, or not with these arguments.
    """
    if has_hyper and callable(loss):
        check_callable("loss", loss, "loss(params, batch, hyper), because hyper= is given", 3)
    else:
        check_callable("loss", loss, "loss(params, batch)", 2)


def _leaves(tensors: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """New leaves over the same memory: what the loss does to the tensors themselves must not reach the next call."""
    found = tuple(t.detach() for t in tensors)
    for leaf, want in zip(found, wanted, strict=True):
        if want:
            leaf.requires_grad_()
    return found
