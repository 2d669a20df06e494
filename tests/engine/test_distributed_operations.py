"""Losses that exchange tensors in a way of which a derivative would be wrong, or a rank would wait: refused by name.

What is told from the graph of a loss is told on a group of one process too; values are compared in test_group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import revdistill as rd
from tests.torchrun import group_of_one

D = rd.distributed
Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    with group_of_one(tmp_path) as found:
        yield found


def part(p: Any, b: Any, h: Any) -> Tensor:
    return ((b[0] @ p["w"]).tanh() * (1 + h)).square().mean()


def copied(p: Any) -> dict[str, Tensor]:
    return {name: D.copy(t) for name, t in p.items()}


def all_reduced(value: Tensor) -> Tensor:
    dist.all_reduce(value)
    return value


def all_gathered(value: Tensor) -> Tensor:
    found = [torch.zeros_like(value)]
    dist.all_gather(found, value)
    return found[0] + value


def broadcast(value: Tensor) -> Tensor:
    dist.broadcast(value, 0)
    return value


def counted(value: Tensor) -> Tensor:
    """A collective on what is not differentiated."""
    return value + 0 * all_reduced(value.detach().clone())


def by_torchs_function(value: Tensor) -> Tensor:
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(value, group=dist.group.WORLD)


def functional(value: Tensor) -> Tensor:
    from torch.distributed._functional_collectives import all_reduce

    assert dist.group.WORLD is not None
    return all_reduce(value, "sum", dist.group.WORLD) * 1.0


def unroll(loss: Loss, *, batch_grad: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, dtype=torch.float64).requires_grad_(batch_grad)
    h = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 2, dtype=torch.float64).requires_grad_()
    given = {"group": dist.group.WORLD, **options}
    theta = rd.unroll(loss, {"w": w}, (x,), rd.SGD(0.1, 0.9), steps=3, hyper=h, **given)
    leaves = [t for t in (x, h, w) if t.requires_grad]
    return torch.autograd.grad(theta["w"].square().sum(), leaves)


def of_inner_gradient(p: Any, b: Any, h: Any) -> Tensor:
    """The exchanges' derivatives are in the graph themselves."""
    w = p["w"]
    value = D.copy(D.sum(part({"w": w}, b, h)))
    return value + torch.autograd.grad(value, w, create_graph=True)[0].square().sum()


def of_func_gradient(p: Any, b: Any, h: Any) -> Tensor:
    found: Tensor = torch.func.grad(lambda w: D.copy(D.sum(part({"w": w}, b, h))))(p["w"])
    return found.square().sum()


UNPAIRED: dict[str, tuple[Loss, str]] = {
    "sum": (lambda p, b, h: D.sum(part(p, b, h)), r"depends on \w+.* through rd\.distributed\.sum without copy"),
    "one sum of two": (
        lambda p, b, h: D.copy(D.sum(part(p, b, h))) + D.sum(p["w"]).square().sum(),
        r"params through rd\.distributed\.sum without copy",
    ),
    "copy": (lambda p, b, h: part(copied(p), b, h), r"params through rd\.distributed\.copy without sum"),
    "hyper past copy": (
        lambda p, b, h: D.sum(part(copied(p), [b[0].detach()], h)),
        r"hyper through rd\.distributed\.sum without copy",
    ),
    "batches past copy": (
        lambda p, b, h: D.sum(part(copied(p), b, D.copy(h))),
        r"batches\[0\] through rd\.distributed\.sum without copy",
    ),
    "batches copied": (
        lambda p, b, h: D.sum(part(copied(p), copied({0: b[0]}), D.copy(h))),
        r"batches\[0\] through rd\.distributed\.sum outside and copy inside",
    ),
}


@pytest.mark.parametrize("name", UNPAIRED)
def test_exchanges_that_are_not_paired(name: str) -> None:
    loss, words = UNPAIRED[name]
    with pytest.raises(rd.UnsupportedError, match=words + r".*rd\.distributed\.copy\(rd\.distributed\.sum\(x\)\)"):
        unroll(loss)


PAIRED: dict[str, tuple[Loss, bool]] = {
    "copy of a sum": (lambda p, b, h: D.copy(D.sum(part(p, b, h))), True),
    "gather": (lambda p, b, h: D.gather(part(p, b, h)[None]).sum(), True),
    "parts": (lambda p, b, h: D.sum(part(copied(p), b, D.copy(h))), False),
    "parts of parts": (lambda p, b, h: D.sum(part(copied({"w": D.sum(copied(p)["w"])}), b, D.copy(h))), False),
    "of an inner gradient": (of_inner_gradient, True),
    "of torch.func.grad": (of_func_gradient, True),
    "counted": (lambda p, b, h: counted(part(p, b, h)), True),
}


@pytest.mark.parametrize("name", PAIRED)
def test_exchanges_that_are_paired(name: str) -> None:
    """On a group of one process each exchange is the identity."""
    loss, batch_grad = PAIRED[name]
    found = unroll(loss, batch_grad=batch_grad)
    plain: Loss = part
    if name.startswith("of"):

        def plain(p: Any, b: Any, h: Any) -> Tensor:
            value = part(p, b, h)
            (g,) = torch.autograd.grad(value, p["w"], create_graph=True)
            return g.square().sum() + (value if name == "of an inner gradient" else 0)

    for a, b in zip(found, unroll(plain, batch_grad=batch_grad, group=None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "call", [all_reduced, all_gathered, broadcast, by_torchs_function, functional], ids=lambda f: f.__name__
)
def test_torchs_collectives(call: Callable[[Tensor], Tensor]) -> None:
    """However often the loss is tried: what was refused once is not taken to be known."""

    def loss(p: Any, b: Any, h: Any) -> Tensor:
        return call(part(p, b, h))

    for _ in range(2):
        with pytest.raises(rd.UnsupportedError, match=r"on a tensor that requires grad.*rd\.distributed\.sum, copy"):
            unroll(loss)
        for adjoint in (None, rd.Backprop()):
            with pytest.raises(rd.UnsupportedError, match=r"of torch\.distributed, and the unroll has no group"):
                unroll(loss, group=None, adjoint=adjoint)


def test_a_loss_that_is_fine_in_a_group_is_looked_at_without() -> None:
    def loss(p: Any, b: Any, h: Any) -> Tensor:
        return counted(part(p, b, h))

    for _ in range(3):  # then none of the next steps is a power of two, were they counted together
        unroll(loss)
    with pytest.raises(rd.UnsupportedError, match="the unroll has no group"):
        unroll(loss, group=None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's, as it loads its compiler
def test_what_exchanges_is_not_compiled() -> None:
    """Forms are timed as often as a rank has time for: each would be at another exchange."""

    def loss(p: Any, b: Any, h: Any) -> Tensor:
        return D.copy(D.sum(part(p, b, h)))

    with pytest.warns(rd.CompileWarning, match=r"exchanges tensors by rd\.distributed"):
        unroll(loss, compile=True)
