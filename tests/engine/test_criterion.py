"""A criterion that is a module: its parameters are trained with the network's, as torch.optim trains both."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from tests.engine.small import CE, total

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where it imports its compiler

EVERY = [rd.Reversible(graph_bytes=0), rd.Reversible(), rd.Backprop()]
STEPS = 6
X = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12).reshape(2, 6) % 3


class Centers(nn.Module):
    """Cross-entropy with a temperature, and the distance of the outputs to learned centers; `fixed` is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.centers, self.temperature = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.ones(()))
        self.fixed = nn.Parameter(torch.full((), 0.1), requires_grad=False)
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Scalar."""
        near = (output - self.centers[target]).square().sum(1).mean()
        return CE(output / self.temperature, target, self.weight) + self.fixed * near


class Tied(nn.Module):
    """A criterion that holds the network's own weight, and one of its own."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.scale = layer.weight, nn.Parameter(torch.full((), 0.1))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Scalar."""
        return CE(output, target) + self.scale * self.weight.square().sum()


def make(kind: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    criterion = {"centers": Centers, "tied": lambda: Tied(net)}[kind]()
    return net, criterion.double()


@pytest.mark.parametrize("kind", ["centers", "tied"])
def test_both_are_trained_as_torch_trains_both(kind: str) -> None:
    reference, judge = make(kind)
    optimizer = torch.optim.SGD({*reference.parameters(), *judge.parameters()}, 0.1, 0.5)
    for k in range(STEPS):
        optimizer.zero_grad()
        judge(reference(X[k % 2]), Y[k % 2]).backward()
        optimizer.step()
    own = {"centers": {"criterion.centers", "criterion.temperature"}, "tied": {"criterion.scale"}}[kind]
    for adjoint in EVERY:
        net, criterion = make(kind)
        before = {name: t.clone() for name, t in criterion.state_dict().items()}
        loss, params = rd.from_module(net, criterion)
        assert params.keys() == {"weight", "bias"} | own
        theta = rd.unroll(loss, params, (X, Y), rd.SGD(0.1, 0.5), steps=STEPS, adjoint=adjoint)
        for name, p in theta.items():
            expected = judge.get_parameter(name[10:]) if name in own else reference.get_parameter(name)
            torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-11)
        total(theta).backward()
        for name in own:
            assert params[name] is criterion.get_parameter(name[10:])
            assert params[name].grad is not None
        assert all(torch.equal(before[name], t) for name, t in criterion.state_dict().items())


def test_the_hypergradient_is_that_of_a_loop() -> None:
    net, criterion = make("centers")
    start = {**dict(net.named_parameters()), "centers": criterion.centers, "temperature": criterion.temperature}
    theta = dict(start)
    for k in range(STEPS):
        output = X[k % 2] @ theta["weight"].T + theta["bias"]
        own = {name: theta[name] for name in ("centers", "temperature")}
        value = torch.func.functional_call(criterion, own, (output, Y[k % 2]))
        gradients = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        theta = {name: p - 0.1 * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
    expected = torch.autograd.grad(total(theta), list(start.values()))
    for adjoint in EVERY:
        loss, params = rd.from_module(net, criterion)
        found = rd.unroll(loss, params, (X, Y), rd.SGD(0.1, 0.0), steps=STEPS, adjoint=adjoint)
        for mine, theirs in zip(torch.autograd.grad(total(found), list(params.values())), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11)


def test_each_of_several_networks_has_its_own() -> None:
    pairs = [make("centers") for _ in range(2)]
    with torch.no_grad():
        pairs[1][0].weight.mul_(2)
    loss, params = rd.stack_modules([net for net, _ in pairs], pairs[0][1])
    theta = rd.unroll(loss, params, (X, Y), rd.SGD(0.1), steps=STEPS)
    for i, (net, criterion) in enumerate(pairs):
        alone = rd.unroll(*rd.from_module(net, criterion), (X, Y), rd.SGD(0.1), steps=STEPS)
        assert theta.keys() == alone.keys()
        for name, p in alone.items():
            torch.testing.assert_close(theta[name][i], p, rtol=1e-9, atol=1e-11)


def test_a_criterion_that_changes_its_buffers_is_refused() -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("centers", torch.zeros(3, 3, dtype=torch.float64))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            with torch.no_grad():
                self.centers.lerp_(output.mean(0).expand(3, 3), 0.1)
            return (output - self.centers[target]).square().mean()

    loss, params = rd.from_module(nn.Linear(4, 3).double(), Moving())
    with pytest.raises(rd.UnsupportedError, match=r"'criterion\.centers' in forward"):
        rd.unroll(loss, params, (X, Y), rd.SGD(0.1), steps=2)


def test_a_name_that_both_have_is_refused() -> None:
    net = nn.ModuleDict({"criterion": nn.ParameterDict({"centers": torch.zeros(1)})})
    with pytest.raises(ValueError, match=r"net has an entry 'criterion\.centers'"):
        rd.from_module(net, Centers())


def weighed(output: Tensor, target: Tensor) -> Tensor:
    return CE(output, target) * output.square().mean()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, where it compiles
def test_what_torch_compile_made_is_refused() -> None:
    """Regression: torch said that it does not support double backward, at the first backward()."""
    made = r"torch\.compile made.*call the original function, and give compile=True to rd\.unroll"
    with pytest.raises(rd.UnsupportedError, match=rf"^criterion is a function that {made}"):
        rd.from_module(nn.Linear(4, 3), torch.compile(CE))
    net = nn.Linear(4, 3).double()
    net.forward = torch.compile(net.forward)  # type: ignore[method-assign]
    with pytest.raises(rd.UnsupportedError, match=rf"^net\.forward is a function that {made}"):
        rd.from_module(net, CE)
    # Told apart by its backend only where it is called; in steps that are watched torch runs it as it is.
    once, calls = torch.compile(weighed, backend="aot_eager"), itertools.count()
    judge = lambda output, target: (once if next(calls) == 2 else weighed)(output, target)  # noqa: E731
    loss, params = rd.from_module(nn.Linear(4, 3).double(), judge)
    with pytest.raises(rd.UnsupportedError, match=f"calls a function that {made}"):
        total(rd.unroll(loss, params, (X, Y), rd.SGD(0.1), steps=3)).backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, where it compiles
def test_functions_that_torch_compile_made_twice_differentiable_are_fine() -> None:
    @functools.wraps(torch.compile(weighed))
    def wrapper(output: Tensor, target: Tensor) -> Tensor:
        return weighed(output, target)

    found = []
    for criterion in (weighed, wrapper, torch.compile(weighed, backend="eager")):
        torch.manual_seed(0)
        loss, params = rd.from_module(nn.Linear(4, 3).double(), criterion)
        theta = rd.unroll(loss, params, (X, Y), rd.SGD(0.1), steps=2)
        found.append(torch.autograd.grad(total(theta), params["weight"])[0])
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0])


def test_a_class_is_no_criterion() -> None:
    for make in (rd.from_module, lambda net, criterion: rd.stack_modules([net, net], criterion)):
        with pytest.raises(TypeError, match=r"got the class CrossEntropyLoss; give one of it: CrossEntropyLoss\(\)"):
            make(nn.Linear(4, 3), nn.CrossEntropyLoss)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]).double()), CE])
def test_criteria_without_parameters(criterion: Callable[..., Any]) -> None:
    loss, params = rd.from_module(nn.Linear(4, 3).double(), criterion)
    assert params.keys() == {"weight", "bias"}
    rd.unroll(loss, params, (X, Y), rd.SGD(0.1), steps=2)
