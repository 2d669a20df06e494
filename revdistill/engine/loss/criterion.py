"""The criterion of a loss: a function, or a module, whose parameters are trained with the network's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.modules import check_module, is_compiled
from revdistill.engine.loss.operators import COMPILED
from revdistill.engine.loss.substitution import Substitution

_PREFIX = "criterion."


class Criterion:
    """criterion(output, target), evaluated with other tensors in the place of its own.

    Args:
        criterion: a function, or a module.
        net: the network that it judges. A parameter that both have is the network's.

    Attributes:
        params: its parameters that require grad, "criterion." and their name in it -> the very tensor.
        all_modules: itself and those in it, where it is a module that holds tensors; otherwise nothing.

    Raises:
        TypeError: it cannot be called, or is a class.
        ValueError: a name of its own is one of the network's too.
        UnsupportedError: torch.compile made it, or see `check_module`.
    """

    def __init__(self, criterion: Callable[..., Tensor], net: nn.Module) -> None:
        if not callable(criterion):
            raise TypeError(f"criterion must be callable as criterion(output, target), got {type(criterion).__name__}")
        if isinstance(criterion, type):
            raise TypeError(
                f"criterion must be callable as criterion(output, target), got the class {criterion.__name__}; give "
                f"one of it: {criterion.__name__}()"
            )
        if is_compiled(criterion):
            raise UnsupportedError(COMPILED.format("criterion is a function that"))
        self._criterion = criterion
        self.params: dict[str, Tensor] = {}
        self.all_modules: list[nn.Module] = []
        self._buffer_names: set[str] = set()
        self._names: dict[str, str] = {}  # the criterion's own -> that of params, buffers, or the network's params
        self._call: Substitution | None = None
        if not isinstance(criterion, nn.Module):
            return
        check_module(criterion, "criterion")
        of_net = {id(p): name for name, p in net.named_parameters()}
        for name, p in criterion.named_parameters():
            if p.requires_grad:
                self._names[name] = of_net.get(id(p), _PREFIX + name)
                if id(p) not in of_net:
                    self.params[_PREFIX + name] = p
        for name, _ in criterion.named_buffers():
            self._names[name] = _PREFIX + name
            self._buffer_names.add(_PREFIX + name)
        if self._names:
            self.all_modules, self._call = list(criterion.modules()), Substitution(criterion)
        taken = {name for name, _ in (*net.named_parameters(), *net.named_buffers())}
        for name in (*self.params, *self.buffers()):
            if name in taken:
                raise ValueError(
                    f"net has an entry {name!r}, which the criterion's of that name would hide; rename net's module "
                    "'criterion'"
                )

    def buffers(self) -> dict[str, Tensor]:
        """The criterion's, as they are now: "criterion." and their name in it -> the very tensor."""
        if self._call is None or not isinstance(self._criterion, nn.Module):
            return {}
        return {_PREFIX + name: b for name, b in self._criterion.named_buffers()}

    @property
    def rebound(self) -> set[str]:
        """The names in whose places the last call left other tensors."""
        return set() if self._call is None else {self._names[name] for name in self._call.rebound}

    def without_own(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`tensors` but for the criterion's own."""
        if not self.params and not self._buffer_names:
            return tensors
        return {name: t for name, t in tensors.items() if name not in self.params and name not in self._buffer_names}

    def __call__(self, output: Any, target: Any, params: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> Tensor:
        """The loss.

        Args:
            output: of the network.
            target: of the batch.
            params: of the unroll, among them the criterion's.
            fresh: copies of buffers, among them the criterion's.
        """
        if self._call is None:
            return self._criterion(output, target)
        given = {**params, **fresh}
        tensors = {own: given[name] for own, name in self._names.items() if name in given}
        buffers = {own: fresh[name] for own, name in self._names.items() if name in self._buffer_names}
        value: Tensor = self._call(tensors, (output, target), buffers=buffers)
        return value
