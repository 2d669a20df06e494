"""Custom autograd.Functions: right, or refused where their backward loses its graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import revdistill as rd

ADJOINTS = [rd.Reversible(), rd.Checkpoint(), rd.StoreAll(), rd.Backprop()]
X = torch.randn(3, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def function(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """The apply of a custom Function with this forward and backward."""
    made = type(
        "Made", (torch.autograd.Function,), dict(forward=staticmethod(forward), backward=staticmethod(backward))
    )
    return made.apply  # type: ignore[attr-defined,no-any-return]


def square(ctx: Any, x: Tensor) -> Tensor:
    ctx.save_for_backward(x)
    ctx.x = x
    return torch.as_tensor(x.detach().numpy() ** 2)


def product(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
    ctx.save_for_backward(x, y)
    return x * y


@torch.no_grad()
def by_no_grad(ctx: Any, g: Tensor) -> Tensor:
    return 2 * ctx.saved_tensors[0] * g


def by_numpy(ctx: Any, g: Tensor) -> Tensor:
    return torch.from_numpy(2 * ctx.saved_tensors[0].detach().numpy() * g.detach().numpy())


def by_detach(ctx: Any, g: Tensor) -> Tensor:
    return 2 * ctx.saved_tensors[0].detach() * g


def by_an_attribute(ctx: Any, g: Tensor) -> Tensor:
    return 2 * ctx.x.detach() * g


def behind_a_jump(ctx: Any, g: Tensor) -> Tensor:
    x = ctx.saved_tensors[0].detach()
    return torch.where(x > 0, 2 * x, -1e3) * g


def of_one_alone(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    x, y = ctx.saved_tensors
    with torch.no_grad():
        of_y = x * g
    return y * g, of_y


def in_single_precision(ctx: Any, g: Tensor) -> Tensor:
    """As a kernel of one's own has it, whatever comes."""
    x = ctx.saved_tensors[0].detach()
    return (2 * x.float() * g.float()).to(g.dtype)


def in_place(ctx: Any, g: Tensor) -> Tensor:
    grad = np.empty(g.shape)
    np.multiply(2 * ctx.saved_tensors[0].detach().numpy(), g.detach().numpy(), out=grad)
    ctx.x = None
    return torch.as_tensor(grad)


def training(f: Callable[[Tensor], Tensor], adjoint: Any, w: Tensor | None = None) -> Tensor:
    w = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_() if w is None else w
    theta = rd.unroll(
        lambda p, b: (f(b[0] @ p["w"]) - 1).abs().pow(3).mean(),
        {"w": w},
        (X,),
        rd.SGD(0.005, 0.5),
        steps=3,
        adjoint=adjoint,
    )
    return theta["w"].square().sum()


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("backward", [by_no_grad, by_numpy, by_detach, by_an_attribute, in_single_precision, in_place])
def test_a_backward_that_loses_its_graph_is_refused(backward: Callable[..., Any], adjoint: Any) -> None:
    with pytest.raises(rd.UnsupportedError, match=r"Made, .* loses its graph.*ctx\.saved_tensors"):
        training(function(square, backward), adjoint)


def test_one_result_of_two_that_loses_its_graph_is_refused() -> None:
    f = function(product, of_one_alone)
    with pytest.raises(rd.UnsupportedError, match=r"Made, .* loses its graph"):
        training(lambda h: f(h, h.sin()), rd.StoreAll())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_found_where_the_first_gradients_are_0(dtype: torch.dtype) -> None:
    """Regression of the kind: a head that begins at 0 hides what is below it, at the first step."""
    f, params = function(square, by_detach), {"w": torch.zeros(4, 3, dtype=dtype), "v": torch.zeros(3, dtype=dtype)}
    loss = lambda p, b: (f(b[0] @ p["w"]) @ p["v"] - 1).square().mean()  # noqa: E731
    with pytest.raises(rd.UnsupportedError, match="loses its graph"):
        rd.unroll(loss, params, (X.to(dtype),), rd.SGD(0.1, 0.5), steps=2)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_it_is_found_at_whichever_step_it_comes(adjoint: Any) -> None:
    f = function(square, by_numpy)

    def loss(p: dict[str, Tensor], batch: tuple[Tensor, int]) -> Tensor:
        h = batch[0] @ p["w"]
        return (f(h) if batch[1] == 5 else h).square().mean()

    w = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(rd.UnsupportedError, match="loses its graph"):
        rd.unroll(loss, {"w": w}, lambda k: (X[k % 3], k), rd.SGD(0.1, 0.5), steps=8, adjoint=adjoint)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_it_is_found_where_another_use_needs_another_derivative(adjoint: Any) -> None:
    """Regression: a Function that had been looked at once was known."""
    f = function(product, of_one_alone)  # the derivative by its second argument is lost

    def loss(p: dict[str, Tensor], k: int) -> Tensor:
        return f(p["w"], p["v"].sin() if k else torch.ones(3, dtype=torch.float64)).square().sum()

    params = {name: torch.ones(3, dtype=torch.float64, requires_grad=True) for name in ("w", "v")}
    with pytest.raises(rd.UnsupportedError, match="loses its graph"):
        rd.unroll(
            lambda p, k: loss(p, k) + 0 * p["v"].sum(), params, lambda k: k, rd.SGD(0.1, 0.5), steps=2, adjoint=adjoint
        )


def test_what_a_context_holds_in_lists_is_looked_at_and_left_as_it_was() -> None:
    """Regression: tensors in them were no inputs of the trial, and a backward that takes from one found it empty."""

    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = {"x": [x]}
        return x.square()

    def losing(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.kept["x"][0].detach() * g

    def taking(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.kept["x"].pop() * g

    with pytest.raises(rd.UnsupportedError, match=r"loses its graph: .*a tensor that was saved"):
        training(function(forward, losing), rd.Reversible())
    torch.testing.assert_close(
        training(function(forward, taking), rd.Reversible()), training(torch.square, rd.Reversible())
    )


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("backward", [by_numpy, torch.autograd.function.once_differentiable(by_no_grad)])
def test_what_only_data_go_through_is_differentiated_once(backward: Callable[..., Any], adjoint: Any) -> None:
    """Regression: it was refused, though nothing is missing."""
    f, x = function(square, backward), X.clone().requires_grad_()
    found = []
    for data in (lambda b: f(b), lambda b: b.square()):
        w = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
        theta = rd.unroll(
            lambda p, b, data=data: (data(b[0]) @ p["w"]).tanh().square().mean(),
            {"w": w},
            (x,),
            rd.SGD(0.1, 0.5),
            steps=4,
            adjoint=adjoint,
        )
        found.append(torch.autograd.grad(theta["w"].square().sum(), x)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


# --- right, and not refused


def straight_through(ctx: Any, g: Tensor) -> Tensor:
    """In place, as the well-known binarised networks have it."""
    grad = g
    grad[ctx.saved_tensors[0].abs() > 0.7] = 0
    return grad


def hard(ctx: Any, x: Tensor) -> Tensor:
    ctx.save_for_backward(x)
    return x.sign() + 0.1 * x


def identity(ctx: Any, x: Tensor) -> Tensor:
    return x.clone()


def reversal(ctx: Any, g: Tensor) -> Tensor:
    return -0.5 * g


def nothing(ctx: Any, g: Tensor) -> Tensor:
    return torch.zeros_like(g)


def by_hand(ctx: Any, g: Tensor) -> Tensor:
    ctx.x = None
    return 2 * ctx.saved_tensors[0] * g


def with_auxiliary(ctx: Any, x: Tensor, auxiliary: Tensor) -> Tensor:
    return x.clone()


def of_auxiliary(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    """A mixture of experts adds its balancing loss so."""
    return g, torch.ones((), dtype=g.dtype)


def clipped(ctx: Any, x: Tensor, bound: Tensor) -> Tensor:
    ctx.save_for_backward(x, bound)
    return x.clamp(max=float(bound))


def of_clipped(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    x, bound = ctx.saved_tensors
    return g * (x < bound), (g * (x >= bound)).sum()


def two(f: Callable[..., Any], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda h: f(h, second(h))


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "straight_through": function(hard, straight_through),
    "reversal": function(identity, reversal),
    "zero": lambda h: function(identity, nothing)(h) + h.sin(),
    "by_hand": function(square, by_hand),
    "auxiliary": two(function(with_auxiliary, of_auxiliary), lambda h: h.square().mean()),
    "clipped": two(function(clipped, of_clipped), lambda h: h.square().mean()),
}


def by_autograd(f: Callable[[Tensor], Tensor]) -> Tensor:
    """The hypergradient of a loop in float64."""
    start = w = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
    v = torch.zeros_like(w)
    for k in range(3):
        (g,) = torch.autograd.grad((f(X[k] @ w) - 1).abs().pow(3).mean(), w, create_graph=True)
        v = 0.5 * v + g
        w = w - 0.005 * v
    return torch.autograd.grad(w.square().sum(), start)[0]


@pytest.mark.parametrize("adjoint", [rd.Reversible(), rd.StoreAll(), rd.Backprop()], ids=repr)
@pytest.mark.parametrize("name", RIGHT)
def test_a_backward_that_is_differentiable_is_right(name: str, adjoint: Any) -> None:
    w = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
    (found,) = torch.autograd.grad(training(RIGHT[name], adjoint, w), w)
    torch.testing.assert_close(found, by_autograd(RIGHT[name]), rtol=1e-9, atol=1e-12)


def of_many_numbers(f: Callable[[Tensor], Tensor]) -> None:
    """One step in single precision, where a small move makes some of many comparisons jump."""
    x = torch.randn(1, 20_000, 4, generator=torch.Generator().manual_seed(0))
    w = torch.linspace(-1, 1, 12).reshape(4, 3)
    rd.unroll(lambda p, b: f(b[0] @ p["w"]).mean(), {"w": w}, (x,), rd.SGD(0.1, 0.5), steps=1)


def test_jumps_of_many_numbers_are_no_derivative() -> None:
    """Their sum looks smooth now and then."""
    f = function(clipped, of_clipped)
    of_many_numbers(lambda h: sum(f(h, 0.1 * i + 0 * h.sum()) for i in range(16)))  # type: ignore[return-value]


@pytest.mark.parametrize("backward", [behind_a_jump, in_single_precision])
def test_a_lost_graph_is_found_among_many_numbers(backward: Callable[..., Any]) -> None:
    with pytest.raises(rd.UnsupportedError, match="loses its graph"):
        of_many_numbers(function(square, backward))


def test_the_check_draws_no_random_numbers_and_leaves_the_first_use_as_it_was() -> None:
    """Random numbers in backward are those that they would be."""

    def noisy(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 + 0.1 * torch.rand_like(g))

    seen: list[Tensor] = []

    def trained(f: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(3)
        loss = lambda p, b: (f(b[0] @ p["w"]) - 1).abs().pow(3).mean()  # noqa: E731
        w = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
        return rd.unroll(loss, {"w": w}, (X,), rd.SGD(0.1, 0.5), steps=3)["w"]

    def hooked(h: Tensor) -> Tensor:
        out = h.clone()
        out.register_hook(lambda g: g * (1 + 0.1 * torch.rand_like(g)))
        return out

    seen = [trained(function(identity, noisy)), trained(hooked)]
    assert torch.equal(*seen)


class Square(torch.autograd.Function):
    """With a rule for torch.func.vmap, which makes a class of its own at each call."""

    generate_vmap_rule = True
    differentiable = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x = ctx.saved_tensors[0]
        return 2 * (x if Square.differentiable else x.detach()) * g


@pytest.mark.parametrize("differentiable", [True, False])
def test_under_vmap(differentiable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Square, "differentiable", differentiable)
    vmapped = torch.func.vmap(Square.apply)
    if differentiable:
        w = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
        (found,) = torch.autograd.grad(training(vmapped, rd.Reversible(), w), w)
        torch.testing.assert_close(found, by_autograd(torch.square), rtol=1e-9, atol=1e-12)
    else:
        with pytest.raises(rd.UnsupportedError, match=r"Square, .* loses its graph"):
            training(vmapped, rd.Reversible())


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_what_the_start_is_computed_by_needs_a_first_derivative_alone(adjoint: Any) -> None:
    start = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    outer, true = start.clone().requires_grad_(), start.clone().requires_grad_()
    (found,) = torch.autograd.grad(training(torch.tanh, adjoint, function(square, by_no_grad)(outer)), outer)
    (expected,) = torch.autograd.grad(training(torch.tanh, adjoint, true.square()), true)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
