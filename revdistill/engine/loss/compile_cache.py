"""The compiled functions of losses: kept for as long as the loss lives, so that an outer loop compiles once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from revdistill.engine.loss.data import Loss

CompiledFunction = Callable[..., tuple[Tensor, Tensor]]
CompiledProduct = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


@dataclass
class Compiled:
    """The compiled functions of one loss, None where eager is right or faster.

    Attributes:
        gradient: of theta and data, the gradient and the loss.
        product: of theta, data and a vector, the gradient and the products.
        gradient_checked: whether its values were compared with eager's.
        product_checked: likewise.
        gradient_times: of the compiled and the eager gradient, in seconds.
    """

    gradient: CompiledFunction | None
    product: CompiledProduct | None
    gradient_checked: bool = False
    product_checked: bool = False
    gradient_times: tuple[float, float] = (0.0, 0.0)

    def drop_product(self) -> None:
        """Without it a compiled gradient is evaluated twice per step and the eager one besides, for the product.

        Where that takes longer than the eager one alone, the unrolls to come are eager.
        """
        self.product = None
        compiled, eager = self.gradient_times
        if 2 * compiled > eager:
            self.gradient = None


@dataclass
class _OfLoss:
    loss: weakref.ref[Loss]
    kept: dict[Any, Compiled] = field(default_factory=dict)


_of: weakref.WeakKeyDictionary[Loss, _OfLoss] = weakref.WeakKeyDictionary()


def compiled_of(
    loss: Loss, key: Any, make: Callable[[Callable[[], Loss | None]], tuple[CompiledFunction, CompiledProduct]]
) -> Compiled:
    """The functions of this very loss: bound methods are equal, and each dies by itself.

    Args:
        loss: whose they are.
        key: what else they depend on.
        make: makes them, given what gives the loss. They must keep neither the loss nor data alive.

    Returns:
        Those of before, or new ones.
    """
    try:
        reference = weakref.ref(loss)
    except TypeError:  # of what is not referred to weakly nothing can be kept
        return Compiled(*make(lambda: loss))
    known = _of.get(loss)
    if known is None or known.loss() is not loss:
        _of.pop(loss, None)
        known = _of[loss] = _OfLoss(reference)
    if key not in known.kept:
        known.kept[key] = Compiled(*make(reference))
    return known.kept[key]
