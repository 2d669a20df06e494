"""hyper as nested tuples, lists and dicts of tensors: the loss gets them so, and each has its gradient."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from revdistill.engine.loss import compiled

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
    assert len(compiled._functions[total]) == 3
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
        (lambda: {leaf(1.0)}, TypeError, "hyper must be a tensor, or nested"),
    ],
)
def test_what_is_refused_is_named(hyper: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rd.unroll(loss, {"w": start()}, lambda k: (), rd.SGD(LR), steps=1, hyper=hyper())
