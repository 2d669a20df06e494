"""What the loss takes beside the parameters: the batches of an unroll, and its hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from revdistill.engine.loss.batches import function_of, is_table
from revdistill.engine.loss.tree import Structure, check_form, contents, leaves, rebuild, structure_of

Loss = Callable[..., Tensor]
Batches = Sequence[Any] | Mapping[str, Tensor] | DataLoader[Any] | Callable[[int], Any]
Hyper = Tensor | Sequence[Any] | Mapping[Any, Any] | None


@dataclass(frozen=True)
class Form:
    """What is left of batches and hyper without their tensors: no memory is held by it.

    Attributes:
        is_table: whether batches are a table.
        batch: of the table, its names for one; None where its rows are plain tuples.
        hyper: of hyper; None for None.
    """

    is_table: bool
    batch: Structure | None
    hyper: Structure | None

    def arguments(self, batch: Any, hypers: Sequence[Tensor]) -> tuple[Any, ...]:
        """The loss's arguments after the parameters.

        Args:
            batch: tensors that stand for a row of the table, in its order; or what the function returned.
            hypers: stand for the tensors of hyper, in the same order.

        Returns:
            The batch, in the form of the table; and with hyper, `hypers` in the form in which it was given.
        """
        if self.batch is not None:
            batch = rebuild(self.batch, batch)
        return (batch,) if self.hyper is None else (batch, rebuild(self.hyper, hypers))


class Data:
    """The batches and hyperparameters of one unroll.

    Args:
        batches: a table, which is a tuple or dict of tensors [s, ...] whose row k % s is step k's batch; or a function
            k -> batch, a list of batches or a DataLoader without shuffling.
        hyper: a tensor, nested tuples, lists and dicts of tensors, or None; the loss gets it in its own types.
        taken: steps that the training has behind it: steps count from 0 here, and batches from there.

    Raises:
        TypeError: a dict, tuple or list of a type of its own cannot be put together with other tensors.

    Attributes:
        function: the function that gives the batches, None for a table.
        tensors: the table's tensors, () for a function. Gradients flow to those that require grad.
        hypers: the tensors of `hyper` in order, () for None. Gradients flow to those that require grad.
        form: what is left of both without their tensors.
    """

    def __init__(self, batches: Batches, hyper: Hyper, taken: int = 0) -> None:
        self._taken = taken
        self.function: Callable[[int], Any] | None = None
        self.tensors: tuple[Tensor, ...] = ()
        batch_structure: Structure | None = None
        if is_table(batches):
            self.tensors = tuple(t for _, t in leaves(batches, "batches"))
            if type(batches) not in (tuple, list):
                check_form(batches, "batches")
                batch_structure = structure_of(batches)
        else:
            self.function = function_of(batches)
        self._rows = [t.detach().unbind(0) for t in self.tensors]
        check_form(hyper, "hyper")
        hyper_structure = None if hyper is None else structure_of(hyper)
        self.form = Form(self.function is None, batch_structure, hyper_structure)
        self.hypers: tuple[Tensor, ...] = () if hyper is None else tuple(t for _, t in leaves(hyper, "hyper"))

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
            ValueError: a tensor of the batch requires grad, or the function has no batch for this step.
        """
        assert self.function is not None
        k += self._taken
        try:
            batch = self.function(k)
        except StopIteration as error:
            raise ValueError(
                f"batches({k}) raised StopIteration: the iterator behind it is used up. batches must be a function of "
                "k, which gives the same batch each time it is asked for step k; list the batches first and give the "
                "list: batches=list(...)"
            ) from error
        for path, t in contents(batch, f"batches({k})"):
            if isinstance(t, Tensor) and t.requires_grad:
                raise ValueError(
                    f"batches({k}) returned a tensor of shape {list(t.shape)} that requires grad (at {path}), but "
                    "batches given as a function or a list of batches are not differentiated; pass a tuple of tensors "
                    "[s, ...] as batches, or pass the tensor in hyper="
                )
        return batch

    def arguments(self, batch: Any, hypers: Sequence[Tensor]) -> tuple[Any, ...]:
        """See `Form.arguments`."""
        return self.form.arguments(batch, hypers)
