"""Modules that cannot be called with other parameters, or not for several networks at once, are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from tests.engine.small import CE, data, mlp, total

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where it imports its compiler


class Recurrent(nn.Module):
    """kind: of the cell."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell, self.head = kind(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 5] -> [B, 3]."""
        return self.head(self.cell(x.unsqueeze(-1))[0][:, -1])


def scripted() -> nn.Module:
    made: nn.Module = torch.jit.script(mlp())
    return made


def compiled_in_place() -> nn.Module:
    net = mlp()
    net[1].compile()  # type: ignore[index, operator]
    return net


def hooked() -> nn.Module:
    net = mlp()
    net[1].register_full_backward_hook(lambda layer, into, out: (into[0] * 0.5,))  # type: ignore[index, operator]
    return net


def hooked_parameter() -> nn.Module:
    net = mlp()
    net[0].weight.register_hook(lambda gradient: gradient * 0)  # type: ignore[index, operator, union-attr]
    return net


def hooked_after_accumulation() -> nn.Module:
    net = mlp()
    net[2].bias.register_post_accumulate_grad_hook(print)  # type: ignore[index, operator, union-attr]
    return net


_HOOK = "has a hook .*Write what the hook does into the loss, or remove the hook"
UNCALLABLE: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "compiled": (lambda: torch.compile(mlp()), rd.UnsupportedError, r"_orig_mod\), and compile=True to rd\.unroll"),
    "a part compiled": (compiled_in_place, rd.UnsupportedError, r"\.1 was made by torch\.compile.*compile=True"),
    "scripted": (scripted, rd.UnsupportedError, r"torch\.jit.*give the module that it was made from"),
    "parallel": (lambda: nn.DataParallel(mlp()), rd.UnsupportedError, r"DataParallel.*\.module\)"),
    "a parameter's hook": (hooked_parameter, rd.UnsupportedError, rf"parameter '0\.weight' {_HOOK}"),
    "a parameter's later hook": (hooked_after_accumulation, rd.UnsupportedError, rf"parameter '2\.bias' {_HOOK}"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), ValueError, r"'0\.weight' has no shape yet.*run one batch"),
}


@pytest.mark.parametrize("name", UNCALLABLE)
def test_what_cannot_be_called_with_other_parameters(name: str) -> None:
    make, error, message = UNCALLABLE[name]
    with pytest.raises(error, match=rf"^net.*{message}"):
        rd.from_module(make(), CE)
    with pytest.raises(error, match=rf"^nets\[1\].*{message}"):
        rd.stack_modules([mlp(), make()], CE)
    with pytest.raises(error, match=rf"^criterion.*{message}"):
        rd.from_module(mlp(), make())


def test_hooks_removed_or_registered_afterwards_are_fine() -> None:
    """A hook on the very parameters that from_module returned is for the hypergradient."""
    net = nn.Linear(5, 3)
    net.weight.register_hook(lambda gradient: gradient * 0).remove()
    loss, params = rd.from_module(net, CE)
    theta = rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=3)
    (expected,) = torch.autograd.grad(total(theta), net.weight, retain_graph=False)
    net.weight.register_hook(lambda gradient: gradient * 2)
    total(rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=3)).backward()
    assert net.weight.grad is not None
    assert torch.equal(net.weight.grad, 2 * expected)


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


UNSTACKABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lstm": (lambda: Recurrent(nn.LSTM), r"nets\[0\]\.cell is a LSTM.*rd\.from_module.*LSTMCell"),
    "gru": (lambda: Recurrent(nn.GRU), r"nets\[0\]\.cell is a GRU.*rd\.from_module.*GRUCell"),
    "hooks": (hooked, r"nets\[0\]\.1 has a backward hook.*rd\.from_module, or remove the hook"),
}


@pytest.mark.parametrize("name", UNSTACKABLE)
def test_what_cannot_be_stacked_works_alone(name: str) -> None:
    make, message = UNSTACKABLE[name]
    with pytest.raises(rd.UnsupportedError, match=message):
        rd.stack_modules([make(), make()], CE)
    for loss, params in (rd.from_module(make(), CE), rd.stack_modules([make()], CE)):
        total(rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=3)).backward()


def test_operators_that_cannot_be_stacked_are_named() -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Own.apply(super().forward(x))  # type: ignore[no-any-return]

    loss, params = rd.stack_modules([Doubled(5, 3), Doubled(5, 3)], CE)
    with pytest.raises(
        rd.UnsupportedError, match=r"setup_context and generate_vmap_rule = True, or .* rd\.from_module"
    ):
        rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=2)


def test_a_module_converted_after_from_module_is_named() -> None:
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    loss, params = rd.from_module(net, CE)
    x, y = data(5)
    net.double()
    with pytest.raises(ValueError, match=r"the given '0.weight' is torch.float64.*batch's entry 0 is torch.float32"):
        rd.unroll(loss, params, (x, y), rd.SGD(0.1), steps=2)
    with pytest.raises(ValueError, match=r"the given '1.running_mean' is torch.float32.* call rd.from_module after"):
        rd.unroll(loss, params, (x.double(), y), rd.SGD(0.1), steps=2)


@pytest.mark.parametrize("adjoint", [None, rd.Backprop()], ids=repr)
def test_an_unroll_inside_torch_func_is_refused(adjoint: Any) -> None:
    loss, params = rd.from_module(mlp(), CE)
    x, y = data(5)

    def value(rows: Tensor) -> Tensor:
        return total(rd.unroll(loss, params, (rows, y), rd.SGD(0.1), steps=2, adjoint=adjoint, seed=0))

    def forward_mode(function: Callable[[Tensor], Tensor]) -> Any:
        return lambda rows: torch.func.jvp(function, (rows,), (rows,))

    several = x.detach().expand(2, *x.shape)
    for transform, given in (
        (torch.func.grad, x.detach()),
        (torch.func.jacrev, x.detach()),
        (forward_mode, x.detach()),
        (torch.func.vmap, several),
    ):
        with pytest.raises(rd.UnsupportedError, match=r"torch\.func\.grad, jacrev, jvp or vmap.*rd\.stack_modules"):
            transform(value)(given)
