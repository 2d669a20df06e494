"""Parameters without a gradient: left as they are, as torch.optim does; refused where some steps have one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd
from revdistill.engine.loss import compiled

STEPS = 3
SETTINGS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (rd.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}),
    "sgd, no momentum": (rd.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.1}),
    "nesterov": (rd.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "nesterov": True}),
    "adam": (rd.Adam, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1}),
    "adamw": (rd.AdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "rmsprop": (rd.RMSprop, torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}),
}
ADJOINTS = [None, rd.Reversible(), rd.StoreAll(), rd.Backprop()]


def params(**values: float) -> dict[str, Tensor]:
    return {n: torch.full((2,), v, dtype=torch.float64, requires_grad=True) for n, v in values.items()}


def one_is_unused(p: dict[str, Tensor], batch: Any) -> Tensor:
    return (p["used"] - batch[0]).square().sum()


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_beginning_again_calls_nothing_twice(adjoint: Any) -> None:
    """Regression: the unroll that finds out at its first step what to spare began with that step's second batch, and a
    module that counts its calls had counted two.
    """
    calls: list[float] = []
    rows = iter([0.5, 1.5, 2.5])

    def loss(p: dict[str, Tensor], batch: tuple[float]) -> Tensor:
        calls.append(batch[0])
        return one_is_unused(p, batch)

    start = params(unused=1.0, used=1.5)
    norms: list[int] = []
    theta = rd.unroll(
        loss,
        start,
        lambda k: (next(rows),),
        rd.SGD(0.1, 0.5, weight_decay=0.1),
        steps=STEPS,
        adjoint=adjoint,
        on_step=lambda k, *_: norms.append(k),
        on_step_back=lambda k, _: norms.append(k),
    )
    assert calls == [0.5, 1.5, 2.5]
    assert norms == [0, 1, 2]
    if isinstance(adjoint, rd.StoreAll):
        return  # evaluates again, and the batches are used up
    (found,) = torch.autograd.grad(theta["used"].sum(), start["used"])
    torch.testing.assert_close(found, linear(start["used"].detach()), rtol=1e-9, atol=0)
    assert norms == [0, 1, 2, 2, 1, 0]


def linear(theta: Tensor) -> Tensor:
    """The derivative of the last parameter by the first, which moves by momentum .5, rate .1, decay .1."""
    d, v = torch.ones_like(theta), torch.zeros_like(theta)
    for _ in range(STEPS):
        v = 0.5 * v + (2 + 0.1) * d
        d = d - 0.1 * v
    return d


NOT_WALKED_BACK = ("nesterov", "sgd, no momentum")


@pytest.mark.parametrize(
    ("name", "adjoint"),
    [
        (name, adjoint)
        for name in SETTINGS
        for adjoint in ADJOINTS
        if not (isinstance(adjoint, rd.Reversible) and name in NOT_WALKED_BACK)
    ],
    ids=str,
)
def test_an_unused_parameter_stays_as_it_is(name: str, adjoint: Any) -> None:
    """Regression: weight decay pulled at it."""
    ours, theirs, settings = SETTINGS[name]
    start = params(unused=1.0, used=1.5)
    own = {n: p.detach().clone().requires_grad_() for n, p in start.items()}
    optimizer = theirs(own.values(), **settings)
    for _ in range(STEPS):
        optimizer.zero_grad()
        one_is_unused(own, (0.5,)).backward()
        optimizer.step()

    decay = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    settings = settings | {"weight_decay": decay}
    theta = rd.unroll(one_is_unused, start, lambda k: (0.5,), ours(**settings), steps=STEPS, adjoint=adjoint)
    for n, p in own.items():
        torch.testing.assert_close(theta[n], p, rtol=1e-5, atol=0)
    assert torch.equal(theta["unused"], start["unused"])

    found = torch.autograd.grad(theta["unused"].sum(), [start["unused"], decay], retain_graph=True, allow_unused=True)
    assert torch.equal(found[0], torch.ones(2, dtype=torch.float64))
    assert not found[1]


def test_the_other_gradients_are_those_of_training_without_it() -> None:
    def found(start: dict[str, Tensor]) -> list[Tensor]:
        decay = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        lr = torch.full((STEPS,), 0.1, dtype=torch.float64, requires_grad=True)
        theta = rd.unroll(one_is_unused, start, lambda k: (0.5,), rd.AdamW(lr, weight_decay=decay), steps=STEPS)
        return list(torch.autograd.grad(theta["used"].sum(), [start["used"], decay, lr]))

    torch.testing.assert_close(found(params(unused=1.0, used=1.5)), found(params(used=1.5)), rtol=1e-12, atol=0)


def test_groups_keep_their_decays() -> None:
    start = params(unused=1.0, used=1.5, other=2.0)
    decays: dict[str, Any] = {"unused": 0.3, "used": 0.1, "other": lambda k: 0.2}

    def loss(p: dict[str, Tensor], _: Any) -> Tensor:
        return p["used"].square().sum() + p["other"].square().sum()

    theta = rd.unroll(loss, start, lambda k: (), rd.SGD(0.1, 0.5, weight_decay=decays), steps=1)
    assert theta["unused"].tolist() == [1.0, 1.0]
    torch.testing.assert_close(theta["used"], start["used"] * (1 - 0.1 * 2.1))
    torch.testing.assert_close(theta["other"], start["other"] * (1 - 0.1 * 2.2))


def first_step_only(k: int) -> tuple[int]:
    return (k,)


def used_at(when: Callable[[int], bool]) -> Callable[[dict[str, Tensor], Any], Tensor]:
    def loss(p: dict[str, Tensor], batch: tuple[int]) -> Tensor:
        value = p["always"].square().sum()
        return value + p["sometimes"].square().sum() if when(batch[0]) else value

    return loss


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize(
    ("when", "message"),
    [
        (lambda k: k == 0, r"params\['sometimes'\] no gradient at step 1 and a gradient at step 0"),
        (lambda k: k == 2, r"params\['sometimes'\] a gradient at step 2 and no gradient at step 0"),
    ],
    ids=["lost", "gained"],
)
@pytest.mark.parametrize("optimizer", [rd.SGD(0.1, 0.5), rd.AdamW(0.1)], ids=["sgd", "adamw"])
def test_a_gradient_at_some_steps_only_is_refused(
    optimizer: Any, when: Callable[[int], bool], message: str, adjoint: Any
) -> None:
    """Regression: a velocity, or a penalty, went on where torch leaves the parameter alone."""
    with pytest.raises(rd.UnsupportedError, match=message) as error:
        rd.unroll(
            used_at(when),
            params(always=1.0, sometimes=1.0),
            first_step_only,
            optimizer,
            steps=STEPS,
            adjoint=adjoint,
        )
    assert "add 0 * params['sometimes'].sum() to the loss" in str(error.value)


@pytest.mark.parametrize("adjoint", [rd.Checkpoint(), rd.Backprop()], ids=repr)
def test_without_memory_it_may_come_and_go(adjoint: Any) -> None:
    """SGD without momentum and penalty: no gradient, no step, in torch as here."""
    theta = rd.unroll(
        used_at(lambda k: k == 1),
        params(always=1.0, sometimes=1.0),
        first_step_only,
        rd.SGD(0.1, 0.0),
        steps=STEPS,
        adjoint=adjoint,
    )
    torch.testing.assert_close(theta["sometimes"], torch.full((2,), 0.8, dtype=torch.float64))


def test_the_remedy_works() -> None:
    def loss(p: dict[str, Tensor], batch: tuple[int]) -> Tensor:
        return used_at(lambda k: k == 0)(p, batch) + 0 * p["sometimes"].sum()

    theta = rd.unroll(loss, params(always=1.0, sometimes=1.0), first_step_only, rd.SGD(0.1, 0.5), steps=2)
    torch.testing.assert_close(theta["sometimes"], torch.full((2,), 1 - 0.2 - 0.1, dtype=torch.float64))


def test_compiled_it_is_spared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the compiler makes: which parameters are used is seen before."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(compiled, "best_times", lambda first, second: (1.0, 2.0))
    theta = rd.unroll(
        one_is_unused, params(unused=1.0, used=1.5), lambda k: (0.5,), rd.AdamW(0.1), steps=STEPS, compile=True
    )
    assert theta["unused"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_a_loss_that_uses_none_is_named(adjoint: Any) -> None:
    """Whether it has a graph to something else, or none."""
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for loss in (lambda p, b, h: h.square(), lambda p, b, h: h.detach()):
        with pytest.raises(ValueError, match="the loss does not depend on params"):
            rd.unroll(loss, params(w=1.0), lambda k: (), rd.AdamW(0.1), steps=STEPS, hyper=scale, adjoint=adjoint)


@pytest.fixture
def compiled_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.func's gradient itself: 0 where one is missing, as the compiled one's is."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(compiled, "best_times", lambda first, second: (1.0, 2.0))


@pytest.mark.usefixtures("compiled_without_a_compiler")
@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("when", [lambda k: k == 0, lambda k: k == 2], ids=["lost", "gained"])
def test_compiled_it_is_refused_too(
    when: Callable[[int], bool], immediate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: only the first step was looked at. On a device the numbers are read some steps later."""
    linearize = compiled.CompiledGradient.linearize

    def here(self: Any, k: int, theta: Tensor) -> Any:
        self.fingerprints.immediate = immediate
        return linearize(self, k, theta)

    monkeypatch.setattr(compiled.CompiledGradient, "linearize", here)
    with pytest.raises(rd.UnsupportedError, match=r"params\['sometimes'\].* at step [12]"):
        rd.unroll(
            used_at(when),
            params(always=1.0, sometimes=1.0),
            first_step_only,
            rd.SGD(0.1, 0.5),
            steps=STEPS,
            compile=True,
            adjoint=rd.StoreAll(),
        )


@pytest.mark.usefixtures("compiled_without_a_compiler")
def test_compiled_a_gradient_of_zero_is_no_missing_one() -> None:
    def loss(p: dict[str, Tensor], batch: tuple[int]) -> Tensor:
        return p["always"].square().sum() + p["sometimes"].sum() * float(batch[0] == 0)

    theta = rd.unroll(
        loss, params(always=1.0, sometimes=1.0), first_step_only, rd.SGD(0.1, 0.5), steps=STEPS, compile=True
    )
    torch.testing.assert_close(theta["sometimes"], torch.full((2,), 1 - 0.1 * 1.75, dtype=torch.float64))


@pytest.mark.parametrize("optimizer", [rd.Adam(0.1), rd.SGD(0.1, 0.5, dampening=0.5)], ids=["adam", "sgd"])
def test_used_in_a_later_piece_only_is_refused(optimizer: Any) -> None:
    """Regression: torch.optim begins to count there, for Adam's bias correction and for dampening."""
    start = params(always=1.0, sometimes=1.0)
    theta, state = rd.unroll(used_at(lambda k: k >= 2), start, first_step_only, optimizer, steps=2, return_state=True)
    theta, state = rd.unroll(
        used_at(lambda k: False), theta, first_step_only, optimizer, steps=0, state=state, return_state=True
    )
    with pytest.raises(
        rd.UnsupportedError, match=r"params\['sometimes'\] a gradient at step 2, and gave it none before"
    ):
        rd.unroll(used_at(lambda k: k >= 2), theta, first_step_only, optimizer, steps=2, state=state)
