"""rd.from_module and rd.stack_modules: functional_call's values for every kind of module, which is left as it was."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import revdistill as rd
from revdistill.engine.loss import substitution
from tests.engine.small import CE, total

STEPS = 6


class Tied(nn.Module):
    """Two layers with one weight, and one layer that is used twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        """[B, 5] -> [B, 3]."""
        return self.head(torch.tanh(self.again(torch.tanh(self.second(torch.tanh(self.first(x)))))))


class Symmetric(nn.Module):
    """A parametrization: W -> W + W'."""

    def forward(self, weight: Tensor) -> Tensor:
        """[n, n] -> [n, n]."""
        return weight + weight.mT


class OwnSetattr(nn.Module):
    """A module that refuses to be written to once it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.ready = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("ready"):
            raise AttributeError(f"{name} is read-only")
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 5] -> [B, 3]."""
        return self.linear(x) * self.scale


class Recurrent(nn.Module):
    """torch's LSTM keeps its weights in a list of its own besides."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 5] -> [B, 3]."""
        return self.head(self.cell(x.unsqueeze(-1))[0][:, -1])


class Recursive(nn.Module):
    """A module whose forward calls itself, and trains a network in an unroll of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head, self.depth = nn.Linear(5, 5), nn.Linear(5, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        """[B, 5] -> [B, 3]."""
        self.depth += 1
        try:
            return self.head(torch.tanh(self.linear(x))) + (0.5 * self(x.roll(1)) if self.depth < 3 else 0)
        finally:
            self.depth -= 1


def parametrized() -> nn.Module:
    layer = nn.Linear(5, 5)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3))


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].weight.requires_grad_(False)
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)),
    "convnet": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(20, 3)
    ),
    "batchnorm": lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)),
    "batchnorm, evaluating": lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval(),
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(1, (5, 1)), nn.Linear(1, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        nn.Flatten(), nn.Linear(40, 3),
    ),
    "tied": Tied,
    "parametrized": parametrized,
    "frozen": frozen,
    "read-only": OwnSetattr,
    "lstm": Recurrent,
    "recursive": Recursive,
}  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, generator=draw), torch.arange(6) % 3


def values_and_gradients(loss: Any, params: dict[str, Tensor]) -> list[Tensor]:
    value = loss(params, batch())
    return [value.detach(), *torch.autograd.grad(value, list(params.values()))]


def called(net: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """On a copy: of a layer under two names, torch 2.13's functional_call leaves the tensors that it put there."""
    output: Tensor = functional_call(copy.deepcopy(net), tensors, (x,))
    return output


def by_functional_call(net: nn.Module, params: dict[str, Tensor]) -> list[Tensor]:
    x, y = batch()
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    value = CE(called(net, {**params, **buffers}, x), y)
    return [value.detach(), *torch.autograd.grad(value, list(params.values()))]


def others(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other values than the network's own."""
    return {name: (p.detach() * 0.5 + 0.1).requires_grad_() for name, p in params.items()}


def what_it_is_made_of(net: nn.Module) -> list[Any]:
    return [
        (holder, list(holder), list(map(id, holder.values())))
        for module in net.modules()
        for holder in (module._parameters, module._buffers, module._modules)
    ]


@pytest.mark.parametrize("name", NETS)
def test_values_are_functional_calls_and_the_module_is_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    net = NETS[name]()
    loss, params = rd.from_module(net, CE)
    before, kept = what_it_is_made_of(net), {k: t.clone() for k, t in net.state_dict().items()}
    for _ in range(3):
        expected = by_functional_call(net, others(params))
        assert all(map(torch.equal, values_and_gradients(loss, others(params)), expected))
    assert what_it_is_made_of(net) == before
    assert all(torch.equal(kept[k], t) for k, t in net.state_dict().items())


@pytest.mark.parametrize("name", NETS)
def test_the_places_are_found_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the search nor functional_call's own is made again, which costs a sixth of a small gradient."""
    net, finds = NETS[name](), []
    find = substitution._find
    monkeypatch.setattr(substitution, "_find", lambda *args: finds.append(1) or find(*args))
    monkeypatch.setattr(torch.func, "functional_call", None)
    loss, params = rd.from_module(net, CE)
    for _ in range(3):
        loss(others(params), batch())
    assert len(finds) == 1


@pytest.mark.parametrize("name", NETS)
def test_unrolls_are_those_of_functional_call(name: str) -> None:
    def hypergradient(loss: Any, params: dict[str, Tensor]) -> tuple[Tensor, ...]:
        x = batch()[0].expand(2, 6, 5).clone().requires_grad_()
        lr = torch.full((STEPS,), 0.1, requires_grad=True)
        theta = rd.unroll(loss, params, (x, batch()[1].expand(2, 6)), rd.SGD(lr, 0.9), steps=STEPS, seed=1)
        found = torch.autograd.grad(total(theta), [x, lr, *params.values()])
        return (*(t.detach() for t in theta.values()), *found)

    torch.manual_seed(0)
    net = NETS[name]()
    loss, params = rd.from_module(net, CE)
    buffers = {key: b.clone() for key, b in net.named_buffers()}

    def by_name(params: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
        copies = {key: b.clone() for key, b in buffers.items()}
        return CE(called(net, {**params, **copies}, pair[0]), pair[1])

    assert all(map(torch.equal, hypergradient(loss, params), hypergradient(by_name, params)))


def test_an_error_in_forward_leaves_the_module_as_it_was() -> None:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("on purpose")

    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), Raises())
    loss, params = rd.from_module(net, CE)
    before = what_it_is_made_of(net)
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="on purpose"):
            loss(others(params), batch())
        assert what_it_is_made_of(net) == before


def test_a_tensor_that_is_written_to_in_forward_is_put_back() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return self.linear(x) * self.seen

    net = Counts()
    loss, params = rd.from_module(net, CE)
    before = what_it_is_made_of(net)
    assert torch.equal(loss(others(params), batch()), loss(others(params), batch()))
    assert what_it_is_made_of(net) == before


def _replace(net: nn.Sequential) -> None:
    net[0] = nn.Linear(5, 8)


def _tie(net: nn.Sequential) -> None:
    net.append(nn.Linear(3, 3))
    net[3].bias = net[2].bias


def _rename(net: nn.Sequential) -> None:
    net[0].register_buffer("mask", torch.ones(8))
    net[0].register_forward_hook(lambda layer, _, out: out * layer.mask)


@pytest.mark.parametrize("change", [_replace, _tie, _rename])
def test_a_module_that_was_changed_is_searched_again(change: Callable[[nn.Sequential], None]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    loss, params = rd.from_module(net, CE)
    loss(others(params), batch())
    change(net)
    for _ in range(2):
        expected = by_functional_call(net, others(params))
        assert all(map(torch.equal, values_and_gradients(loss, others(params)), expected))


def test_two_values_for_one_tensor_are_refused_as_before() -> None:
    net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    loss, params = rd.from_module(net, CE)
    net[1].weight = net[0].weight
    given = others(params)
    given["1.weight"] = given["1.weight"].detach() + 1
    with pytest.raises(ValueError, match="multiple values for keys"):
        loss(given, batch())


def test_params_of_another_shape_are_named() -> None:
    for networks in (1, 2):
        loss, params = rd.stack_modules([nn.Linear(5, 3), nn.Linear(5, 3)][:networks], CE)
        given = {**params, "weight": torch.zeros(networks, 4, 4)}
        with pytest.raises(
            ValueError, match=r"params\['weight'\] has shape \[4, 4\], but the module's own has \[3, 5\]"
        ):
            rd.unroll(loss, given, lambda k: batch(), rd.SGD(0.1), steps=1)


class Strided(nn.Module):
    """A transposed weight, one whose last dimension is not the innermost in memory, and a part of a larger tensor."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.turned = nn.Parameter(torch.randn(3, 5, dtype=torch.float64).t())
        self.images = nn.Parameter(torch.randn(3, 2, 1, 3).double().to(memory_format=torch.channels_last))
        self.part = nn.Parameter(torch.randn(4, 3).double()[:, :2])

    def forward(self, x: Tensor) -> Tensor:
        """[B, 5] -> [B, 3]."""
        assert self.images.stride() == (6, 1, 6, 2)
        return x @ self.turned.t().view(15).view(3, 5).t() + self.images.square().sum((1, 2, 3)) + self.part.sum() ** 2


def loop(net: nn.Module, x: Tensor, lr: Any) -> dict[str, Tensor]:
    theta = dict(net.named_parameters())
    for k in range(4):
        value = CE(functional_call(net, theta, (x[k % 2],)), batch()[1])
        gradients = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        theta = {name: p - lr * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
    return theta


@pytest.mark.parametrize("adjoint", [rd.Reversible(graph_bytes=0), rd.Reversible(), rd.Backprop()], ids=repr)
def test_parameters_keep_their_strides(adjoint: Any) -> None:
    """Regression: forward was given contiguous ones."""
    x = torch.stack([batch()[0].double(), batch()[0].double() + 1])
    table, nets = (x, batch()[1].expand(2, 6)), [Strided(0), Strided(1)]
    expected = [loop(net, x, lr) for net, lr in zip(nets, (0.1, 0.2), strict=True)]
    loss, params = rd.from_module(nets[0], CE)
    found = rd.unroll(loss, params, table, rd.SGD(0.1, 0.0), steps=4, adjoint=adjoint)
    torch.testing.assert_close(found, expected[0], rtol=1e-9, atol=1e-11)
    assert all(found[name].stride() == params[name].stride() for name in ("turned", "images"))
    gradients, exact = (torch.autograd.grad(total(theta), list(params.values())) for theta in (found, expected[0]))
    torch.testing.assert_close(gradients, exact, rtol=1e-8, atol=1e-10)
    saved = rd.unroll(loss, params, table, rd.SGD(0.1, 0.0), steps=4, adjoint=adjoint, save_at=[4, 0])
    torch.testing.assert_close({n: p[0] for n, p in saved.items()}, expected[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close({n: p[1] for n, p in saved.items()}, dict(nets[0].named_parameters()))

    loss, params = rd.stack_modules(nets, CE)
    rates = torch.tensor([[0.1, 0.2]], dtype=torch.float64).expand(4, 2)
    found = rd.unroll(loss, params, table, rd.SGD(rates, 0.0), steps=4, adjoint=adjoint)
    for i, one in enumerate(expected):
        torch.testing.assert_close({n: p[i] for n, p in found.items()}, one, rtol=1e-9, atol=1e-11)


def test_a_rate_per_network_whatever_the_strides() -> None:
    """Networks stacked by hand, whose numbers are interleaved in memory."""
    w = torch.arange(6.0, dtype=torch.float64).reshape(3, 2).t()
    rates = torch.tensor([[0.0, 0.25]], dtype=torch.float64).expand(2, 2)
    found = rd.unroll(lambda p, _: p["w"].square().sum() / 2, {"w": w}, lambda k: (), rd.SGD(rates, 0.0), steps=2)
    torch.testing.assert_close(found["w"], w * torch.tensor([[1.0], [0.75**2]]))


def test_pieces_of_a_training_whatever_the_strides() -> None:
    x, loss_of = batch()[0].double(), lambda net: rd.from_module(net, CE)
    loss, params = loss_of(Strided(0))
    run = lambda start, steps, **more: rd.unroll(  # noqa: E731
        loss, start, lambda k: (x, batch()[1]), rd.SGD(0.1, 0.5), steps=steps, return_state=True, **more
    )
    whole, state = run(params, 4)
    halfway, between = run(params, 2)
    end, last = run(halfway, 2, state=between)
    for name, p in whole.items():
        assert torch.equal(p, end[name])
        assert torch.equal(state.slots["momentum_buffer"][name], last.slots["momentum_buffer"][name])


def test_copies_of_params_are_named() -> None:
    """Regression: torch's words alone."""

    class Target(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) - copy.deepcopy(self.layer)(x)

    for adjoint in (None, rd.Backprop()):
        loss, params = rd.from_module(Target(), CE)
        with pytest.raises(rd.UnsupportedError, match=r"copy\.deepcopy, .*functional_call\(net, .*p\.detach\(\)"):
            rd.unroll(loss, params, lambda k: batch(), rd.SGD(0.1), steps=1, adjoint=adjoint)


def test_one_module_in_two_losses_one_within_the_other() -> None:
    """The criterion of the outer loss calls the inner one, and the module's forward does: each sees its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    inner, params = rd.from_module(net, CE)
    changed = {name: p.detach() + 1 for name, p in params.items()}
    calls: list[Tensor] = []

    def within(layer: nn.Module, _: Any, out: Tensor) -> Tensor:
        if not calls:
            calls.append(out)
            calls.append(inner(changed, batch()))
        return out

    net[0].register_forward_hook(within)
    outer, _ = rd.from_module(net, CE)
    found = outer(others(params), batch())
    _, of_inner = calls
    expected = outer(others(params), batch())
    assert torch.equal(found, expected)
    assert torch.equal(of_inner, inner(changed, batch()))
    assert all(net.get_parameter(name) is p for name, p in params.items())


def test_a_loss_with_an_unroll_of_the_same_module_inside() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    inner, params = rd.from_module(net, CE)

    def loss(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def both(theta: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
            pairs = tuple(t.unsqueeze(0) for t in pair)
            after = rd.unroll(call, theta, pairs, rd.SGD(0.1), steps=2, adjoint=rd.Backprop(), seed=0)
            return call(theta, pair) + call(after, pair)

        return both

    def by_name(theta: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
        return CE(functional_call(net, theta, (pair[0],)), pair[1])

    found, expected = (
        torch.autograd.grad(
            total(rd.unroll(loss(call), params, lambda k: batch(), rd.SGD(0.1), steps=3, seed=0)),
            list(params.values()),
        )
        for call in (inner, by_name)
    )
    assert all(map(torch.equal, found, expected))
    assert all(net.get_parameter(name) is p for name, p in params.items())


def test_a_thread_that_uses_the_module_between_calls_finds_it_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    loss, params = rd.from_module(net, CE)
    expected, found = net(batch()[0]), []
    loss(others(params), batch())
    thread = threading.Thread(target=lambda: found.append(net(batch()[0])))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("name", ["mlp", "tied", "batchnorm"])
def test_networks_side_by_side_and_torch_func(name: str) -> None:
    torch.manual_seed(0)
    nets = [NETS[name]() for _ in range(3)]
    loss, params = rd.stack_modules(nets, CE)
    before = [what_it_is_made_of(net) for net in nets]
    each = [by_functional_call(net, dict(net.named_parameters()))[1:] for net in nets]
    found = torch.func.grad(loss)(params, batch())
    for i, gradients in enumerate(each):
        for mine, expected in zip(found.values(), gradients, strict=True):
            torch.testing.assert_close(mine[i], expected)
    assert [what_it_is_made_of(net) for net in nets] == before
