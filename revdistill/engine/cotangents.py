"""Many cotangents at once: vector-Jacobian products of one graph with the rows of a matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from revdistill.engine.errors import RevdistillError

CHUNK_SIZE = 32  # beyond some 64 cotangents what a step's product works on is larger than caches are

# Of what rounding explains in a product whose sums are done in another order; a wrong batching rule is off by far more.
_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # else 1e-3

Product = Callable[..., Sequence[Tensor | None]]


class Rows(Protocol):
    """K vectors, of which some are asked for at a time: a tensor [K, ...], or what is made as it is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Tensor: ...


class Identity:
    """The rows of the identity matrix, which is nowhere whole.

    Args:
        like: [K], of whose dtype and on whose device they are.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like.detach()

    def __len__(self) -> int:
        return len(self._like)

    def __getitem__(self, rows: slice) -> Tensor:
        first, last, _ = rows.indices(len(self))
        found = self._like.new_zeros(last - first, len(self))
        found.diagonal(first).fill_(1)
        return found


class Batching:
    """Evaluates a product, which is linear in a vector, for many vectors: several at once where torch can.

    torch.func.vmap needs a batching rule of every operator, and is given up for good where one is missing. Its first
    values that are not of zeros are compared with a product of one vector alone.

    Args:
        chunk_size: how many vectors are evaluated at once, at least 1.
    """

    def __init__(self, chunk_size: int = CHUNK_SIZE) -> None:
        self.chunk_size = chunk_size
        self._at_once, self._compared = True, False

    def chunks(self, count: int) -> Iterator[slice]:
        """The rows of `count` vectors, those of a chunk together."""
        for first in range(0, count, self.chunk_size):
            yield slice(first, min(first + self.chunk_size, count))

    def __call__(self, product: Product, *vectors: Tensor) -> list[Tensor | None]:
        """The products of a chunk.

        Args:
            product: of one vector [n], or of one of each of `vectors`; may be called any number of times. Returns
                tensors, None for 0.
            vectors: [K, n]; where product takes several tensors, K of each.

        Returns:
            What product returns, with a first dimension of K; None where it is 0 for all of them.
        """
        if self._at_once and len(vectors[0]) > 1:
            try:
                found = _at_once(product, vectors)
            except RevdistillError:
                raise
            except Exception as error:  # what torch says of a missing batching rule, or a user's backward of the batch
                one_by_one = _one_by_one(product, vectors)  # any other fault comes again
                self._give_up(f"torch cannot: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
                return one_by_one
            if self._compared or self._agree(product, vectors, found):
                return found
            self._give_up("torch's products of several are not those of one")
        return _one_by_one(product, vectors)

    def _agree(self, product: Product, vectors: Sequence[Tensor], found: list[Tensor | None]) -> bool:
        lengths = torch.stack([_norms(v) for v in vectors]).sum(0)
        row = int(lengths.argmax())
        if not lengths[row]:  # of zeros any rule makes zeros
            return True
        self._compared = True
        return all(
            a is not None and b is not None and _is_close(a[row], b) if a is not b else True
            for a, b in zip(found, product(*(v[row] for v in vectors)), strict=True)
        )

    def _give_up(self, why: str) -> None:
        self._at_once = False
        warnings.warn(f"the outputs are gone back for one by one, which takes longer: {why}", stacklevel=2)


def _at_once(product: Product, vectors: Sequence[Tensor]) -> list[Tensor | None]:
    present: list[bool] = []

    def tensors_of(*vector: Tensor) -> tuple[Tensor, ...]:
        found = product(*vector)
        present[:] = [t is not None for t in found]
        return (vector[0].new_zeros(()), *(t for t in found if t is not None))

    # Random numbers (checkpointing draws them again) are for each row those that it has alone.
    _, *rest = torch.func.vmap(tensors_of, randomness="same")(*vectors)
    values = iter(rest)
    return [next(values) if there else None for there in present]


def _one_by_one(product: Product, vectors: Sequence[Tensor]) -> list[Tensor | None]:
    columns = zip(*(product(*vector) for vector in zip(*vectors, strict=True)), strict=True)
    return [_stacked(column) for column in columns]


def _stacked(column: Sequence[Tensor | None]) -> Tensor | None:
    """None is 0: a Function may return it for some vectors only."""
    like = next((t for t in column if t is not None), None)
    return None if like is None else torch.stack([torch.zeros_like(like) if t is None else t for t in column])


def _is_close(found: Tensor, right: Tensor) -> bool:
    if not torch.isfinite(right).all():  # said by whoever looks for it
        return True
    difference, scale = (float(_norms(t.flatten()[None])) for t in (found - right, right))
    return difference <= _TOLERANCE.get(right.dtype, 1e-3) * max(scale, torch.finfo(right.dtype).tiny)


def _norms(rows: Tensor) -> Tensor:
    """Of each row, in double precision: half precision's own ends at 65504."""
    wide = torch.complex128 if rows.is_complex() else torch.float64
    norms: Tensor = torch.linalg.vector_norm(rows[:, None].flatten(1), dim=1, dtype=wide)
    return norms


def many(value: Tensor, inputs: Sequence[Tensor], bars: Tensor) -> Sequence[Tensor]:
    """dL/d(inputs) of K losses at once, from the graph of a value that all of them are part of.

    Args:
        value: [n].
        inputs: tensors.
        bars: dL/d(value), [K, n].

    Returns:
        Of each input [K, *shape].
    """
    found: Sequence[Tensor] = torch.func.vmap(lambda b: torch.autograd.grad(value, inputs, b, retain_graph=True))(bars)
    return found
