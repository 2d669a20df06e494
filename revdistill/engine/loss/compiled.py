"""torch.compile for the gradient and the product: compared with eager on first use, dropped where it differs.

The compiled gradient serves both directions, so exactness does not rest on its agreeing with eager autograd to the bit;
its values are compared because a compiled function can be silently wrong (torch 2.13: the gradient of a LeNet, 55 %
off). The compiled product computes a gradient of its own, which feeds the reversal at the steps where its fingerprint
is that of the forward pass; at the others the gradient is evaluated by the forward pass's own function. So it always is
on other devices than the CPU, where to compare would be to wait for the device at each step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.compiling import compiling, warn
from revdistill.engine.layout import Layout
from revdistill.engine.loss.data import Data, Loss
from revdistill.engine.loss.determinism import Determinism
from revdistill.engine.loss.gradient import Gradient, Linearization, Products
from revdistill.engine.loss.operators import named_errors

# Normwise relative difference that reordered sums explain; a wrong kernel is off by far more.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}


@dataclass
class _Functions:
    """The compiled functions of one loss; they outlive an unroll, so that an outer loop compiles once."""

    gradient: Callable[..., tuple[Tensor, Tensor]] | None
    product: Callable[..., tuple[Tensor, tuple[Tensor, ...]]] | None
    gradient_checked: bool = False
    product_checked: bool = False


_functions: weakref.WeakKeyDictionary[Loss, dict[Any, _Functions]] = weakref.WeakKeyDictionary()


class CompiledGradient(Gradient):
    """Gradient, with both functions compiled where that works."""

    def __init__(self, loss: Loss, layout: Layout, data: Data, determinism: Determinism, steps: int) -> None:
        super().__init__(loss, layout, data, determinism, steps)
        self.wanted = tuple(t.requires_grad for t in (*data.tensors, *data.hypers))
        self._hypers = [t.detach() for t in data.hypers]
        key = (layout, self.wanted, data.hyper_names, data.hyper_kind, data.function is None)
        self.functions = _functions.setdefault(loss, {}).setdefault(key, _Functions(*self._compile()))

    def _compile(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        layout, wanted, batches = self.layout, self.wanted, len(self.data.tensors)
        pack_hyper, from_table = self.data.pack_hyper, self.data.function is None
        loss_of = weakref.ref(self.loss)  # the cache must not keep its own key alive

        def value(theta: Tensor, extra: tuple[Tensor, ...], batch: Any) -> Tensor:
            loss = loss_of()
            assert loss is not None
            hyper = pack_hyper(extra[batches:])
            return loss(layout.views(theta), extra[:batches] if from_table else batch, *hyper)

        def gradient(theta: Tensor, extra: tuple[Tensor, ...], batch: Any) -> tuple[Tensor, Tensor]:
            found, loss = torch.func.grad_and_value(value)(theta, extra, batch)
            return found, loss

        def product(
            theta: Tensor, extra: tuple[Tensor, ...], batch: Any, vector: Tensor
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            def at(theta: Tensor, *differentiated: Tensor) -> Tensor:
                rest = iter(differentiated)
                merged = tuple(next(rest) if want else t for t, want in zip(extra, wanted, strict=True))
                found: Tensor = torch.func.grad(value)(theta, merged, batch)
                return found

            found, vjp, *_ = torch.func.vjp(at, theta, *(t for t, want in zip(extra, wanted, strict=True) if want))
            return found, vjp(vector)

        return torch.compile(gradient), torch.compile(product)

    def linearize(self, k: int, theta: Tensor) -> Linearization:  # type: ignore[override]
        functions = self.functions
        if functions.gradient is None:
            return super().linearize(k, theta)
        extra = (*self.data.rows(k), *self._hypers)
        batch = self._from_function(k) if self.data.function is not None else None
        if not self._checked:  # the checks of eager: scalar loss, tensors that reach it by closure
            eager = super().linearize(k, theta)
            if not functions.gradient_checked:
                functions.gradient_checked = True
                if not self._gradient_agrees(k, theta, extra, batch, eager.gradient):
                    functions.gradient = None
                    return eager
        return CompiledLinearization(self, k, theta.detach(), extra, batch)

    def _gradient_agrees(self, k: int, theta: Tensor, extra: tuple[Tensor, ...], batch: Any, eager: Tensor) -> bool:
        assert self.functions.gradient is not None
        try:
            with self.determinism.step(k), compiling():
                found, _ = self.functions.gradient(theta.detach(), extra, batch)
        except Exception as error:  # whatever the compiler raises, eager is right
            warn("the gradient could not be compiled", error)
            return False
        return _agrees("gradient", found, eager)

    def eager_product(self, k: int, theta: Tensor, vector: Tensor) -> Products:
        return super().linearize(k, theta).product(vector)


class CompiledLinearization:
    """The loss and its gradient at one theta and step, evaluated when first asked for."""

    def __init__(self, owner: CompiledGradient, k: int, theta: Tensor, extra: tuple[Tensor, ...], batch: Any) -> None:
        self._owner, self._k, self._theta, self._extra, self._batch = owner, k, theta, extra, batch
        self._from_product: Tensor | None = None

    @cached_property
    def _gradient_and_loss(self) -> tuple[Tensor, Tensor]:
        function = self._owner.functions.gradient
        assert function is not None
        with self._owner.determinism.step(self._k), named_errors():
            found, loss = function(self._theta, self._extra, self._batch)
        return found.detach(), loss.detach()

    @property
    def loss(self) -> Tensor:
        return self._gradient_and_loss[1]

    @property
    def gradient(self) -> Tensor:
        # The product computes a gradient too, mostly of the same bits (torch 2.13, an MLP: 99 steps of 100).
        if self._from_product is not None and self._owner.fingerprints.matches(self._k, self._from_product):
            return self._from_product
        return self._gradient_and_loss[0]

    @property
    def nbytes(self) -> int:
        return 0

    def product(self, vector: Tensor) -> Products:
        functions = self._owner.functions
        if functions.product is None:
            return self._owner.eager_product(self._k, self._theta, vector)
        if not functions.product_checked:
            functions.product_checked = True
            eager = self._owner.eager_product(self._k, self._theta, vector)
            if not self._product_agrees(vector, eager):
                functions.product = None
                return eager
        return self._compiled_product(vector)

    def _compiled_product(self, vector: Tensor) -> Products:
        function, wanted = self._owner.functions.product, self._owner.wanted
        assert function is not None
        with self._owner.determinism.step(self._k):
            found, products = function(self._theta, self._extra, self._batch, vector.detach())
        if found.device.type == "cpu":
            self._from_product = found.detach()
        rest = iter(products[1:])
        extra = tuple(next(rest) if want else None for want in wanted)
        split = len(self._owner.data.tensors)
        return Products(products[0], extra[:split], extra[split:])

    def _product_agrees(self, vector: Tensor, eager: Products) -> bool:
        try:
            with compiling():
                found = self._compiled_product(vector)
        except Exception as error:  # whatever the compiler raises, eager is right
            warn("the Hessian product could not be compiled", error)
            return False
        pairs = zip((found.theta, *found.batch, *found.hyper), (eager.theta, *eager.batch, *eager.hyper), strict=True)
        for a, b in pairs:
            if a is not None and not _agrees("Hessian product", a, torch.zeros_like(a) if b is None else b):
                return False
        return True


def _agrees(what: str, compiled: Tensor, eager: Tensor) -> bool:
    difference = float(torch.linalg.vector_norm(compiled - eager))
    scale = float(torch.linalg.vector_norm(eager))
    if difference <= _TOLERANCE[eager.dtype] * max(scale, torch.finfo(eager.dtype).tiny):
        return True
    warn(f"the compiled {what} differs from eager by {difference / max(scale, 1e-300):.1e} of its norm")
    return False
