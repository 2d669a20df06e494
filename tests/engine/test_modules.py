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
