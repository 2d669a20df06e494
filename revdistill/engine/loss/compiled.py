"""torch.compile for the gradient and the product: compared with eager on first use, kept where right and faster.

The compiled gradient serves both directions, so exactness does not rest on its agreeing with eager autograd to the bit;
its values are compared because a compiled function can be silently wrong (torch 2.13: the gradient of a LeNet, 55 %
off). The compiled product computes a gradient of its own, which feeds the reversal at the steps where its fingerprint
is that of the forward pass; at the others the gradient is evaluated by the forward pass's own function. So it always is
on other devices than the CPU, where to compare would be to wait for the device at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.compiling import compiling, warn
from revdistill.engine.cotangents import Batching
from revdistill.engine.errors import UnsupportedError
from revdistill.engine.layout import Layout
from revdistill.engine.loss.compile_cache import CompiledFunction, CompiledProduct, compiled_of
from revdistill.engine.loss.data import Data, Loss
from revdistill.engine.loss.determinism import Determinism
from revdistill.engine.loss.gradient import Gradient
from revdistill.engine.loss.linearization import EagerLinearization, Linearization, Products
from revdistill.engine.loss.originals import Originals
from revdistill.engine.loss.timing import best_times
from revdistill.engine.loss.usage import Usage, Zeros

# Normwise relative difference that reordered sums explain; a wrong kernel is off by far more.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}


class CompiledGradient(Gradient):
    """`Gradient`, with both functions compiled where that works and is faster.

    One unroll has one gradient function in both directions, chosen at its first step: a form that is dropped later, in
    this unroll or in another, is dropped for the unrolls to come.
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
    ) -> None:
        super().__init__(loss, layout, data, determinism, steps, usage, originals)
        self.wanted = (*self._batch_wanted, *self._hyper_wanted)
        self._hypers = tuple(t.detach() for t in data.hypers)
        self.functions = compiled_of(loss, (layout, self.wanted, data.form), self._compile)
        self.compiled: CompiledFunction | None = None
        self._chosen = self.functions.gradient is None
        self._zeros = Zeros(self.usage, layout)

    def _compile(self, loss_of: Callable[[], Loss | None]) -> tuple[CompiledFunction, CompiledProduct]:
        """loss_of: gives the loss. The cache must keep neither its own key nor data alive."""
        layout, wanted, batches = self.layout, self.wanted, len(self.data.tensors)
        form = self.data.form

        def value(theta: Tensor, extra: tuple[Tensor, ...], batch: Any) -> Tensor:
            loss = loss_of()
            assert loss is not None
            return loss(
                layout.views(theta), *form.arguments(extra[:batches] if form.is_table else batch, extra[batches:])
            )

        def gradient(theta: Tensor, extra: tuple[Tensor, ...], batch: Any) -> tuple[Tensor, Tensor]:
            found, loss = torch.func.grad_and_value(value)(theta, extra, batch)
            return found, loss

        def product(
            theta: Tensor, extra: tuple[Tensor, ...], batch: Any, vector: Tensor
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            def gradient_of(theta: Tensor, *differentiated: Tensor) -> Tensor:
                rest = iter(differentiated)
                merged = tuple(next(rest) if want else t for t, want in zip(extra, wanted, strict=True))
                found: Tensor = torch.func.grad(value)(theta, merged, batch)
                return found

            differentiated = (t for t, want in zip(extra, wanted, strict=True) if want)
            found, vjp, *_ = torch.func.vjp(gradient_of, theta, *differentiated)
            return found, vjp(vector)

        return torch.compile(gradient), torch.compile(product)

    def linearize(self, k: int, theta: Tensor) -> Linearization:  # type: ignore[override]
        """See `Gradient.linearize`."""
        first = self._begun(theta)
        if first is not None and self._chosen and self.compiled is None:
            return first
        batch = self._batch(k)
        if not self._chosen:
            eager = self._choose(k, theta, batch)
            if self.compiled is None:
                return eager
        if self.compiled is None:
            return self._linearize(k, theta, batch)
        form = CompiledLinearization(self, self.compiled, k, theta.detach(), batch)
        if self._zeros.are_new(k) and self._zeros.look(k, form.gradient, wait=self.fingerprints.immediate):
            self._linearize(k, theta, batch)  # eager knows a missing gradient from one that is 0
        return form

    def flush(self) -> None:
        """See `Gradient.flush`."""
        super().flush()
        self._zeros.flush()

    def _choose(self, k: int, theta: Tensor, batch: Any) -> EagerLinearization:
        """Choose the gradient function of this unroll; on the loss's first use by comparing both.

        Returns:
            The eager evaluation. Its checks come in any case: a scalar loss, no tensors that reach it by closure.
        """
        found = self._linearize(k, theta, batch)
        eager, functions = found.gradient, self.functions
        counts = self.determinism.modules.changed_numbers()
        if functions.gradient is not None and counts:
            # To compare and to time both forms is to call the loss many times more.
            warn(f"the module changes {counts[0]} when it is called")
            functions.gradient = None
        if functions.gradient is not None and self.determinism.modules.check_exchanges is not None:
            # How often both forms are timed is each rank's own, and so would be the number of its exchanges.
            warn("the loss exchanges tensors by rd.distributed")
            functions.gradient = None
        if functions.gradient is not None and not functions.gradient_checked:
            functions.gradient_checked = True
            form = CompiledLinearization(self, functions.gradient, k, theta.detach(), batch)
            if not _gradient_agrees(form, eager, lambda: self._linearize(k, theta, batch).gradient):
                functions.gradient = None
            else:
                functions.gradient_times = best_times(
                    lambda: form.evaluate()[0], lambda: self._linearize(k, theta, batch).gradient
                )
                if functions.gradient_times[0] > functions.gradient_times[1]:
                    functions.gradient = None
        self.compiled, self._chosen = functions.gradient, True
        return found

    def arguments(self, batch: Any) -> tuple[tuple[Tensor, ...], Any]:
        """What a compiled function takes beside theta: the tensors that may be differentiated, and another batch."""
        if self.data.function is None:
            return (*batch, *self._hypers), None
        return self._hypers, batch

    def eager(self, k: int, theta: Tensor, batch: Any) -> EagerLinearization:
        """The eager form of a linearization, evaluated anew."""
        return self._linearize(k, theta, batch)


class CompiledLinearization:
    """The loss and its gradient at one theta and step, evaluated when first asked for: a `Linearization`."""

    def __init__(self, owner: CompiledGradient, function: CompiledFunction, k: int, theta: Tensor, batch: Any) -> None:
        self._owner, self._function, self._k, self._theta, self._batch = owner, function, k, theta, batch
        self._arguments = owner.arguments(batch)
        self._from_product: Tensor | None = None

    own = None

    def evaluate(self) -> tuple[Tensor, Tensor]:
        """The gradient and the loss, detached."""
        with self._owner.determinism.step(self._k):
            found, loss = self._function(self._theta, *self._arguments)
        return found.detach(), loss.detach()

    @cached_property
    def _gradient_and_loss(self) -> tuple[Tensor, Tensor]:
        return self.evaluate()

    @property
    def loss(self) -> Tensor:
        """0-dim, detached."""
        return self._gradient_and_loss[1]

    @property
    def gradient(self) -> Tensor:
        """[numel], detached."""
        # The product computes a gradient too, mostly of the same bits (torch 2.13, an MLP: 99 steps of 100).
        if self._from_product is not None and self._owner.fingerprints.matches(self._k, self._from_product):
            return self._from_product
        return self._gradient_and_loss[0]

    @property
    def batch(self) -> Any:
        """See `Linearization.batch`."""
        return self._batch if self._owner.data.function is not None else None

    @property
    def nbytes(self) -> int:
        """0: no graph is held."""
        return 0

    def saved(self) -> Iterator[Tensor]:
        """None: no graph is held."""
        return iter(())

    def product(self, vector: Tensor) -> Products:
        """See `Linearization.product`."""
        functions = self._owner.functions
        if functions.product is None:
            return self._eager_product(vector)
        if not functions.product_checked:
            functions.product_checked = True
            eager = self._eager_product(vector)
            if not self._product_agrees(functions.product, vector, eager) or not self._product_is_faster(
                functions.product, vector
            ):
                functions.drop_product()
                self._from_product = None
                return eager
        return self._compiled_product(functions.product, vector)

    def products(self, vectors: Tensor, batching: Batching) -> Products:
        """See `Linearization.products`: by eager autograd, whose graph serves all vectors."""
        return self._eager.products(vectors, batching)

    @cached_property
    def _eager(self) -> EagerLinearization:
        return self._owner.eager(self._k, self._theta, self._batch)

    def _eager_product(self, vector: Tensor) -> Products:
        return self._owner.eager(self._k, self._theta, self._batch).product(vector)

    def _compiled_product(self, function: CompiledProduct, vector: Tensor) -> Products:
        wanted = self._owner.wanted
        with self._owner.determinism.step(self._k):
            found, products = function(self._theta, *self._arguments, vector.detach())
        if self._owner.fingerprints.immediate:
            self._from_product = found.detach()
        rest = iter(products[1:])
        extra = tuple(next(rest) if want else None for want in wanted)
        split = len(self._owner.data.tensors)
        return Products(products[0], extra[:split], extra[split:])

    def _product_agrees(self, function: CompiledProduct, vector: Tensor, eager: Products) -> bool:
        try:
            with compiling():
                found = self._compiled_product(function, vector)
        except Exception as error:  # whatever the compiler raises, eager is right
            warn("the Hessian product could not be compiled", error)
            return False
        pairs = zip((found.theta, *found.batch, *found.hyper), (eager.theta, *eager.batch, *eager.hyper), strict=True)
        for a, b in pairs:
            difference = 0.0 if a is None else _difference(a, torch.zeros_like(a) if b is None else b)
            if difference:
                warn(f"the compiled Hessian product differs from eager by {difference:.1e} of its norm")
                return False
        return True

    def _product_is_faster(self, function: CompiledProduct, vector: Tensor) -> bool:
        def first(products: Products) -> Tensor:
            return next((t for t in (products.theta, *products.batch, *products.hyper) if t is not None), vector)

        compiled, eager = best_times(
            lambda: first(self._compiled_product(function, vector)),
            lambda: first(self._eager_product(vector)),
        )
        return compiled <= eager


def _gradient_agrees(compiled: CompiledLinearization, eager: Tensor, again: Callable[[], Tensor]) -> bool:
    """again: evaluates the eager gradient once more, to tell a wrong kernel from a loss that does not repeat itself."""
    try:
        with compiling():
            found, _ = compiled.evaluate()
    except Exception as error:  # whatever the compiler raises, eager is right
        warn("the gradient could not be compiled", error)
        return False
    difference = _difference(found, eager)
    if not difference:
        return True
    if not torch.equal(again(), eager):
        raise UnsupportedError(
            "the loss does not repeat itself: evaluated twice at the same step, its gradient was another one. With "
            "compile=True it is evaluated more than once at the first step, to compare; use torch's random numbers "
            "only (the engine seeds those) and keep no state between calls, or compile=False"
        )
    warn(f"the compiled gradient differs from eager by {difference:.1e} of its norm")
    return False


def _difference(compiled: Tensor, eager: Tensor) -> float:
    """By how much they differ, of the norm of the second; 0 where that is rounding."""
    difference = float(torch.linalg.vector_norm(compiled - eager))
    scale = float(torch.linalg.vector_norm(eager))
    if difference <= _TOLERANCE[eager.dtype] * max(scale, torch.finfo(eager.dtype).tiny):
        return 0.0
    return difference / max(scale, 1e-300)
