"""The loss and its gradient at one theta and step, and the products of its second derivatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from revdistill.engine.cotangents import Batching
from revdistill.engine.loss.determinism import Determinism
from revdistill.engine.loss.graph import graph_nodes, memory_of, saved_tensors

# What a node of autograd takes with the tensors that it refers to, without their numbers: measured with 54 nodes, on 30
# tiny networks, where it is a third of a graph.
_NODE_BYTES = 1024


@dataclass(frozen=True)
class Products:
    """The derivatives of <gradient, vector>, as float tensors; None where there is no dependence.

    Attributes:
        theta: with respect to theta [numel].
        batch: with respect to each tensor of the batch.
        hyper: with respect to each tensor of hyper.
    """

    theta: Tensor | None
    batch: tuple[Tensor | None, ...]
    hyper: tuple[Tensor | None, ...]


class Linearization(Protocol):
    """The loss and its gradient at one theta and step."""

    @property
    def loss(self) -> Tensor:
        """0-dim, detached."""

    @property
    def gradient(self) -> Tensor:
        """[numel], detached; bit-identical in both directions."""

    @property
    def own(self) -> Tensor | None:
        """What was evaluated on this rank [numel], detached, where the gradient is a mean over ranks; or None."""

    @property
    def batch(self) -> Any:
        """The step's batch, where a function gave it; otherwise None."""

    @property
    def nbytes(self) -> int:
        """The memory that the graph of the gradient takes, in bytes; 0 where there is no graph to keep."""

    def saved(self) -> Iterator[Tensor]:
        """The tensors that the graph of the gradient holds; none where there is no graph to keep."""

    def product(self, vector: Tensor) -> Products:
        """The product of the second derivatives with a vector, by one backward through the graph.

        Args:
            vector: [numel].

        Returns:
            The derivatives of <gradient, vector>. To be called once: the graph is used up.
        """

    def products(self, vectors: Tensor, batching: Batching) -> Products:
        """The products with many vectors; over the one graph, any number of times.

        Args:
            vectors: [K, numel].
            batching: how they are evaluated.

        Returns:
            The derivatives of <gradient, vector> for each of them, on a first dimension.
        """


@dataclass
class EagerLinearization:
    """The loss and its gradient at one theta and step, with the graph of the gradient: a `Linearization`."""

    loss: Tensor
    leaf: Tensor
    batch_leaves: tuple[Tensor, ...]
    hyper_leaves: tuple[Tensor, ...]
    graph: Tensor
    determinism: Determinism
    k: int
    batch: Any = None
    views: bool = True  # whether the batch's leaves lie in memory that is there without them
    own: None = None

    @property
    def gradient(self) -> Tensor:
        """[numel], detached."""
        return self.graph.detach()

    @property
    def nbytes(self) -> int:
        """The memory of theta, of the graph's nodes, and of what they hold beside a table and hyper, in bytes."""
        there, own = (self.batch_leaves, ()) if self.views else ((), self.batch_leaves)
        data: set[int] = {memory_of(t)[0] for t in (*there, *self.hyper_leaves)}
        storages: dict[int, int] = dict(map(memory_of, (*own, *self.saved())))
        held = sum(size for memory, size in storages.items() if memory not in data)
        return self.leaf.nbytes + held + _NODE_BYTES * len(graph_nodes(self.graph))

    def saved(self) -> Iterator[Tensor]:
        """See `Linearization.saved`."""
        return saved_tensors(self.graph)

    def product(self, vector: Tensor) -> Products:
        """See `Linearization.product`."""
        return self._arranged(self._vjp(vector))

    def products(self, vectors: Tensor, batching: Batching) -> Products:
        """See `Linearization.products`."""
        return self._arranged(batching(partial(self._vjp, keep_graph=True), vectors))

    @property
    def _leaves(self) -> tuple[Tensor, ...]:
        return (self.leaf, *self.batch_leaves, *self.hyper_leaves)

    def _vjp(self, vector: Tensor, *, keep_graph: bool = False) -> Sequence[Tensor | None]:
        """Of each leaf that wants one."""
        wanted = [leaf for leaf in self._leaves if leaf.requires_grad]
        if not self.graph.requires_grad:  # a loss that is linear in theta has no second derivative at all
            return [None] * len(wanted)
        with self.determinism.step(self.k):
            return torch.autograd.grad(
                self.graph, wanted, grad_outputs=vector, allow_unused=True, retain_graph=keep_graph
            )

    def _arranged(self, found: Sequence[Tensor | None]) -> Products:
        rest = iter(found)
        values = [next(rest) if leaf.requires_grad else None for leaf in self._leaves]
        split = 1 + len(self.batch_leaves)
        return Products(values[0], tuple(values[1:split]), tuple(values[split:]))
