"""Networks that are stacked must be alike in all but the values of parameters and buffers."""

from __future__ import annotations

import cmath
import collections
import dataclasses
import datetime
import decimal
import fractions
import functools
import itertools
import math
import operator
import random
import re
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import revdistill as rd
from tests.engine.small import CE, data


class Own(nn.Module):
    """What a network may be made of beside layers."""

    def __init__(self, slope: Any = 0.5, mask: float = 1.0, name: str = "extra", activation: Any = None) -> None:
        super().__init__()
        self.layer, self.slope, self.mask = nn.Linear(5, 3), slope, torch.full((3,), mask)
        self.register_buffer(name, torch.ones(2))
        self.norm = nn.BatchNorm1d(3)
        self.activation = activation or (lambda x: torch.where(x > 0, x, self.slope * x))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 5] -> [B, 3]."""
        result: Tensor = self.activation(self.norm(self.layer(x)) * self.mask)
        return result


def changed(change: Callable[[Any], object]) -> nn.Module:
    net = Own()
    change(net)
    return net


UNLIKE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a number": (lambda: Own(slope=0.1), r"'slope' is 0\.1, in nets\[0\] 0\.5"),
    "numbers": (
        lambda: changed(lambda net: setattr(net, "sizes", [1, 2])),
        r"'sizes' is \[1, 2\], in nets\[0\] absent",
    ),
    "a tensor": (lambda: Own(mask=0.5), r"'mask' is another tensor \[3\]"),
    "a function": (lambda: Own(activation=torch.tanh), "the attribute 'activation' is"),
    "a layer's setting": (
        lambda: changed(lambda net: setattr(net.norm, "eps", 0.5)),
        "'eps' of the module 'norm' is 0.5",
    ),
    "a layer": (
        lambda: changed(lambda net: setattr(net, "norm", nn.Identity())),
        "'norm' is a Identity, .*BatchNorm1d",
    ),
    "a layer more": (lambda: changed(lambda net: setattr(net, "more", nn.Tanh())), "it alone has a module 'more'"),
    "the mode": (lambda: changed(lambda net: net.norm.eval()), "the training mode of the module 'norm' is False"),
    "frozen": (lambda: changed(lambda net: net.layer.requires_grad_(False)), "'weight' of the module 'layer' .*=False"),
    "a buffer": (lambda: Own(name="other"), "the buffer 'extra' is absent"),
    "a buffer's dtype": (
        lambda: changed(lambda net: setattr(net, "extra", net.extra.int())),
        "the buffer 'extra' is torch.int32",
    ),
    "one tensor": (
        lambda: changed(lambda net: setattr(net.norm, "bias", net.norm.weight)),
        r"'norm\.weight' and 'norm\.bias' are one tensor in this one and two in nets\[0\]",
    ),
    "a hook": (
        lambda: changed(lambda net: net.norm.register_forward_hook(lambda layer, x, y: y * 2)),
        "the hooks of the module 'norm' differ",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_networks_that_are_not_alike_are_not_stacked(name: str) -> None:
    """Regression: nets[1] was trained as nets[0]."""
    make, message = UNLIKE[name]
    with pytest.raises(ValueError, match=rf"^nets\[1\] is not of nets\[0\]'s architecture: .*{message}.*one by one"):
        rd.stack_modules([Own(), make()], CE)


@dataclasses.dataclass(slots=True)
class Slotted:
    """Has no __dict__."""

    slope: float


class Hook:
    """A hook that has no __dict__."""

    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * self.scale


class Dated(datetime.date):
    """Has one, and a value beside it."""


def with_globals(value: float) -> Callable[[Tensor], Tensor]:
    """A function that finds `scale` by its name, and within it one that does."""

    def within(x: Tensor) -> Tensor:
        return (lambda: x * scale)()  # type: ignore[name-defined]  # noqa: F821

    return types.FunctionType(within.__code__, {**globals(), "scale": value})


def with_attribute(value: float) -> Callable[[], None]:
    def function() -> None:
        pass

    function.scale = value  # type: ignore[attr-defined]
    return function


# What is made anew of an argument, and two arguments.
VALUES: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
    "a built-in function": (lambda f: f, torch.relu, torch.tanh),
    "a method of tensors": (lambda f: f, Tensor.relu, Tensor.tanh),
    "functions of one name": (lambda f: f, math.sqrt, cmath.sqrt),
    "a part of a built-in function": (functools.partial, torch.relu, torch.tanh),
    "other globals": (with_globals, 0.1, 0.2),
    "a function's attribute": (with_attribute, 0.1, 0.2),
    "slots": (Slotted, 0.1, 0.2),
    "fractions": (lambda n: fractions.Fraction(1, n), 2, 3),
    "decimals": (decimal.Decimal, "0.1", "0.2"),
    "dates": (lambda day: datetime.date(2000, 1, day), 1, 2),
    "dates of a class": (lambda day: Dated(2000, 1, day), 1, 2),
    "slices": (lambda n: slice(0, n), 1, 2),
    "queues": (lambda n: collections.deque([torch.full((2,), n)]), 1, 2),
    "a getter": (operator.itemgetter, 0, 1),
    "a caller": (operator.methodcaller, "relu", "tanh"),
    "random numbers": (random.Random, 1, 2),
    "numpy's random numbers": (np.random.default_rng, 1, 2),
    "a counter": (itertools.count, 0, 1),
    "a pattern": (re.compile, "a", "b"),
    "a lock": (lambda what: threading.Lock() if what == "lock" else 3, "lock", "a number"),
    "a sentinel": (lambda what: object() if what == "object" else 3, "object", "a number"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_without_attributes_are_compared(name: str) -> None:
    """Regression: None == None, where neither has a __dict__."""
    make, first, second = VALUES[name]

    def net(argument: Any) -> nn.Module:
        return changed(lambda net: setattr(net, "held", make(argument)))

    rd.stack_modules([net(first), net(first)], CE)
    with pytest.raises(ValueError, match="architecture: the attribute 'held' is"):
        rd.stack_modules([net(first), net(second)], CE)


def test_weights_that_are_one_in_the_first_network_alone() -> None:
    """Regression: the others were trained as if theirs were one, too."""
    nets = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)]
    nets[0][2].weight = nets[0][0].weight
    with pytest.raises(ValueError, match=r"'0\.weight' and '2\.weight' are one tensor in nets\[0\] and two here"):
        rd.stack_modules(nets, CE)
    nets[1][2].weight = nets[1][0].weight
    _, params = rd.stack_modules(nets, CE)
    assert params.keys() == {"0.weight", "0.bias", "2.bias"}


def test_a_hook_without_attributes_is_compared() -> None:
    def net(scale: float) -> nn.Module:
        return changed(lambda net: net.norm.register_forward_hook(Hook(scale)))

    rd.stack_modules([net(1.0), net(1.0)], CE)
    with pytest.raises(ValueError, match="the hooks of the module 'norm' differ"):
        rd.stack_modules([net(1.0), net(2.0)], CE)


def test_only_what_a_hook_computes_may_differ() -> None:
    """Regression: no tensor was compared where a module has any hook before its forward."""
    nets = [Own(), Own(mask=0.5)]
    for net in nets:
        net.register_forward_pre_hook(hook_that_does_nothing)
    with pytest.raises(ValueError, match="the attribute 'mask' is another tensor"):
        rd.stack_modules(nets, CE)
    for wrap in (nn.utils.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)):
        rd.stack_modules([nn.Sequential(wrap(nn.Linear(5, 3))) for _ in range(2)], CE)


def test_references_to_the_networks_own_modules_are_alike() -> None:
    """Regression: a weak reference to what it is in was refused; keys that are tensors ended in torch's words."""
    nets = []
    for _ in range(2):
        net = Own()
        net.norm.owner = weakref.ref(net)  # type: ignore[assignment]
        net.by_tensor = {net.layer.weight: 1, net.layer.bias: 2}
        net.slope = 0.5
        nets.append(net)
    rd.stack_modules(nets, CE)
    nets[1].by_tensor = {nets[1].layer.bias: 1, nets[1].layer.weight: 2}
    with pytest.raises(ValueError, match="'by_tensor'"):
        rd.stack_modules(nets, CE)
    nets[1].by_tensor, nets[1].norm.owner = dict(nets[1].by_tensor.items()), weakref.ref(nets[0])
    with pytest.raises(ValueError, match=r"'by_tensor'|'owner'"):
        rd.stack_modules(nets, CE)


def hook_that_does_nothing(layer: nn.Module, inputs: Any) -> None:
    """As a logger's."""


def test_networks_whose_functions_and_classes_were_made_anew_are_alike() -> None:
    x, y = data(5)

    def make(seed: int) -> nn.Module:
        class Local(Own):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * 2

        torch.manual_seed(seed)
        net = Local().double()
        net.mask = net.mask.double()
        nn.utils.parametrize.register_parametrization(net.layer, "weight", nn.Tanh())
        net.handle = net.norm.register_forward_hook(lambda layer, x, y: y + layer.eps)
        net.last = net(x[0].detach().double())
        return net

    loss, params = rd.stack_modules([make(1), make(2)], CE)
    theta = rd.unroll(loss, params, (x.detach().double(), y), rd.SGD(0.1, 0.5), steps=3)
    for i in range(2):
        net = make(i + 1)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.5)
        for k in range(3):
            optimizer.zero_grad()
            CE(net(x[k].detach().double()), y[k]).backward()
            optimizer.step()
        for name, p in net.named_parameters():
            torch.testing.assert_close(theta[name][i], p.detach(), rtol=1e-9, atol=1e-11)
