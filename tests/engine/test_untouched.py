"""What changes behind torch's back, in a loss or between the passes; and leaves that a loss makes itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import revdistill as rd
from tests.engine.small import CE, total

KEPT, AGAIN = rd.Reversible(), rd.Reversible(graph_bytes=0)
FIXED = [KEPT, AGAIN, rd.Checkpoint(every=2), rd.StoreAll()]
EVERY = [*FIXED, rd.Backprop()]
STEPS, LR, MOMENTUM = 5, 0.2, 0.5
X = torch.randn(STEPS, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6 * STEPS).reshape(STEPS, 6) % 3
Params = dict[str, Tensor]


def by_loop(loss: Callable[[Params, Any], Tensor], params: Params) -> list[Tensor]:
    """theta_T and the hypergradient of the rates, by SGD with momentum written out."""
    lr = torch.full((STEPS,), LR, dtype=torch.float64, requires_grad=True)
    theta = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    v = {name: torch.zeros_like(p) for name, p in theta.items()}
    for k in range(STEPS):
        gradients = torch.autograd.grad(loss(theta, (X[k], Y[k])), list(theta.values()), create_graph=True)
        v = {name: MOMENTUM * v[name] + g for name, g in zip(v, gradients, strict=True)}
        theta = {name: p - lr[k] * v[name] for name, p in theta.items()}
    return [*(p.detach() for p in theta.values()), *torch.autograd.grad(total(theta), lr)]


def unrolled(
    loss: Any, params: Params, adjoint: Any, batches: Any = (X, Y), between: Any = None, steps: int = STEPS
) -> list[Tensor]:
    lr = torch.full((steps,), LR, dtype=torch.float64, requires_grad=True)
    theta = rd.unroll(loss, params, batches, rd.SGD(lr, MOMENTUM), steps=steps, adjoint=adjoint)
    value = total(theta)
    if between is not None:
        between()
    return [*(p.detach() for p in theta.values()), *torch.autograd.grad(value, lr)]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def linear(params: Params, batch: Any) -> Tensor:
    return CE(batch[0] @ params["w"].T, batch[1])


class Net(nn.Module):
    """Writes as it is told before it computes."""

    def __init__(self, write: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        self.teacher = nn.Parameter(torch.randn(3, 4, dtype=torch.float64), requires_grad=False)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 3]."""
        self.write(self, x)
        return x @ self.w.T + torch.tanh(x @ self.teacher.T) @ self.w[:, :3].T


def student(params: Params, batch: Any) -> Tensor:
    """The loss of a Net that writes nothing."""
    x, w = batch[0], params["w"]
    return CE(x @ w.T + torch.tanh(x @ Net(nothing).teacher.T) @ w[:, :3].T, batch[1])


def nothing(net: Net, x: Tensor) -> None:
    return None


def clamp(net: Net, x: Tensor) -> None:
    net.w.data.clamp_(-0.5, 0.5)


def rebind(net: Net, x: Tensor) -> None:
    net.w.data = net.w.data.clamp(-0.5, 0.5)


def clamp_at_the_end(net: Net, x: Tensor) -> None:
    if torch.equal(x, X[4]) or x.ndim != 2:
        clamp(net, x)


def average(net: Net, x: Tensor) -> None:
    net.teacher.data.mul_(0.6).add_(net.w.data, alpha=0.4)


def average_rebound(net: Net, x: Tensor) -> None:
    net.teacher.data = net.teacher.data * 0.6 + net.w.data * 0.4


def average_no_grad(net: Net, x: Tensor) -> None:
    with torch.no_grad():
        net.teacher.mul_(0.6).add_(net.w, alpha=0.4)


def made(kind: str, write: Any) -> tuple[Any, Params]:
    if kind == "alone":
        return rd.from_module(Net(write), CE)
    return rd.stack_modules([Net(write) for _ in range(int(kind))], CE)


@pytest.mark.parametrize("kind", ["alone", "1", "2"])
@pytest.mark.parametrize("write", [clamp, rebind, average, average_rebound, average_no_grad], ids=lambda w: w.__name__)
def test_parameters_written_in_forward_are_refused(write: Any, kind: str) -> None:
    """Regression: weight clipping through .data, and a mean teacher, trained otherwise than in torch, in silence."""
    named = (
        "frozen parameter 'teacher' in forward" if "average" in write.__name__ else r"changes params\['w'\] in place"
    )
    if kind == "2" and write is not average_no_grad:
        named = r"takes a tensor's \.data under torch\.func\.vmap"
    for adjoint in EVERY if kind == "alone" else [None]:
        for steps in (1, STEPS):
            with pytest.raises(rd.UnsupportedError, match=named):
                unrolled(*made(kind, write), adjoint, steps=steps)


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_a_clamp_that_sets_in_late_is_refused(adjoint: Any) -> None:
    with pytest.raises(rd.UnsupportedError, match=r"changes params\['w'\] in place"):
        unrolled(*made("alone", clamp_at_the_end), adjoint)


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_frozen_parameters_that_stay_are_right(adjoint: Any) -> None:
    """And a module that would change them in training mode, but is in evaluation mode."""
    for write in (nothing, lambda net, x: average(net, x) if net.training else None):
        net = Net(write).eval()
        close(unrolled(*rd.from_module(net, CE), adjoint), by_loop(student, {"w": net.w}))


def test_frozen_parameters_changed_between_the_passes_are_an_error() -> None:
    """Regression: kept graphs refer to them, and torch does not count what is written through .data."""

    def double(net: Net) -> None:
        net.teacher.data.mul_(2)

    def load(net: Net) -> None:
        net.load_state_dict({name: 2 * p for name, p in net.state_dict().items()})

    def there_and_back(net: Net) -> None:
        double(net)
        net.teacher.data.mul_(0.5)

    for adjoint in EVERY:
        net = Net(nothing)
        found = unrolled(*rd.from_module(net, CE), adjoint, between=partial(there_and_back, net))
        close(found, by_loop(student, {"w": net.w}))
        named = "frozen parameter 'teacher' is not" if adjoint not in FIXED[1:] else "not the same bit for bit"
        for change in (double, load):
            net = Net(nothing)
            with pytest.raises(rd.ReversalError, match=named):
                unrolled(*rd.from_module(net, CE), adjoint, between=partial(change, net))


def test_torchs_word_on_changes_in_place_is_named() -> None:
    scale = torch.full((3, 4), 1.5, dtype=torch.float64)

    def loss(params: Params, batch: Any) -> Tensor:
        return linear({"w": torch.sin(params["w"] * scale)}, batch)

    def within(params: Params, batch: Any) -> Tensor:
        w = torch.sigmoid(params["w"])
        w.mul_(2)
        return linear({"w": w}, batch)

    def start() -> Params:
        return {"w": Net(nothing).w}

    with pytest.raises(rd.UnsupportedError, match=r"by the loss itself.*or between the forward and the backward pass"):
        unrolled(within, start(), KEPT)
    with pytest.raises(rd.UnsupportedError, match=r"load_state_dict.*change it after backward\(\)"):
        unrolled(loss, start(), KEPT, between=lambda: scale.mul_(2))


@pytest.mark.parametrize("as_array", [False, True])
def test_one_buffer_refilled_for_each_batch(as_array: bool) -> None:
    """Regression: graphs that were kept all saw the last batch."""
    params = {"w": Net(nothing).w}
    expected = by_loop(linear, params)

    def loss(params: Params, batch: Any) -> Tensor:
        return linear(params, (torch.as_tensor(batch[0]), batch[1]))

    def batches(buffer: np.ndarray[Any, Any] | None) -> Callable[[int], Any]:
        def batch(k: int) -> Any:
            array = np.empty((6, 4)) if buffer is None else buffer
            array[:] = X[k].numpy()
            return array if as_array else torch.from_numpy(array), Y[k]

        return batch

    for adjoint in (KEPT, rd.Backprop()):
        with pytest.raises(rd.ReversalError, match=r"data of step \d are not what they were.*memory of its own"):
            unrolled(loss, params, adjoint, batches(np.empty((6, 4))))
        close(unrolled(loss, params, adjoint, batches(None)), expected)
    for adjoint in FIXED[1:]:
        close(unrolled(loss, params, adjoint, batches(np.empty((6, 4)))), expected)


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_a_gradient_penalty_may_make_its_leaf_in_the_loss(adjoint: Any) -> None:
    """Regression: it was taken for a tensor that the caller wants a gradient of."""

    def loss(params: Params, batch: Any) -> Tensor:
        x = batch[0].detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(torch.tanh(x @ params["w"].T).sum(), x, create_graph=True)
        return CE(x @ params["w"].T, batch[1]) + 0.1 * slope.square().sum()

    params = {"w": Net(nothing).w}
    expected = by_loop(loss, params)
    close(unrolled(loss, params, adjoint), expected)
    close(unrolled(loss, params, adjoint, lambda k: (X[k], Y[k])), expected)
    outside = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    if adjoint in FIXED:
        with pytest.raises(ValueError, match=r"shape \[\] that requires grad but was not passed"):
            unrolled(lambda p, b: loss(p, b) + outside * p["w"].square().sum(), params, adjoint, steps=1)


def test_the_loss_of_a_module_may_make_its_leaf_too() -> None:
    class Penalised(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            x = x.detach().requires_grad_()
            out = torch.tanh(super().forward(nn.functional.dropout(x, 0.3)))
            return out, torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]

    def criterion(output: Any, target: Tensor) -> Tensor:
        return CE(output[0], target) + output[1].square().sum()

    torch.manual_seed(0)
    net = Penalised(4, 3).double()
    loss, params = rd.from_module(net, criterion)
    lr = torch.full((STEPS,), LR, dtype=torch.float64, requires_grad=True)
    theta, v = dict(params), {name: torch.zeros_like(p) for name, p in params.items()}
    for k in range(STEPS):
        torch.manual_seed((7 + k * 0x1E3779B97F4A7C15) % 2**63)  # the engine's numbers, for dropout
        value = criterion(functional_call(net, theta, (X[k],)), Y[k])
        gradients = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        v = {name: MOMENTUM * v[name] + g for name, g in zip(v, gradients, strict=True)}
        theta = {name: p - lr[k] * v[name] for name, p in theta.items()}
    (expected,) = torch.autograd.grad(total(theta), lr)
    for adjoint in (KEPT, AGAIN):
        found = rd.unroll(loss, params, (X, Y), rd.SGD(lr, MOMENTUM), steps=STEPS, adjoint=adjoint, seed=7)
        close([*torch.autograd.grad(total(found), lr)], [expected])
        close([p.detach() for p in found.values()], [p.detach() for p in theta.values()])
