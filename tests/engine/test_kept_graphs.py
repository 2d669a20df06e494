"""What kept graphs refer to beside batches and hyper: a tensor that a loss closes over, changed behind torch's back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd

ADJOINTS = [rd.Reversible(), rd.Backprop()]  # those that keep graphs
STEPS = 9
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(2, 8, 4, dtype=torch.float64, generator=DRAW)
START = {"w": torch.randn(4, 3, dtype=torch.float64, generator=DRAW)}


class Outside:
    """A loss with a frozen teacher, weights of classes and a sparse matrix; `late`: only from that step on."""

    def __init__(self, late: int = 0) -> None:
        torch.manual_seed(0)
        self.late = late
        self.teacher = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().requires_grad_(False)
        self.weights = torch.rand(3, dtype=torch.float64)
        self.sparse = torch.eye(8, dtype=torch.float64).to_sparse()
        self.odd = torch.arange(1, 8, dtype=torch.uint8)

    def loss(self, p: dict[str, Tensor], batch: tuple[Tensor, int]) -> Tensor:
        x, k = batch
        z = torch.tanh(x @ p["w"])
        if k >= self.late:
            z = torch.sparse.mm(self.sparse, z * self.weights) - self.teacher[2](
                self.teacher[1](torch.cat([z, z[:, :1]], 1) @ self.teacher[0].weight.T)
            )
        return (z * z.square()).abs().mean() + (z[:7, 0] * self.odd).square().mean()


def unrolled(loss: Callable[..., Any], adjoint: Any) -> tuple[Tensor, list[Tensor]]:
    params = {name: p.clone().requires_grad_() for name, p in START.items()}
    theta = rd.unroll(loss, params, lambda k: (X[k % 2], k), rd.SGD(0.05, 0.5), steps=STEPS, adjoint=adjoint)
    return theta["w"].square().sum(), list(params.values())


CHANGES: dict[str, Callable[[Outside], Any]] = {
    "teacher": lambda o: o.teacher[2].weight.data.mul_(0.5),
    "weights": lambda o: o.weights.numpy().__setitem__(1, 7.0),
    "sparse": lambda o: o.sparse._values().data.mul_(2.0),
    "last byte": lambda o: o.odd.data[6:].add_(1),
}


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_loss_closes_over_changed_between_the_passes_is_caught(name: str, adjoint: Any) -> None:
    outside = Outside()
    value, params = unrolled(outside.loss, adjoint)
    CHANGES[name](outside)
    with pytest.raises(rd.ReversalError, match=r"a tensor of shape .*, to which the loss refers .* teacher"):
        torch.autograd.grad(value, params)


@pytest.mark.parametrize("late", [5, STEPS - 2])
def test_it_is_caught_where_it_sets_in_late(late: int) -> None:
    outside = Outside(late)
    value, params = unrolled(outside.loss, rd.Reversible())
    outside.weights.data.mul_(0.5)
    with pytest.raises(rd.ReversalError, match=r"a tensor of shape \[3\]"):
        torch.autograd.grad(value, params)


def test_a_loss_that_changes_its_teacher_behind_torchs_back_is_caught() -> None:
    """As an average of the network's parameters, through .data."""
    outside = Outside()

    def loss(p: dict[str, Tensor], batch: tuple[Tensor, int]) -> Tensor:
        value = outside.loss(p, batch)
        outside.weights.data.mul_(0.9)
        return value

    value, params = unrolled(loss, rd.Reversible())
    with pytest.raises(rd.ReversalError, match=r"a tensor of shape \[3\]"):
        torch.autograd.grad(value, params)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_what_stays_is_right(adjoint: Any) -> None:
    """And what changes without being used, or after backward()."""
    outside = Outside()

    def loss(p: dict[str, Tensor], batch: tuple[Tensor, int]) -> Tensor:
        memory = torch.zeros(5, dtype=torch.float64)
        memory.data.add_(batch[1])
        return outside.loss(p, batch) + (memory * p["w"].sum()).mean()

    value, params = unrolled(loss, adjoint)
    found = torch.autograd.grad(value, params)[0]
    outside.weights.data.mul_(0.5)
    outside.weights.data.mul_(2.0)
    start = w = START["w"].clone().requires_grad_()
    v = torch.zeros_like(w)
    for k in range(STEPS):
        (g,) = torch.autograd.grad(loss({"w": w}, (X[k % 2], k)), w, create_graph=True)
        v = 0.5 * v + g
        w = w - 0.05 * v
    expected = torch.autograd.grad(w.square().sum(), start)[0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_batches_and_hyper_that_changed_are_told_as_such(adjoint: Any) -> None:
    table, hyper = X.clone(), torch.ones(3, dtype=torch.float64)
    for changed in (table, hyper):
        params = {"w": START["w"].clone().requires_grad_()}
        loss = lambda p, b, h: torch.tanh(b[0] @ p["w"] * h).square().mean()  # noqa: E731
        theta = rd.unroll(loss, params, (table,), rd.SGD(0.05, 0.5), steps=STEPS, adjoint=adjoint, hyper=hyper)
        changed.data.mul_(2)
        with pytest.raises(rd.ReversalError, match="the data of step 8"):
            theta["w"].sum().backward()
