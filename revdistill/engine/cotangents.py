"""Many cotangents at once: vector-Jacobian products of one graph with the rows of a matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

CHUNK_SIZE = 32  # beyond some 64 cotangents what a step's product works on is larger than caches are

# Of what rounding explains in a product whose sums are done in another order; a wrong batching rule is off by far more.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}

Product = Callable[[Tensor], Sequence[Tensor | None]]


class Batching:
    """Evaluates a product, which is linear in a vector, for many vectors: several at once where torch can.

    torch.func.vmap needs a batching rule of every operator, and is given up for good where one is missing. Its first
    values are compared with a product of one vector alone.

    Args:
        chunk_size: how many vectors are evaluated at once, at least 1.
    """

    def __init__(self, chunk_size: int = CHUNK_SIZE) -> None:
        self._chunk_size = chunk_size
        self._at_once, self._compared = chunk_size > 1, False

    def __call__(self, product: Product, vectors: Tensor) -> Iterator[tuple[slice, list[Tensor | None]]]:
        """The products, chunk by chunk.

        Args:
            product: of one vector [n]; may be called any number of times. What it returns None for, it does so for
                every vector.
            vectors: [K, n].

        Returns:
            For each chunk of rows the rows, and what product returns, with the chunk's rows as the first dimension.
        """
        for first in range(0, len(vectors), self._chunk_size):
            rows = slice(first, min(first + self._chunk_size, len(vectors)))
            yield rows, self._chunk(product, vectors[rows])

    def _chunk(self, product: Product, vectors: Tensor) -> list[Tensor | None]:
        if self._at_once and len(vectors) > 1:
            try:
                found = _at_once(product, vectors)
            except (RuntimeError, ValueError, TypeError) as error:  # whatever torch says of a missing batching rule
                one_by_one = _one_by_one(product, vectors)
                self._give_up(f"torch cannot: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
                return one_by_one
            if self._compared or self._agree(product, vectors, found):
                return found
            self._give_up("torch's products of several are not those of one")
        return _one_by_one(product, vectors)

    def _agree(self, product: Product, vectors: Tensor, found: list[Tensor | None]) -> bool:
        self._compared = True
        row = int(vectors.flatten(1).norm(dim=1).argmax())
        return all(
            a is not None and b is not None and _is_close(a[row], b) if a is not b else True
            for a, b in zip(found, product(vectors[row]), strict=True)
        )

    def _give_up(self, why: str) -> None:
        self._at_once = False
        warnings.warn(f"the outputs are gone back for one by one, which takes longer: {why}", stacklevel=2)


def _at_once(product: Product, vectors: Tensor) -> list[Tensor | None]:
    present: list[bool] = []

    def tensors_of(vector: Tensor) -> tuple[Tensor, ...]:
        found = product(vector)
        present[:] = [t is not None for t in found]
        return (vector.new_zeros(()), *(t for t in found if t is not None))

    _, *rest = torch.func.vmap(tensors_of)(vectors)
    values = iter(rest)
    return [next(values) if there else None for there in present]


def _one_by_one(product: Product, vectors: Tensor) -> list[Tensor | None]:
    columns = zip(*(product(vector) for vector in vectors), strict=True)
    return [None if column[0] is None else torch.stack(column) for column in columns]


def _is_close(found: Tensor, right: Tensor) -> bool:
    difference, scale = float(torch.linalg.vector_norm(found - right)), float(torch.linalg.vector_norm(right))
    if not torch.isfinite(right).all():  # said by whoever looks for it
        return True
    return difference <= _TOLERANCE.get(right.dtype, 1e-3) * max(scale, torch.finfo(right.dtype).tiny)


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
