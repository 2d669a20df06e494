"""What a loss must leave as it is: the parameters that it is given, and frozen ones of the modules that it calls.

torch does not count what is written through `.data` or numpy, and a loss that does so trains otherwise than it says:
the step is made from the parameters as they were. To compare costs a pass over the parameters, so it is done at some
steps: the first two, those whose number is a power of two (a clamp may set in late), and the last.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.evaluation import Modules, evaluating
from revdistill.engine.loss.operators import CHANGED_IN_PLACE

# Of each look the parameters' names, and on the device whether each was written to.
OpenLooks = list[tuple[list[str], Tensor]]


def looked_at(steps: int) -> frozenset[int]:
    """The steps of an unroll of so many steps that are compared."""
    powers = (1 << i for i in range(steps.bit_length()))
    return frozenset({0, steps - 1, *powers})


class Untouched:
    """One evaluation of a loss, to be made before it.

    Args:
        leaf: the parameters [numel].
        views: of them, which the loss is given.
        modules: those that the loss calls.
    """

    def __init__(self, leaf: Tensor, views: Mapping[str, Tensor], modules: Modules) -> None:
        self._leaf, self._views, self._modules = leaf.detach(), dict(views), modules
        self._before = self._leaf.clone()
        self._pointers = [view.data_ptr() for view in views.values()]
        modules.watch()

    def check(self, open_looks: OpenLooks) -> None:
        """The loss has been evaluated.

        Args:
            open_looks: takes what is to be read later, where to read it now would be to wait for a device.

        Raises:
            UnsupportedError: it changed its parameters, or a module's frozen ones.
        """
        moved = [
            n for (n, view), old in zip(self._views.items(), self._pointers, strict=True) if view.data_ptr() != old
        ]
        if moved:
            raise UnsupportedError(CHANGED_IN_PLACE.format(f"params[{moved[0]!r}]"))
        sizes = [view.numel() for view in self._views.values()]
        written = torch.stack([part.any() for part in torch.split(self._leaf != self._before, sizes)])
        open_looks.append((list(self._views), written))
        if written.device.type == "cpu":
            settle(open_looks)
        _refuse(self._modules.changed_frozen())


def settle(open_looks: OpenLooks) -> None:
    """Read what was left open, in one wait for the device.

    Args:
        open_looks: is empty afterwards.

    Raises:
        UnsupportedError: a loss changed its parameters.
    """
    looks = list(open_looks)
    open_looks.clear()
    found = torch.cat([written for _, written in looks]).tolist() if looks else []
    names = [name for names, _ in looks for name in names]
    changed = [name for name, written in zip(names, found, strict=True) if written]
    if changed:
        raise UnsupportedError(CHANGED_IN_PLACE.format(f"params[{changed[0]!r}]"))


def check_stacked(
    params: Mapping[str, Tensor],
    parts: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    copies: Mapping[str, Tensor],
) -> None:
    """Check what networks side by side were given, where an evaluation is compared.

    Args:
        params: of all networks.
        parts: what stood for them in the module, over the same memory.
        frozen: parameters that are not trained.
        copies: what stood for them in the module.

    Raises:
        UnsupportedError: the module changed one of them.
    """
    unroll = None if torch.compiler.is_compiling() else evaluating()
    if unroll is None or not unroll.watching:
        return
    for name, part in parts.items():
        if part is not params[name] and part.data_ptr() != params[name].data_ptr():
            raise UnsupportedError(CHANGED_IN_PLACE.format(f"params[{name!r}]"))
    _refuse([name for name, t in frozen.items() if not torch.equal(copies[name].reshape(t.shape), t)])


def _refuse(names: list[str]) -> None:
    if names:
        raise UnsupportedError(
            f"the module changes its frozen {'parameters' if len(names) > 1 else 'parameter'} "
            f"{', '.join(map(repr, names[:3]))} in forward, as a mean teacher or a momentum encoder does: a step would "
            "depend on the one before beside params, which an unroll does not carry on. Compute it within the loss "
            "from params, or pass it in hyper=, or call .eval() where that stops the change"
        )
