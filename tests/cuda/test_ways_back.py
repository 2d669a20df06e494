"""What an unroll may be asked for on a device: ways back, histories, windows, stacks, losses along the way; errors with
steps.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd
from tests.cuda.cases import (
    CE,
    CPU,
    EXACT,
    NEAR,
    NETWORKS,
    RATE,
    STEPS,
    assert_near,
    assert_same,
    case,
    fill,
    hypergradient,
    outer,
)

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("place", ["host", "file", "graphs", "default"])
def test_where_bits_and_graphs_are_kept_changes_no_bit(device: torch.device, place: str, tmp_path: Path) -> None:
    """Over steps enough to spill: at a momentum of 0.5, a word every 16."""
    adjoints = {
        "host": rd.Reversible("host", graph_bytes=0),
        "file": rd.Reversible(tmp_path, graph_bytes=0),
        "graphs": rd.Reversible(graph_bytes=2**17),
        "default": rd.Reversible(),
    }
    steps, optimizer = max(80, STEPS), lambda lr: rd.SGD(lr, 0.5)
    problem = case("mlp", torch.float32, device)
    _, stats = rd.unroll(problem.loss, problem.params, problem.batches, optimizer(0.05), steps=steps, return_stats=True)
    assert stats.history_bytes
    found, expected = (
        hypergradient(problem, a, steps, optimizer) for a in (adjoints[place], rd.Reversible(graph_bytes=0))
    )
    assert_same(found, expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "adjoint", [rd.Reversible(graph_bytes=0), rd.Checkpoint(), rd.StoreAll()], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("what", ["all", "window"])
def test_every_way_back_is_autograds(device: torch.device, adjoint: Any, what: str) -> None:
    kwargs = {"window": STEPS // 3} if what == "window" else {}
    problem = case("mlp", torch.float64, device)
    assert_near(hypergradient(problem, adjoint, **kwargs), hypergradient(problem, rd.Backprop(), **kwargs), EXACT)


@pytest.mark.parametrize(
    "adjoint", [rd.Reversible(graph_bytes=0), rd.Checkpoint(), rd.StoreAll()], ids=lambda a: type(a).__name__
)
def test_losses_along_the_way(device: torch.device, adjoint: Any) -> None:
    problem, at = case("mlp", torch.float64, device), [STEPS, 0, STEPS // 2]
    found, expected = (hypergradient(problem, a, save_at=at) for a in (adjoint, rd.Backprop()))
    assert_near(found, expected, EXACT)


def test_every_adjoint_trains_to_the_same_bits(device: torch.device) -> None:
    problem = case("groupnorm", torch.float32, device)
    ends = []
    for adjoint in (rd.Reversible(graph_bytes=0), rd.Checkpoint(), rd.StoreAll()):
        theta = rd.unroll(
            problem.loss, problem.params, problem.batches, rd.SGD(0.05, 0.9), steps=STEPS, adjoint=adjoint, seed=1
        )
        ends.append({name: p.detach().cpu() for name, p in theta.items()})
    assert_same(ends[1], ends[0])
    assert_same(ends[2], ends[0])
    assert not torch.equal(ends[0]["0.weight"], problem.params["0.weight"].detach().cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stacked_networks_with_a_rate_each(device: torch.device, dtype: torch.dtype) -> None:
    """Each has the hypergradient that it has alone."""
    networks, draw = 5, torch.Generator().manual_seed(4)
    nets = [NETWORKS["mlp"][0]().to(device, dtype) for _ in range(networks)]
    for net in nets:
        fill(net, draw, dtype)
    problem = case("mlp", dtype, device)
    loss, params = rd.stack_modules(nets, CE)
    lr = torch.full((STEPS, networks), RATE, dtype=torch.float64, device=device, requires_grad=True)
    theta = rd.unroll(loss, params, problem.batches, rd.SGD(lr, 0.9), steps=STEPS)
    (stacked,) = torch.autograd.grad(outer(theta), lr)
    for i in (0, networks - 1):
        alone, own = rd.from_module(nets[i], CE)
        rates = problem.rates(STEPS)
        end = rd.unroll(alone, own, problem.batches, rd.SGD(rates, 0.9), steps=STEPS)
        (expected,) = torch.autograd.grad(outer(end), rates)
        off = float(torch.linalg.vector_norm(stacked[:, i] - expected) / torch.linalg.vector_norm(expected))
        assert off <= (NEAR if dtype == torch.float32 else EXACT)


@pytest.mark.parametrize("adjoint", [rd.Reversible(graph_bytes=0), rd.Backprop()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("step", [0, 17, 39])
def test_a_loss_that_is_no_number_is_named_with_its_step(device: torch.device, adjoint: Any, step: int) -> None:
    """Though what happens on a device is looked at every so many steps only."""
    problem = case("mlp", torch.float32, device)
    scales = torch.ones(40, 1, device=device)
    scales[step] = math.nan

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        x, y, scale = batch
        return problem.loss(params, (x, y)) * scale.sum()

    x, y = (t.detach().repeat(8, *([1] * (t.ndim - 1))) for t in problem.batches)
    with pytest.raises(rd.NonFiniteError) as caught:
        rd.unroll(loss, problem.params, (x, y, scales), rd.SGD(0.05, 0.9), steps=40, adjoint=adjoint)
    assert caught.value.step == step


def test_the_history_is_as_large_as_the_cpus(device: torch.device) -> None:
    sizes = []
    for where in (device, CPU):
        problem, optimizers = case("mlp", torch.float32, where), (rd.SGD(0.05, 0.5), rd.AdamW(0.005, (0.5, 0.9)))
        for optimizer in optimizers:
            _, stats = rd.unroll(problem.loss, problem.params, problem.batches, optimizer, steps=100, return_stats=True)
            sizes.append((stats.history_bytes, stats.state_bytes, stats.parameters, stats.steps))
    assert sizes[:2] == sizes[2:]
    assert all(history > 0 for history, *_ in sizes)


@pytest.mark.parametrize("make", [lambda lr: rd.SGD(lr, 0.9), lambda lr: rd.AdamW(lr, eps=1e-3)], ids=["sgd", "adamw"])
def test_many_outputs_are_gone_back_for_at_once(device: torch.device, make: Any) -> None:
    """And the examples' weights come from rows of a data set, one of them twice in a batch."""

    def rows(on: torch.device) -> dict[str, Tensor]:
        problem = case("mlp", torch.float64, on)
        lr, x, y = problem.rates(STEPS), problem.x.detach().flatten(0, 1), problem.y.flatten()
        w = torch.ones(len(x), dtype=x.dtype, device=on, requires_grad=True)
        order = torch.arange(3 * 5).reshape(3, 5) * 7 % len(x)
        order[1, 0], order[2, 3:] = order[1, 1], -1

        def weighted(params: dict[str, Tensor], batch: Any) -> Tensor:
            return problem.loss(params, (batch[1] * batch[0][:, None], batch[2]))

        batches = rd.Minibatches((w, x, y), order)
        theta = rd.unroll(weighted, problem.params, batches, make(lr), steps=STEPS, seed=1)
        outputs = torch.stack([p.square().sum() for p in theta.values()])
        found = rd.jacobian(outputs, {"x": w, "lr": lr, **problem.params}, chunk_size=3)
        return {name: t.cpu() for name, t in found.items()}

    assert_near(rows(device), rows(CPU), EXACT)
