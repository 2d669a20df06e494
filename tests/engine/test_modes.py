"""net.eval() and net.train() between the passes: an unroll goes back in the mode in which it went forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from tests.engine.small import CE, EVERY, total

AGAIN = [EVERY[0], EVERY[2], EVERY[3]]  # every gradient is evaluated a second time
STEPS = 5
X = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12).reshape(2, 6) % 3


def make() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double()
    net[2].eval()  # one part in another mode than the whole
    return net


class Unrolled:
    """An unroll of a module's loss between its passes. wrap: makes another loss of it."""

    def __init__(self, loss: Any, params: dict[str, Tensor], adjoint: Any, wrap: Any = None, **kwargs: Any) -> None:
        self.x = X.clone().requires_grad_()
        self.params = params
        theta = rd.unroll(
            loss if wrap is None else wrap(loss), params, (self.x, Y), rd.SGD(0.2), steps=STEPS, adjoint=adjoint,
            seed=3, **kwargs,
        )  # fmt: skip
        self.value = total(theta)

    def back(self) -> list[Tensor]:
        return [self.value.detach(), *torch.autograd.grad(self.value, [self.x, *self.params.values()])]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


def in_mode(training: bool, adjoint: Any, **kwargs: Any) -> list[Tensor]:
    """Nothing happens between the passes."""
    net = make()
    net[1].train(training)
    return Unrolled(*rd.from_module(net, CE), adjoint, **kwargs).back()


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_each_way_back_is_in_the_mode_of_its_own_way_forward(adjoint: Any) -> None:
    """Two unrolls of one loss, forward in different modes; the way back in a third state, which is kept."""
    net = make()
    loss, params = rd.from_module(net, CE)
    training = Unrolled(loss, params, adjoint)
    net[1].eval()
    evaluating = Unrolled(loss, params, adjoint)
    net.train()
    assert same(training.back(), in_mode(True, adjoint))
    assert same(evaluating.back(), in_mode(False, adjoint))
    assert all(module.training for module in net.modules())
    assert not same(in_mode(True, adjoint), in_mode(False, adjoint))


def with_penalty(loss: Any) -> Callable[..., Tensor]:
    return lambda p, batch: loss(p, batch) + 1e-3 * total(p)


def switching(net: nn.Module) -> Callable[[Any], Any]:
    """A loss that is evaluated in both modes, and leaves the module as it found it."""

    def wrap(loss: Any) -> Callable[..., Tensor]:
        def both(p: dict[str, Tensor], batch: Any) -> Tensor:
            before = net[1].training  # type: ignore[index]
            net[1].train()  # type: ignore[index]
            first = loss(p, batch)
            net[1].eval()  # type: ignore[index]
            second = loss(p, batch)
            net[1].train(before)  # type: ignore[index]
            return first + 2 * second

        return both

    return wrap


@pytest.mark.parametrize("adjoint", AGAIN, ids=repr)
def test_losses_made_of_a_modules_loss(adjoint: Any) -> None:
    net = make()
    loss, params = rd.from_module(net, CE)
    unrolled = Unrolled(loss, params, adjoint, with_penalty)
    net.eval()
    assert same(unrolled.back(), in_mode(True, adjoint, wrap=with_penalty))

    def in_both(between: bool) -> list[Tensor]:
        net = make()
        unrolled = Unrolled(*rd.from_module(net, CE), adjoint, switching(net))
        if between:
            net.eval()
        return unrolled.back()

    assert same(in_both(between=True), in_both(between=False))


@pytest.mark.parametrize("adjoint", EVERY[:-1], ids=repr)
def test_modes_that_change_along_the_way_forward(adjoint: Any) -> None:
    """on_step switches: each step goes back as it went forward, and the hypergradient is that of a loop in float64."""

    def switch(net: nn.Sequential, k: int) -> None:
        net[1].train(k % 2 == 1)
        net[0].training = not net[0].training

    net = make()
    unrolled = Unrolled(*rd.from_module(net, CE), adjoint, on_step=lambda k, *_: switch(net, k))
    net.eval()
    found = unrolled.back()

    net, x = make(), X.clone().requires_grad_()
    start, buffers = dict(net.named_parameters()), {name: b.clone() for name, b in net.named_buffers()}
    theta, v = dict(start), {name: torch.zeros_like(p) for name, p in start.items()}
    for k in range(STEPS):
        copies = {name: b.clone() for name, b in buffers.items()}
        value = CE(torch.func.functional_call(net, theta | copies, (x[k % 2],)), Y[k % 2])
        gradients = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        v = {name: round(0.9 * 2**16) / 2**16 * v[name] + g for name, g in zip(v, gradients, strict=True)}
        theta = {name: p - 0.2 * v[name] for name, p in theta.items()}
        switch(net, k)
    expected = [total(theta).detach(), *torch.autograd.grad(total(theta), [x, *start.values()])]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_a_module_that_only_an_unroll_inside_the_loss_calls() -> None:
    def inner(base: Any) -> Callable[..., Tensor]:
        def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
            rows = tuple(t[None] for t in batch)
            return total(rd.unroll(base, p, rows, rd.SGD(0.1), steps=1, adjoint=rd.Backprop(), seed=0))

        return loss

    def run(between: bool) -> list[Tensor]:
        net = make()
        unrolled = Unrolled(*rd.from_module(net, CE), AGAIN[0], inner)
        if between:
            net.eval()
        return unrolled.back()

    assert same(run(True), run(False))


def test_stacked_networks() -> None:
    def run(between: bool) -> list[Tensor]:
        nets = [make(), make()]
        unrolled = Unrolled(*rd.stack_modules(nets, CE), AGAIN[0])
        if between:
            nets[0].eval()
        return unrolled.back()

    assert same(run(True), run(False))


def test_an_error_puts_the_modes_back() -> None:
    class Fails(nn.Module):
        after = 10**9

        def forward(self, x: Tensor) -> Tensor:
            Fails.after -= 1
            if Fails.after < 0:
                raise ArithmeticError("on purpose")
            return x

    net = make().append(Fails())
    unrolled = Unrolled(*rd.from_module(net, CE), AGAIN[0])
    net.eval()
    Fails.after = 2
    with pytest.raises(ArithmeticError, match="on purpose"):
        unrolled.back()
    assert not any(module.training for module in net.modules())


def _swap(net: nn.Sequential) -> None:
    net[3] = nn.Sigmoid()


def _attribute(net: nn.Sequential) -> None:
    net[2].p, net[1].eps = 0.9, 1.0


def _hook(net: nn.Sequential) -> None:
    net[0].register_forward_hook(lambda layer, _, out: 2 * out)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_swap, r"the module 3 \(Tanh, now Sigmoid\)"),
        (_attribute, r"the attribute 'eps' of 1 \(1e-05, now 1.0\)"),
        (_hook, r"the hooks of 0 \(absent, now 1\)"),
    ],
)
def test_another_change_is_named(change: Callable[[nn.Sequential], None], named: str) -> None:
    for adjoint in AGAIN:
        net = make()
        unrolled = Unrolled(*rd.from_module(net, CE), adjoint)
        change(net)
        with pytest.raises(rd.ReversalError, match=rf"gradient at step .* it changed .*{named}.*after backward\(\)"):
            unrolled.back()
