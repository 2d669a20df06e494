"""hyper as nested tuples, lists and dicts of tensors: the loss gets them so, and each has its gradient."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from revdistill.engine.loss import compile_cache

EVERY = [rd.Reversible(graph_bytes=0), rd.Reversible(), rd.Checkpoint(), rd.StoreAll(), rd.Backprop()]
STEPS, LR = 4, 0.1


class Pair(NamedTuple):
    """One of the forms."""

    scale: Tensor
    shift: Tensor


def leaf(value: float, *, wanted: bool = True) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=wanted)


def nested() -> dict[Any, Any]:
    return OrderedDict(
        penalty={"a": (leaf(0.1), leaf(0.2)), "b": [leaf(0.3, wanted=False)]}, pair=Pair(leaf(1.1), leaf(0.5)), empty=()
    )


class Named(dict[str, Any]):
    """A dict whose entries are attributes too, as configurations have it."""

    def __init__(self, entries: Any) -> None:
        super().__init__({key: Named(value) if type(value) is dict else value for key, value in entries.items()})

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Squares(dict[str, Tensor]):
    """A dict that gives something else than it holds."""

    def __getitem__(self, key: str) -> Tensor:
        return super().__getitem__(key) ** 2


class Changed(dict[str, Tensor]):
    """A dict with an attribute that is no entry."""

    def __init__(self, power: Any = 1, **entries: Tensor) -> None:
        super().__init__(entries or power)
        self.power = power


class Unlike(list[Tensor]):
    """A list that is made of its entries one by one."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__([first, second])


def loss(p: dict[str, Tensor], batch: Any, hyper: Any) -> Tensor:
    assert list(hyper) == ["penalty", "pair", "empty"]
    assert isinstance(hyper["pair"], Pair)
    assert isinstance(hyper["penalty"]["b"], list)
    (first, second), (third,) = hyper["penalty"]["a"], hyper["penalty"]["b"]
    fit = (hyper["pair"].scale * p["w"] - hyper["pair"].shift).pow(2).sum()
    return fit + first * p["w"].pow(4).sum() + second * p["w"].exp().sum() + third * p["w"].sum()


def start() -> Tensor:
    return torch.linspace(0.5, 1.0, 3, dtype=torch.float64)


def wanted(hyper: Any) -> list[Tensor]:
    return [*hyper["penalty"]["a"], *hyper["pair"]]


def by_loop() -> list[Tensor]:
    hyper, w = nested(), start().requires_grad_()
    theta = w
    for _ in range(STEPS):
        (gradient,) = torch.autograd.grad(loss({"w": theta}, None, hyper), theta, create_graph=True)
        theta = theta - LR * gradient
    return list(torch.autograd.grad(theta.pow(3).sum(), [w, *wanted(hyper)]))


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_gradients_of_every_leaf(adjoint: Any) -> None:
    hyper, w = nested(), start().requires_grad_()
    theta = rd.unroll(loss, {"w": w}, lambda k: (), rd.SGD(LR, 0.0), steps=STEPS, hyper=hyper, adjoint=adjoint)
    found = torch.autograd.grad(theta["w"].pow(3).sum(), [w, *wanted(hyper)])
    for mine, expected in zip(found, by_loop(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("adjoint", [None, rd.Backprop()], ids=repr)
def test_types_of_ones_own_stay_what_they_are(adjoint: Any) -> None:
    """Regression: every dict became a plain one, and a table's rows plain tuples or dicts."""

    def total(p: dict[str, Tensor], batch: Any, hyper: Any) -> Tensor:
        assert isinstance(hyper.missing, defaultdict)
        assert hyper.missing["other"] == 0.5
        return (hyper.inner.a * batch.scale * p["w"] - batch.shift).square().sum() * hyper.squares["a"]

    a, two = leaf(0.3), leaf(2.0)
    hyper = Named({"inner": {"a": a}, "squares": Squares(a=two), "missing": defaultdict(lambda: 0.5, one=leaf(1.0))})
    rows = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    found = []
    for table in (Pair(rows, rows + 1), Named({"scale": rows, "shift": rows + 1})):
        w = start()[:2].requires_grad_()
        theta = rd.unroll(total, {"w": w}, table, rd.SGD(LR, 0.0), steps=1, hyper=hyper, adjoint=adjoint)
        found.append((theta["w"].detach(), *torch.autograd.grad(theta["w"].sum(), [w, a, two])))
    w = start()[:2].requires_grad_()
    value = (a * rows[0] * w - rows[0] - 1).square().sum() * two**2
    expected = w - LR * torch.autograd.grad(value, w, create_graph=True)[0]
    gradients = torch.autograd.grad(expected.sum(), [w, a, two])
    for one in found:
        torch.testing.assert_close(one, (expected.detach(), *gradients), rtol=1e-8, atol=1e-11)


def test_a_state_dict() -> None:
    net = nn.Linear(3, 1).double()

    def total(p: dict[str, Tensor], batch: Any, hyper: Any) -> Tensor:
        return (p["w"] - torch.func.functional_call(net, hyper, (p["w"].detach(),))).square().sum()

    for hyper in (net.state_dict(), net.state_dict(keep_vars=True)):
        rd.unroll(total, {"w": start()}, lambda k: (), rd.SGD(LR), steps=1, hyper=hyper)


def test_a_compiled_loss_is_kept_by_the_form_of_its_hyper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)

    def total(p: dict[str, Tensor], batch: Any, hyper: Any) -> Tensor:
        one, two = (hyper["a"], hyper["b"]) if isinstance(hyper, dict) else (hyper[0], hyper[1][0])
        return (one * p["w"].square() + two * p["w"]).sum()

    found = []
    for hyper in ({"a": leaf(0.5), "b": leaf(2.0)}, (leaf(0.5), [leaf(2.0)]), (leaf(0.5), (leaf(2.0),))):
        w = start().requires_grad_()
        theta = rd.unroll(total, {"w": w}, lambda k: (), rd.SGD(LR), steps=2, hyper=hyper, compile=True)
        found.append(torch.autograd.grad(theta["w"].sum(), w)[0])
    assert len(compile_cache._of[total].kept) == 3
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("hyper", "error", "message"),
    [
        (lambda: {"a": [leaf(1.0), 2.0]}, TypeError, r"hyper\['a'\]\[1\] must be a tensor, got float"),
        (
            lambda: [leaf(1.0), {"b": torch.zeros((), device="meta")}],
            ValueError,
            r"hyper\[1\]\['b'\] is on device meta",
        ),
        (lambda: nn.Linear(2, 2), TypeError, r"the module Linear; pass hyper=dict\(module.named_parameters\(\)\)"),
        (
            lambda: {"a": Changed(2, t=leaf(1.0))},
            TypeError,
            r"hyper\['a'\] is a Changed, .*calling Changed with its entries makes another one.*plain dict",
        ),
        (
            lambda: [Unlike(leaf(1.0), leaf(2.0))],
            TypeError,
            r"hyper\[0\] is a Unlike, .*raises TypeError: .*plain dict",
        ),
        (lambda: {leaf(1.0)}, TypeError, "hyper must be a tensor, or nested"),
    ],
)
def test_what_is_refused_is_named(hyper: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rd.unroll(loss, {"w": start()}, lambda k: (), rd.SGD(LR), steps=1, hyper=hyper())
