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


def by_item(net: Any, x: Tensor) -> Any:
    return net(x) / net(x).norm().item()


def by_if(net: Any, x: Tensor) -> Any:
    return net(x) * 2 if net(x).sum() > 0 else net(x)


def by_writing(net: Any, x: Tensor) -> Any:
    z = torch.zeros(6, 3)
    z += net(x)
    return z


def by_entries(net: Any, x: Tensor) -> Any:
    z = torch.zeros(6, 3)
    z[:] = net(x)
    return z


def by_random_entries(net: Any, x: Tensor) -> Any:
    return net(x) + torch.empty(3).normal_()


def by_positions(net: Any, x: Tensor) -> Any:
    return net(x) + (x.sum(1) + net(x).sum(1) > 0).nonzero().sum()


def by_mask(net: Any, x: Tensor) -> Any:
    return net(x) + net(x)[net(x) > 0].mean()


def by_numpy(net: Any, x: Tensor) -> Any:
    return net(x) * float(net(x).detach().numpy().mean())


def by_penalty(net: Any, x: Tensor) -> Any:
    z = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(z).square().sum(), z, create_graph=True)
    return net(x) + slope[:, :3]


OF_VMAP = {
    by_item: r"keep the number a tensor.* torch said: vmap: .*\.item\(\)",
    by_if: "torch.where in the place of if",
    by_writing: r"z = z \+ h in the place.* torch said: output with shape \[6, 3\]",
    by_entries: r"h\.new_zeros",
    by_random_entries: r"torch\.randn",
    by_positions: "keep the shape",
    by_mask: r"torch\.where\(mask, x, 0\)",
    by_numpy: r"no \.numpy\(\)",
    by_penalty: r"torch\.func\.grad or torch\.func\.vjp",
}


class Calling(nn.Module):
    """function(layer, x)."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(5, 3), function

    def forward(self, x: Tensor) -> Any:
        """[B, 5] -> [B, 3]."""
        return self.function(self.layer, x)


def unrolled(function: Callable[[Any, Tensor], Any], networks: int) -> dict[str, Tensor]:
    loss, params = rd.stack_modules([Calling(function) for _ in range(networks)], CE)
    return rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=2)


@pytest.mark.parametrize("function", OF_VMAP)
def test_what_vmap_cannot_evaluate_is_named(function: Callable[[Any, Tensor], Any]) -> None:
    """Regression: torch's words alone, which name neither what was called nor what to do."""
    unrolled(function, 1)
    message = f"cannot evaluate this loss for several networks.*{OF_VMAP[function]}"
    with pytest.raises(rd.UnsupportedError, match=message) as caught:
        unrolled(function, 2)
    assert "train each network by rd.from_module" in str(caught.value)
    assert "\n" not in str(caught.value)


def own_vmap(net: Any, x: Tensor) -> Any:
    return torch.func.vmap(lambda row: net(row) * row.sum().item())(x)


def own_gradient(net: Any, x: Tensor) -> Any:
    return net(x) + torch.func.grad(lambda z: float(z.detach().numpy().sum()) * z.sum())(x.detach())[:, :3]


def own_fault(net: Any, x: Tensor) -> Any:
    z = torch.zeros(3)
    z += net(x)
    return z


def raises(net: Any, x: Tensor) -> Any:
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("function", [own_vmap, own_gradient, own_fault, raises])
def test_errors_that_one_network_raises_too_are_left_as_they_are(function: Callable[[Any, Tensor], Any]) -> None:
    for networks in (1, 2):
        with pytest.raises(RuntimeError):
            unrolled(function, networks)


def test_each_of_several_losses_is_a_scalar() -> None:
    """Regression: the sum over networks was one over the batch, too."""
    for criterion, error in ((nn.CrossEntropyLoss(reduction="none"), ValueError), (lambda o, t: 1.0, TypeError)):
        loss, params = rd.stack_modules([mlp(), mlp()], criterion)
        with pytest.raises(error, match="loss must return a scalar"):
            rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=2)


def test_a_module_may_be_converted_after_from_module() -> None:
    """Its parameters are the very ones that from_module returned, and its buffers those of the unroll's beginning."""
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    loss, params = rd.from_module(net, CE)
    x, y = data(5)
    net.double()
    with pytest.raises(ValueError, match=r"the given '0.weight' is torch.float64.*batch's entry 0 is torch.float32"):
        rd.unroll(loss, params, (x, y), rd.SGD(0.1), steps=2)
    found = rd.unroll(loss, params, (x.double(), y), rd.SGD(0.1), steps=2)
    expected = rd.unroll(*rd.from_module(net, CE), (x.double(), y), rd.SGD(0.1), steps=2)
    assert all(p.dtype == torch.float64 and torch.equal(p, expected[name]) for name, p in found.items())


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
