"""rd.attribute against finite differences of a plain loop in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from tests.attribute.small import OPTIMIZERS, ORDER, K, N, attributed, data, loss, params, queries, trained

H = 1e-4


def differences(name: str) -> Tensor:
    """dL_q/dw_i [K, n], central."""
    rows = []
    for i in range(N):
        ends = []
        for sign in (1, -1):
            weights = torch.ones(N, dtype=torch.float64)
            weights[i] += sign * H
            ends.append(loss(trained(weights, OPTIMIZERS[name][1]), queries()))
        rows.append((ends[0] - ends[1]) / (2 * H))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scores_are_the_derivatives_of_a_plain_loop(name: str) -> None:
    found = attributed(name)
    expected = differences(name)
    assert found.scores.shape == (K, N)
    assert expected.abs().mean() > 1e-3
    torch.testing.assert_close(found.scores, expected, rtol=1e-6, atol=1e-7)
    assert not found.scores[:, 5].any()  # no step takes it
    plain = trained(torch.ones(N, dtype=torch.float64), OPTIMIZERS[name][1])
    torch.testing.assert_close(found.losses, loss(plain, queries()), rtol=1e-9, atol=1e-9)
    assert found.theta is not None
    for key, p in plain.items():
        torch.testing.assert_close(found.theta[key], p, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("adjoint", [rd.Checkpoint(2), rd.StoreAll(), rd.Reversible(graph_bytes=0), rd.Backprop()])
def test_every_adjoint_gives_the_same(adjoint: Any) -> None:
    torch.testing.assert_close(attributed(adjoint=adjoint, chunk_size=2).scores, attributed().scores)


def test_float32() -> None:
    found = attributed(
        params=params(torch.float32), data=tuple(t.float() if t.is_floating_point() else t for t in data())
    )
    assert found.scores.dtype == found.losses.dtype == torch.float32
    torch.testing.assert_close(found.scores.double(), attributed().scores, rtol=1e-4, atol=1e-5)


def test_a_measure_of_ones_own() -> None:
    """It takes the place of the loss; a query that nothing influences has scores of 0 and no error."""
    margin = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)

    def measure(p: dict[str, Tensor], given: tuple[Tensor, ...]) -> Tensor:
        return given[0] * p["c"].square().sum() + 1

    found = attributed(queries=(margin,), measure=measure)
    assert found.losses[1] == 1
    assert not found.scores[1].any()
    torch.testing.assert_close(found.scores[2], 2 * found.scores[0])
    assert found.scores[0].any()
    other = torch.ones((), dtype=torch.float64, requires_grad=True)
    for constant in (lambda p, given: given[0].clone(), lambda p, given: given[0] * other):
        found = attributed(queries=(margin,), measure=constant)
        assert torch.equal(found.losses, margin)
        assert found.scores.shape == (K, N)
        assert not found.scores.any()


def test_a_module_with_dropout_and_its_seed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 4)).double()
    each, p = rd.from_module(net, nn.CrossEntropyLoss(reduction="none"))
    first, again, other = (attributed(loss=each, params=p, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.scores, again.scores)
    assert not torch.allclose(first.scores, other.scores)
    assert all(q.grad is None for q in p.values())


def test_batch_norm_in_training_mode_weighs_the_losses() -> None:
    """Its statistics mix the examples; the weights are of their losses. Measured in evaluation mode."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).double()
    each, start = rd.from_module(net, nn.CrossEntropyLoss(reduction="none"))
    x, y = data()
    order = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 0, -1]])

    def measure(p: dict[str, Tensor], given: tuple[Tensor, ...]) -> Tensor:
        net.eval()
        try:
            return each(p, given)
        finally:
            net.train()

    found = attributed(loss=each, params=start, order=order, measure=measure)
    weights = torch.ones(N, dtype=torch.float64)

    def final() -> Tensor:
        theta = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
        steps = torch.optim.SGD(list(theta.values()), lr=0.1, momentum=0.5)
        for row in order.tolist():
            chosen = [i for i in row if i >= 0]
            losses = nn.functional.cross_entropy(
                torch.func.functional_call(net, theta | {n: b.clone() for n, b in net.named_buffers()}, (x[chosen],)),
                y[chosen],
                reduction="none",
            )
            steps.zero_grad()
            (weights[chosen] @ losses / len(chosen)).backward()
            steps.step()
        return measure({name: p.detach() for name, p in theta.items()}, queries())

    torch.testing.assert_close(found.losses, final(), rtol=1e-8, atol=1e-9)
    for i in (0, 4):
        weights[i] = 1 + H
        up = final()
        weights[i] = 1 - H
        down = final()
        weights[i] = 1
        torch.testing.assert_close(found.scores[:, i], (up - down) / (2 * H), rtol=1e-5, atol=1e-7)


def test_epochs() -> None:
    order = rd.epochs(10, 4, 3, seed=2)
    assert (order.shape, order.dtype) == ((9, 4), torch.int64)
    for epoch in order.view(3, 12):
        assert sorted(epoch[epoch >= 0].tolist()) == list(range(10))
        assert epoch[-2:].tolist() == [-1, -1]
    assert torch.equal(rd.epochs(10, 4, 2, seed=2), order[:6])
    assert not torch.equal(order[:3], order[3:6])
    assert not torch.equal(rd.epochs(10, 4, 3, seed=3), order)
    assert rd.epochs(3, 8, 2).shape == (2, 3)  # never more than there are


def test_losses_that_are_alike_are_no_mean() -> None:
    """Of a last layer of zeros, and of one example twice."""
    start = params() | {"c": torch.zeros(5, 4, dtype=torch.float64)}
    assert attributed(params=start).scores.any()
    assert attributed(order=torch.tensor([[0, 0], [1, 2]])).scores.any()


def test_any_seed_will_do() -> None:
    found = attributed(seed=2**70 + 3)
    assert found.check(0.3, 3, seed=2**70 + 5).seed == 2**70 + 5


def bad(**changes: Any) -> Any:
    return changes


def summed(p: dict[str, Tensor], examples: tuple[Tensor, ...]) -> Tensor:
    return loss(p, examples).mean()


STACKED, STACK = rd.stack_modules([nn.Linear(3, 4), nn.Linear(3, 4)], nn.functional.cross_entropy)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mean loss": (
        bad(loss=summed),
        ValueError,
        r"loss must return one .* shape \[3\], got shape \[\].*reduction='none'",
    ),
    "mean made as long": (
        bad(loss=lambda p, b: summed(p, b).repeat(len(b[0]))),
        ValueError,
        "the same number, .* for all examples of a batch, two of which alone have .*reduction='none'",
    ),
    "loss of a column": (
        bad(loss=lambda p, b: loss(p, b)[:, None]),
        ValueError,
        r"got shape \[3, 1\].*mean over the other dimensions",
    ),
    "squeezed": (
        bad(loss=lambda p, b: loss(p, b).squeeze(), order=torch.tensor([[0, 1]] * 5 + [[2, -1]])),
        ValueError,
        r"shape \[1\], got shape \[\].*with one example too: keep the first dimension",
    ),
    "loss is a float": (bad(loss=lambda p, b: 1.0), TypeError, "loss must return a tensor .* got float"),
    "loss is no function": (bad(loss=3), TypeError, "loss must be callable as loss"),
    "loss takes hyper": (bad(loss=lambda p, b, h: None), TypeError, "its signature is"),
    "stacked": (bad(loss=STACKED, params=STACK), rd.UnsupportedError, "rd.stack_modules.*rd.from_module"),
    "params": (bad(params=[1]), TypeError, "params must be a dict"),
    "data a tensor": (bad(data=data()[0]), TypeError, r"data must be a tuple .* give \(data,\)"),
    "data a list of lists": (bad(data=([1], [2])), TypeError, r"data\[0\] must be a tensor, got list"),
    "data none": (bad(data=None), TypeError, "data must be a tuple of tensors .* got NoneType"),
    "data empty": (bad(data=()), ValueError, "data is empty"),
    "data of no examples": (bad(data=(torch.zeros(0, 3), torch.zeros(0))), ValueError, r"data\[0\] has shape \[0, 3\]"),
    "data of two lengths": (bad(data=(data()[0], data(6)[1])), ValueError, r"data\[1\] holds 6 .* data\[0\] holds 7"),
    "order a list": (bad(order=ORDER.tolist()), TypeError, "order must be a tensor"),
    "order of floats": (bad(order=ORDER.double()), TypeError, "order has dtype torch.float64"),
    "order beyond": (bad(order=ORDER + 1), ValueError, r"order\[2, 0\] is 7; accepted are 0 to 6"),
    "queries a tensor": (bad(queries=data()[0]), TypeError, r"queries must be a tuple"),
    "queries of one part": (bad(queries=(data()[0],)), ValueError, "queries has 1 tensors, but data has 2.*measure="),
    "queries of two lengths": (bad(queries=(data()[0], data(3)[1])), ValueError, r"queries\[1\] holds 3"),
    "measure is no function": (bad(measure=1), TypeError, "measure must be callable as measure"),
    "measure a scalar": (bad(measure=summed), ValueError, r"measure must return .* shape \[3\], got shape \[\]"),
    "measure not finite": (
        bad(measure=lambda p, q: loss(p, q) / torch.tensor([1.0, 0.0, 1.0])),
        rd.NonFiniteError,
        "query 1 is inf .* look at measure",
    ),
    "chunk_size": (bad(chunk_size=0), ValueError, "chunk_size must be at least 1, got 0"),
    "chunk_size a float": (bad(chunk_size=2.0), TypeError, "chunk_size must be an int, got float"),
    "seed": (bad(seed=-1), ValueError, "seed must be at least 0"),
    "adjoint": (bad(adjoint=rd.Reversible), TypeError, "adjoint must be rd.Reversible"),
    "optimizer": (bad(optimizer=torch.optim.SGD), TypeError, "optimizer must be rd.SGD"),
    "progress": (bad(progress=1), TypeError, "progress must be a bool, got int"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_will_not_do_is_refused(case: str) -> None:
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        attributed(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(n=0), ValueError, "n must be at least 1, got 0"),
        (dict(batch_size=0), ValueError, "batch_size must be at least 1"),
        (dict(epochs=2.0), TypeError, "epochs must be an int, got float"),
        (dict(seed=-1), ValueError, "seed must be at least 0"),
        (dict(n=True), TypeError, "n must be an int, got bool"),
    ],
)
def test_bad_epochs(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rd.epochs(**({"n": 5, "batch_size": 2, "epochs": 1} | changes))


class Centred(nn.Module):
    """Subtracts a running mean that its forward moves; from step `since` on."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.linear, self.since, self._calls = nn.Linear(3, 4).double(), since, [0]

    def forward(self, x: Tensor) -> Tensor:
        self._calls[0] += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        shifted = x - self.mean if self._calls[0] > self.since else x
        return self.linear(shifted)


@pytest.mark.parametrize("since", [0, 8])
def test_a_buffer_that_matters_is_refused(since: int) -> None:
    """As where the loss is a scalar: each step would see it as it was at the start, which is another training."""
    each, p = rd.from_module(Centred(since), nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(rd.UnsupportedError, match="the module changes its buffer 'mean' in forward"):
        attributed(loss=each, params=p)
