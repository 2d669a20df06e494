"""What the loss takes beside the parameters: the batches of an unroll, and its hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from revdistill.engine.layout import order_of
from revdistill.engine.loss.batches import function_of, is_table
from revdistill.engine.loss.minibatches import Gathered, Indices, Minibatches
from revdistill.engine.loss.tree import Structure, check_form, contents, leaves, rebuild, structure_of

Loss = Callable[..., Tensor]
Batches = Sequence[Any] | Mapping[str, Tensor] | Minibatches | DataLoader[Any] | Callable[[int], Any]
Hyper = Tensor | Sequence[Any] | Mapping[Any, Any] | None


@dataclass(frozen=True)
class Form:
    """What is left of batches and hyper without their tensors: no memory is held by it.

    Attributes:
        is_table: whether batches are rows of tensors: of a table, or Minibatches.
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
            k -> batch, a list of batches or a DataLoader without shuffling; or Minibatches.
        hyper: a tensor, nested tuples, lists and dicts of tensors, or None; the loss gets it in its own types.
        taken: steps that the training has behind it: steps count from 0 here, and batches from there.

    Raises:
        TypeError: a dict, tuple or list of a type of its own cannot be put together with other tensors.

    Attributes:
        function: the function that gives the batches, None for a table and for Minibatches.
        tensors: the tensors of these, () for a function. Gradients flow to those that require grad.
        indices: the order of Minibatches, otherwise None.
        gives_views: whether a step's batch lies in the memory of `tensors`.
        hypers: the tensors of `hyper` in order, () for None. Gradients flow to those that require grad.
        form: what is left of both without their tensors.
    """

    def __init__(self, batches: Batches, hyper: Hyper, taken: int = 0) -> None:
        self._taken = taken
        self.function: Callable[[int], Any] | None = None
        self.tensors: tuple[Tensor, ...] = ()
        self.indices: Indices | None = None
        batch_structure: Structure | None = None
        table = batches.data if isinstance(batches, Minibatches) else batches
        if is_table(table):
            self.tensors = tuple(t for _, t in leaves(table, "batches"))
            if type(table) not in (tuple, list):
                check_form(table, "batches")
                batch_structure = structure_of(table)
        else:
            self.function = function_of(batches)
        if isinstance(batches, Minibatches):
            self.indices = Indices(batches, self.tensors[0].device)
        self.gives_views = bool(self.tensors) and self.indices is None
        self._batches = self.batches_of([t.detach() for t in self.tensors])
        check_form(hyper, "hyper")
        hyper_structure = None if hyper is None else structure_of(hyper)
        self.form = Form(self.function is None, batch_structure, hyper_structure)
        self.hypers: tuple[Tensor, ...] = () if hyper is None else tuple(t for _, t in leaves(hyper, "hyper"))

    def row(self, k: int) -> int:
        """The row of the table, or of the order, that step k uses."""
        return (k + self._taken) % len(self.tensors[0] if self.indices is None else self.indices)

    def rows(self, k: int) -> tuple[Tensor, ...]:
        """Step k's batch of tensors, detached; () where a function gives the batches."""
        found = self._batches.batch(self.row(k)) if self.tensors else ()
        return tuple(map(like_fresh, found))

    def aligned(self, batch: Any) -> Any:
        """A batch that a function gave, its tensors as `like_fresh` has them."""
        found = [leaf for _, leaf in leaves(batch, "")]
        copies = [like_fresh(leaf) if isinstance(leaf, Tensor) else leaf for leaf in found]
        if all(a is b for a, b in zip(found, copies, strict=True)):
            return batch
        try:
            check_form(batch, "batches")
        except TypeError:
            return batch  # no step with it is replayed
        return rebuild(structure_of(batch), copies)

    def batches_of(self, tensors: Sequence[Tensor]) -> _Views | Gathered:
        """The batches of tensors that stand for `tensors`, by the row."""
        return _Views(tensors) if self.indices is None else Gathered(self.indices, tensors)

    def add_to(self, bar: Tensor, k: int, product: Tensor, dim: int = 0) -> None:
        """Add dL/d(a tensor of step k's batch) to dL/d(the one of `tensors`).

        Args:
            bar: of the shape of the tensor, changed in place; with K cotangents [K, *shape].
            k: the step.
            product: of the shape of the tensor in the batch; with K cotangents [K, *shape].
            dim: where bar counts rows: 0, or 1 with K cotangents.
        """
        if self.indices is None:
            bar.select(dim, self.row(k)).add_(product)
        else:
            self.indices.add_to(bar, self.row(k), product, dim)

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


_ALIGNED = 512  # bytes: where memory that torch takes on CUDA begins


def like_fresh(t: Tensor) -> Tensor:
    """The tensor, or off the CPU, where it does not lie in memory as a new one would, a copy.

    Libraries choose their kernels, and so the last bits, by where numbers lie: a row of a table would have other bits
    than the same numbers in another row, or copied into the memory of a step that is replayed.
    """
    if t.device.type == "cpu":
        return t
    begins_elsewhere = t.device.type == "cuda" and t.data_ptr() % _ALIGNED
    has_gaps = not t.is_contiguous() and order_of(t) is None
    return t.clone() if begins_elsewhere or has_gaps else t


class _Views:
    """The rows of tensors, split once: the backward of that is one stack, where indexing step by step would fill a zero
    tensor per step.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._rows = [t.unbind(0) for t in tensors]

    def batch(self, row: int) -> tuple[Tensor, ...]:
        """This row of each."""
        return tuple(rows[row] for rows in self._rows)
