"""What the loss takes beside the parameters: the batches of an unroll, and its hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

Loss = Callable[..., Tensor]
Batches = Sequence[Tensor] | Callable[[int], Any]
Hyper = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None


class Data:
    """The batches and hyperparameters of one unroll.

    Args:
        batches: a table, which is a tuple of tensors [s, ...] whose row k % s is step k's batch; or a function k ->
            batch.
        hyper: a tensor, a tuple or dict of tensors, or None.
        taken: steps that the training has behind it: steps count from 0 here, and batches from there.

    Attributes:
        function: the function that gives the batches, None for a table.
        tensors: the table's tensors, () for a function. Gradients flow to those that require grad.
        hypers: the tensors of `hyper` in order, () for None. Gradients flow to those that require grad.
    """

    def __init__(self, batches: Batches, hyper: Hyper, taken: int = 0) -> None:
        self._taken = taken
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
        return (k + self._taken) % len(self.tensors[0])

    def rows(self, k: int) -> tuple[Tensor, ...]:
        """Step k's batch of the table, detached; () where a function gives the batches."""
        k += self._taken
        return tuple(rows[k % len(rows)] for rows in self._rows)

    def from_function(self, k: int) -> Any:
        """Step k's batch, where a function gives the batches.

        Args:
            k: the step, from 0.

        Returns:
            What the function returns.

        Raises:
            ValueError: a tensor of the batch requires grad.
        """
        assert self.function is not None
        k += self._taken
        batch = self.function(k)
        wanting = [t for t in (batch if isinstance(batch, (tuple, list)) else [batch]) if _requires_grad(t)]
        if wanting:
            raise ValueError(
                f"batches({k}) returned a tensor of shape {list(wanting[0].shape)} that requires grad, but batches "
                "given as a function are not differentiated; pass a tuple of tensors as batches, or pass the tensor in "
                "hyper="
            )
        return batch

    def pack_hyper(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The loss's arguments after the batch.

        Args:
            tensors: stand for `hypers`, in the same order.

        Returns:
            () without hyper; otherwise one entry: `tensors` in the form in which hyper was given.
        """
        if self.hyper_kind is type(None):
            return ()
        if self.hyper_names is not None:
            return (dict(zip(self.hyper_names, tensors, strict=True)),)
        return (tensors[0],) if issubclass(self.hyper_kind, Tensor) else (tuple(tensors),)


def _requires_grad(t: object) -> bool:
    return isinstance(t, Tensor) and t.requires_grad
