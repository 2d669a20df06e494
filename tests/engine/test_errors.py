"""A wrong hypergradient is never returned in silence: each fault ends in its named error, through rd.unroll."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd
from revdistill.engine.integers.loops import Loops

AGAIN = [rd.Reversible(graph_bytes=0), rd.Checkpoint(), rd.StoreAll()]  # every gradient is evaluated a second time
FIXED = [*AGAIN, rd.Reversible()]
EVERY = [*FIXED, rd.Backprop()]


def problem() -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    torch.manual_seed(0)
    params = {"a": torch.randn(3, dtype=torch.float64), "b": torch.randn(2, 2, dtype=torch.float64)}
    return {n: p.requires_grad_() for n, p in params.items()}, (
        torch.randn(4, 3, dtype=torch.float64).requires_grad_(),
    )


def quadratic(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    return (params["a"] - batch[0]).square().sum() + params["b"].square().sum()


def run(loss: Callable[..., Tensor] = quadratic, *, steps: int = 30, **kwargs: Any) -> Tensor:
    params, batches = problem()
    optimizer = kwargs.pop("optimizer", rd.SGD(0.05, 0.9))
    theta = rd.unroll(
        loss, kwargs.pop("params", params), kwargs.pop("batches", batches), optimizer, steps=steps, **kwargs
    )
    return torch.stack([p.sum() for p in theta.values()]).sum()


@pytest.mark.parametrize("adjoint", AGAIN, ids=repr)
def test_a_nondeterministic_loss_is_a_reversal_error(adjoint: Any) -> None:
    calls = itertools.count()

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        return quadratic(params, batch) * (1 + 1e-7 * next(calls))

    with pytest.raises(rd.ReversalError, match=r"must be deterministic.*Backprop"):
        run(loss, adjoint=adjoint).backward()


def test_one_different_bit_is_a_reversal_error() -> None:
    """The smallest fault there is: one unit in the last place of one gradient, at one step, on the way back only."""
    calls = itertools.count()

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        factor = 1 + 2.0**-40 if next(calls) == 45 else 1.0  # 30 steps forward, then step 14 on the way back
        return quadratic(params, batch) * factor

    with pytest.raises(rd.ReversalError, match=r"gradient at step 14 .* bit-exactly"):
        run(loss, adjoint=AGAIN[0]).backward()


@pytest.mark.parametrize("adjoint", AGAIN, ids=repr)
def test_a_gradient_that_differs_behind_the_same_loss_is_caught(adjoint: Any) -> None:
    """The loss's value and the state at the end say nothing of it: the fingerprint of the gradient does."""
    calls = itertools.count()

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        value = quadratic(params, batch)
        last = next(calls) >= 30 + (30 if isinstance(adjoint, rd.Checkpoint) else 0)
        slope = params["a"].sum()
        return value + (slope - slope.detach()) * (1e-9 if last else 0.0)

    with pytest.raises(rd.ReversalError, match="gradient at step"):
        run(loss, adjoint=adjoint).backward()


@pytest.mark.parametrize("adjoint", FIXED, ids=repr)
def test_leaving_the_range_names_parameter_step_and_value(adjoint: Any) -> None:
    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        return params["a"].square().sum() - params["b"].square().sum()  # b doubles, and doubles

    with pytest.raises(rd.RangeError, match=r"params\['b'\].*fractional_bits") as caught:
        run(loss, steps=200, optimizer=rd.SGD(0.5, 0.5), adjoint=adjoint)
    error = caught.value
    assert error.parameter == "b"
    assert 2**18 <= abs(error.value) < 2**21
    assert 5 < error.step < 60
    # one step less is fine, so the step is the very one
    run(loss, steps=error.step, optimizer=rd.SGD(0.5, 0.5), adjoint=adjoint)


def test_values_near_the_limit_that_never_reach_it_are_no_error() -> None:
    """The proved bounds are pessimistic; only the data decide."""
    params = {"a": torch.tensor([200_000.0], dtype=torch.float64, requires_grad=True)}

    def loss(p: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        return 0.125 * (p["a"] + 200_000).square().sum()

    theta = rd.unroll(loss, params, lambda k: (), rd.SGD(0.5, 0.5), steps=100)
    theta["a"].sum().backward()
    assert float(theta["a"].detach()) == pytest.approx(-200_000, rel=1e-6)


def test_a_start_out_of_range_is_a_range_error() -> None:
    params = {"w": torch.tensor([0.0, 1e6])}
    with pytest.raises(rd.RangeError, match=r"params\['w'\] left the fixed-point range at the start: 1e\+06"):
        rd.unroll(lambda p, b: p["w"].sum(), params, lambda k: (), rd.SGD(0.1), steps=1)


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_nan_at_step_17_names_the_step(adjoint: Any) -> None:
    steps = itertools.count()

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        bad = next(steps) == 17
        return quadratic(params, batch) + (params["b"] * float("nan")).sum() * bad if bad else quadratic(params, batch)

    with pytest.raises(rd.NonFiniteError, match=r"params\['b'\].*step 17") as caught:
        run(loss, adjoint=adjoint)
    assert (caught.value.parameter, caught.value.step) == ("b", 17)


@pytest.mark.parametrize("adjoint", FIXED, ids=repr)
def test_nan_in_the_hessian_product_only(adjoint: Any) -> None:
    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        return quadratic(params, batch) + (params["b"] * 0).abs().pow(1.5).sum()  # second derivative inf * 0 at 0

    with pytest.raises(rd.NonFiniteError, match="way back") as caught:
        run(loss, adjoint=adjoint).backward()
    assert caught.value.step == 29


@pytest.mark.parametrize("interval", [4, 32])
def test_batched_checks_find_the_same_step(interval: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the checks are read every so many steps, and the run is repeated to name the step: forced here on the
    CPU.
    """

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        return params["a"].square().sum() - params["b"].square().sum()

    with pytest.raises(rd.RangeError) as each:
        run(loss, steps=200, optimizer=rd.SGD(0.5, 0.5))
    expected = run(steps=70)
    monkeypatch.setattr(Loops, "interval", interval)
    with pytest.raises(rd.RangeError) as batched:
        run(loss, steps=200, optimizer=rd.SGD(0.5, 0.5))
    assert (each.value.parameter, each.value.step, each.value.value) == (
        batched.value.parameter,
        batched.value.step,
        batched.value.value,
    )
    with pytest.raises(rd.NonFiniteError) as caught:
        run(lambda p, b: quadratic(p, b) / 0, steps=3)
    assert caught.value.step == 0
    assert torch.equal(run(steps=70), expected)


@pytest.mark.parametrize("adjoint", FIXED, ids=repr)  # plain autograd does differentiate them
def test_closure_tensors_are_refused(adjoint: Any) -> None:
    scale = torch.ones(7, 3, dtype=torch.float64, requires_grad=True)
    for loss in (lambda p, b: quadratic(p, b) * scale.mean(), lambda p, b: quadratic(p, b) + scale.exp().sum()):
        with pytest.raises(ValueError, match=r"shape \[7, 3\].*hyper="):
            run(loss, adjoint=adjoint)
    run(lambda p, b: quadratic(p, b) * scale.detach().mean(), adjoint=adjoint)


@pytest.mark.parametrize("adjoint", FIXED, ids=repr)
def test_closure_tensors_are_refused_at_whichever_step_they_come(adjoint: Any) -> None:
    """Regression: only the first two steps were looked at; a learned penalty that sets in late got no gradient."""
    scale = torch.ones(7, 3, dtype=torch.float64, requires_grad=True)

    def loss(p: dict[str, Tensor], rows: Tensor, k: int) -> Tensor:
        return quadratic(p, (rows,)) * (scale if k == 5 else scale.detach()).mean()

    def batches(k: int) -> tuple[Tensor, int]:
        return torch.full((3,), float(k), dtype=torch.float64), k

    with pytest.raises(ValueError, match=r"at step 5 a tensor of shape \[7, 3\] .*hyper="):
        run(lambda p, b: loss(p, *b), adjoint=adjoint, batches=batches, steps=8)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_loss_with_leaves_of_its_own_is_called_once_per_step(keeps: bool) -> None:
    """Regression: it was called again at the first steps, and what counts its calls counted two. Only where it keeps
    one, as a closure does, is it: once.
    """
    calls, kept = [0], {}

    def penalised(p: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        calls[0] += 1
        probe = batch[0].detach().requires_grad_()
        if keeps:
            kept["probe"] = probe
        (slope,) = torch.autograd.grad(quadratic(p, (probe,)), probe, create_graph=True)
        return quadratic(p, batch) + slope.square().sum() + 0 * probe.sum()

    run(penalised, steps=8)
    assert calls[0] == 8 + keeps


def test_a_graph_whose_leaf_nobody_holds_is_a_closure_too() -> None:
    """Regression: the leaf was taken for one that the loss had made on its way."""
    scale = torch.zeros(3, dtype=torch.float64, requires_grad=True).exp()
    with pytest.raises(ValueError, match=r"shape \[3\] that requires grad but was not passed"):
        run(lambda p, b: quadratic(p, b) * scale.sum())


def test_a_kept_leaf_of_a_loss_that_does_not_repeat_itself_is_refused() -> None:
    calls, kept = itertools.count(), {}

    def loss(p: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        kept["probe"] = torch.full((2,), float(next(calls)), requires_grad=True)
        return quadratic(p, batch) + kept["probe"].sum()

    with pytest.raises(rd.UnsupportedError, match=r"keeps at step 0 a tensor of shape \[2\].*two values"):
        run(loss)


def test_tensors_kept_from_steps_long_ago_are_refused() -> None:
    queue: list[Tensor] = []

    def loss(p: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        value = quadratic(p, batch)
        queue.append(value)
        return value + (queue[-4] * p["a"].sum() if len(queue) > 6 else 0.0)

    with pytest.raises(rd.UnsupportedError, match="keeps a tensor computed from params"):
        run(loss)


@pytest.mark.parametrize("optimizer", [rd.SGD, lambda lr: rd.RMSprop(lr, momentum=0.5)], ids=["sgd", "rmsprop"])
def test_a_rate_that_shows_the_velocitys_last_digits_is_refused(optimizer: Any) -> None:
    """Regression: a loss in small units was not trained, in silence: its velocity was rounded to 0."""
    lr = torch.tensor([0.1, 1e11, 0.1], dtype=torch.float64)
    with pytest.raises(rd.RangeError, match=r"lr is 1e\+11 at step 1: .*2\^-44.*the loss.*bits than 44"):
        run(lambda p, b: quadratic(p, b) * 1e-12, optimizer=optimizer(lr), steps=3)
    with pytest.raises(rd.RangeError) as caught:
        run(optimizer=optimizer({"a": 0.1, "b": lr}), steps=3)
    assert (caught.value.parameter, caught.value.step) == ("b", 1)
    run(lambda p, b: quadratic(p, b) * 1e-6, optimizer=rd.SGD(1e5), steps=3)
    run(lambda p, b: quadratic(p, b) * 1e-12, optimizer=rd.Adam(1e-3), steps=3)
    run(lambda p, b: quadratic(p, b) * 1e-8, optimizer=rd.SGD(1e7), steps=3, adjoint=rd.Reversible(fractional_bits=50))
    large = {n: torch.full_like(p, 1e7).requires_grad_() for n, p in problem()[0].items()}
    run(
        lambda p, b: quadratic(p, b) * 1e-3,
        params=large,
        optimizer=rd.SGD(0.1),
        steps=3,
        adjoint=rd.Reversible(fractional_bits=20),
    )


def test_a_loss_that_ignores_params_is_refused() -> None:
    with pytest.raises(ValueError, match="does not depend on params"):
        run(lambda p, b: torch.ones(()))


@pytest.mark.parametrize("adjoint", FIXED, ids=repr)
def test_second_backward_and_second_derivative_say_what_to_do(adjoint: Any) -> None:
    outer = run(adjoint=adjoint)
    outer.backward(retain_graph=True)
    with pytest.raises(rd.UnsupportedError, match="add the losses before one backward"):
        outer.backward()
    _, batches = problem()
    (gradient,) = torch.autograd.grad(run(adjoint=adjoint, batches=batches), batches, create_graph=True)
    with pytest.raises(rd.UnsupportedError, match="Backprop"):
        torch.autograd.grad(gradient.sum(), batches, retain_graph=True)
    with pytest.raises(rd.UnsupportedError, match="Backprop"):
        gradient.sum().backward()


def test_backprop_has_second_derivatives() -> None:
    _, batches = problem()
    loss = run(lambda p, b: quadratic(p, b) * p["a"].exp().sum(), adjoint=rd.Backprop(), batches=batches, steps=3)
    (gradient,) = torch.autograd.grad(loss, batches, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), batches)
    assert second.abs().sum() > 0


@pytest.mark.parametrize("adjoint", FIXED, ids=repr)
def test_in_place_changes_of_batches_are_noticed(adjoint: Any) -> None:
    params, batches = problem()
    outer = run(params=params, batches=batches, adjoint=adjoint)
    with torch.no_grad():
        batches[0].add_(1.0)
    with pytest.raises(rd.ReversalError, match="changed in place"):
        outer.backward()


def test_parameters_may_change_between_the_passes() -> None:
    params, batches = problem()
    expected = torch.autograd.grad(run(params=params, batches=batches), batches)[0]
    outer = run(params=params, batches=batches)
    with torch.no_grad():
        params["a"].zero_()
    assert torch.equal(torch.autograd.grad(outer, batches)[0], expected)


def test_operators_without_second_derivatives_are_named() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad * ctx.saved_tensors[0]

    with pytest.raises(rd.UnsupportedError, match="second derivatives"):
        run(lambda p, b: Once.apply(p["a"]).sum() + p["b"].sum()).backward()
    rows = torch.ones(3, dtype=torch.float64)
    with pytest.raises(rd.UnsupportedError, match="second derivatives"):  # and where it is used late
        run(
            lambda p, b: quadratic(p, b) + (Once.apply(p["a"]).sum() if b[1] == 5 else 0.0),
            batches=lambda k: (rows, k),
            steps=8,
        )


@pytest.mark.parametrize("adjoint", FIXED, ids=repr)
def test_an_unroll_inside_a_loss_needs_backprop(adjoint: Any) -> None:
    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...], inner: Any) -> Tensor:
        theta = rd.unroll(quadratic, params, (batch[0].expand(2, -1),), rd.SGD(0.1, 0.5), steps=2, adjoint=inner)
        return theta["a"].pow(4).sum() + theta["b"].square().sum()

    def outer(inner: Any, outer: Any) -> Tensor:
        params, batches = problem()
        batches = tuple(t.detach() for t in batches)
        total = run(lambda p, b: loss(p, b, inner), steps=4, adjoint=outer, params=params, batches=batches)
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(params.values()))])

    with pytest.raises(rd.UnsupportedError, match="Backprop"):
        outer(inner=adjoint, outer=rd.Reversible())
    expected = outer(inner=rd.Backprop(), outer=rd.Backprop())
    torch.testing.assert_close(outer(inner=rd.Backprop(), outer=adjoint), expected, rtol=1e-9, atol=1e-12)


def test_operators_without_a_deterministic_kernel_are_named() -> None:
    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        index = torch.tensor([0, 0])
        return (
            quadratic(params, batch) + torch.zeros(3, dtype=torch.float64).put_(index, params["a"][:2].detach()).sum()
        )

    with pytest.raises(rd.UnsupportedError, match="no deterministic implementation"):
        run(loss)


def test_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(rd.UnsupportedError, match="no_grad"):
        run()


class Subclass(Tensor):
    """As DTensor is one."""


@pytest.mark.parametrize("place", ["params", "batches", "hyper", "lr", "betas"])
def test_subclasses_of_tensor_are_refused_by_name(place: str) -> None:
    made = torch.ones(3, dtype=torch.float64).as_subclass(Subclass)
    given: dict[str, Any] = {
        "params": {"params": {"a": made, "b": made}},
        "batches": {"batches": (made[None],)},
        "hyper": {"hyper": [{"x": made}], "loss": lambda p, b, h: quadratic(p, b)},
        "lr": {"optimizer": rd.SGD({"a": made[0], "b": 0.1})},
        "betas": {"optimizer": rd.Adam(0.1, betas=(made[0], 0.9))},
    }[place]
    label = {"params": r"params\['a'\]", "batches": r"batches\[0\]", "hyper": r"hyper\[0\]\['x'\]"}
    label |= {"lr": r"lr\['a'\]", "betas": r"betas\[0\]"}
    with pytest.raises(TypeError, match=rf"{label[place]} is a Subclass.*full_tensor\(\)"):
        run(**given)


def test_parameters_and_buffers_are_plain_tensors() -> None:
    a, b = torch.nn.Parameter(torch.ones(3).double()), torch.nn.Buffer(torch.ones(2, 2).double())
    run(params={"a": a, "b": b}).backward()
    assert a.grad is not None


def test_a_lazy_parameter_is_named() -> None:
    with pytest.raises(ValueError, match=r"params\['a'\] has no shape yet.*run one batch"):
        run(params={"a": torch.nn.parameter.UninitializedParameter()})


def test_frozen_entries_beside_others_are_trained_and_said() -> None:
    """torch.optim skips what has no gradient; here every entry of params is trained."""
    net = torch.nn.Linear(3, 1).double()
    net.bias.requires_grad_(False)

    def loss(p: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        return (batch[0] @ p["weight"].T + p["bias"] - 1).square().mean()

    params = dict(net.named_parameters())
    with pytest.warns(UserWarning, match=r"params\['bias'\] is a frozen parameter.*rd\.from_module") as said:
        theta = rd.unroll(loss, params, problem()[1], rd.SGD(0.1), steps=3)
    assert said[0].filename == __file__
    assert not torch.equal(theta["bias"], net.bias)
    for quiet in ({"weight": net.weight, "bias": net.bias.detach()}, {n: p.detach() for n, p in params.items()}):
        rd.unroll(loss, quiet, problem()[1], rd.SGD(0.1), steps=3)  # warnings are errors here


_A = torch.zeros(3)
BAD = {
    "loss": (dict(loss=3), TypeError, "loss must be callable"),
    "loss arity": (dict(loss=lambda p: p["a"].sum()), TypeError, r"loss\(params, batch\)"),
    "loss arity, hyper": (dict(hyper=_A.double()), TypeError, r"loss\(params, batch, hyper\)"),
    "loss shape": (dict(loss=lambda p, b: p["a"]), ValueError, r"scalar.*shape \[3\]"),
    "loss type": (dict(loss=lambda p, b: 1.0), TypeError, "scalar tensor, got float"),
    "params type": (dict(params=[_A]), TypeError, "params must be a dict"),
    "params empty": (dict(params={}), ValueError, "params is empty"),
    "params no numbers": (dict(params={"a": torch.zeros(0)}), ValueError, "no numbers"),
    "params dtype": (dict(params={"a": _A.half()}), ValueError, r"params\['a'\] has dtype torch.float16.*float32"),
    "params complex": (dict(params={"a": _A.to(torch.complex64)}), ValueError, "complex64"),
    "params mixed": (dict(params={"a": _A, "b": _A.double()}), ValueError, "one dtype"),
    "params sparse": (dict(params={"a": _A.to_sparse()}), ValueError, "to_dense"),
    "params values": (dict(params={"a": [1.0]}), TypeError, r"params\['a'\] must be a tensor, got list"),
    "params keys": (dict(params={1: _A}), TypeError, "str keys"),
    "batches type": (dict(batches=_A), TypeError, "batches must be a tuple"),
    "batches empty": (dict(batches=()), ValueError, "batches is empty"),
    "batches scalar": (dict(batches=(torch.zeros(()),)), ValueError, r"batches\[0\] has shape \[\]"),
    "batches lengths": (
        dict(batches=(torch.zeros(4, 3), torch.zeros(5))),
        ValueError,
        r"batches\[1\] holds 5.*batches\[0\] holds 4",
    ),
    "batches grad": (dict(batches=lambda k: (torch.ones(3, requires_grad=True),)), ValueError, "not differentiated"),
    "optimizer": (
        dict(optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)])),
        TypeError,
        r"optimizer must be rd.SGD.*got torch.optim.SGD; write .*state=rd.OptimizerState.from_torch",
    ),
    "a network as the loss": (
        dict(loss=torch.nn.Linear(2, 3)),
        TypeError,
        r"loss must be callable as loss\(params, batch\).* A network is no loss: write loss, params = rd.from_module",
    ),
    "a network as params": (
        dict(params=torch.nn.Linear(2, 3)),
        TypeError,
        "got Linear; write loss, params =",
    ),
    "a data set": (
        dict(batches=torch.utils.data.TensorDataset(torch.zeros(4, 3))),
        TypeError,
        r"batches is a TensorDataset, which gives single examples; .*rd.Minibatches\(dataset.tensors, rd.epochs",
    ),
    "optimizer's class": (dict(optimizer=rd.SGD), TypeError, "got the class SGD, not an instance"),
    "steps type": (dict(steps=2.5), TypeError, "steps must be an int, got float"),
    "steps negative": (dict(steps=-1), ValueError, "steps must be at least 0, got -1"),
    "adjoint": (dict(adjoint="reversible"), TypeError, "adjoint must be rd.Reversible"),
    "adjoint class": (dict(adjoint=rd.Checkpoint), TypeError, "got Checkpoint"),
    "on_step": (dict(on_step=3), TypeError, r"on_step must be callable as on_step\(k, theta, loss\), got int"),
    "on_step's arguments": (
        dict(on_step=lambda k, loss: None),
        TypeError,
        r"on_step must be callable as on_step\(k, theta, loss\); its signature is \(k, loss\)",
    ),
    "on_step_back's arguments": (
        dict(on_step_back=lambda norm: None),
        TypeError,
        r"on_step_back must be callable as on_step_back\(k, norm\); its signature is \(norm\)",
    ),
    "save_at type": (dict(save_at=5), TypeError, "save_at must be a list of steps, got int"),
    "save_at empty": (dict(save_at=[]), ValueError, "save_at is empty; it must hold at least one step from 0 to 30"),
    "save_at entry": (dict(save_at=[1, 2.0]), TypeError, r"save_at\[1\] must be an int, got float"),
    "save_at beyond": (dict(save_at=[1, 31]), ValueError, r"save_at\[1\] is 31; with steps=30 it must be from 0 to 30"),
    "seed": (dict(seed=-1), ValueError, "seed must be at least 0"),
    "hyper": (dict(loss=lambda p, b, h: p["a"].sum(), hyper=3.0), TypeError, "hyper must be a tensor"),
    "lr type": (dict(optimizer=rd.SGD("fast")), TypeError, "lr must be a float, a tensor or a schedule, got str"),
    "lr shape": (dict(optimizer=rd.SGD(torch.zeros(29))), ValueError, r"lr has shape \[29\]; with steps=30"),
    "lr dims": (dict(optimizer=rd.SGD(torch.zeros(30, 2, 2))), ValueError, r"lr has shape \[30, 2, 2\]"),
    "lr networks": (
        dict(optimizer=rd.SGD(torch.zeros(30, 4))),
        ValueError,
        r"4 stacked networks.*leading dimension must be 4",
    ),
    "lr integers": (dict(optimizer=rd.SGD(torch.ones(30, dtype=torch.int64))), TypeError, "floating-point"),
    "lr negative": (dict(optimizer=rd.SGD(-0.1)), ValueError, "lr must be finite and at least 0, got -0.1"),
    "lr nan": (dict(optimizer=rd.SGD(float("nan"))), ValueError, "lr must be finite"),
    "momentum": (dict(optimizer=rd.SGD(0.1, 1.5)), ValueError, "momentum must be finite and between 0 and 1, got 1.5"),
    "momentum shape": (dict(optimizer=rd.SGD(0.1, torch.zeros(30, 2))), ValueError, r"momentum has shape \[30, 2\]"),
    "groups": (dict(optimizer=rd.SGD({"a": 0.1})), ValueError, r"lr is a dict with nothing for \['b'\]"),
    "unknown group": (dict(optimizer=rd.SGD({"a": 0.1, "b": 0.1, "c": 1.0})), ValueError, r"unknown names \['c'\]"),
    "group shape": (dict(optimizer=rd.SGD({"a": 0.1, "b": torch.ones(3)})), ValueError, r"lr\['b'\] has shape \[3\]"),
    "dampening": (dict(optimizer=rd.SGD(0.1, dampening=2.0)), ValueError, "dampening must be between 0 and 1"),
    "nesterov": (dict(optimizer=rd.SGD(0.1, 0.0, nesterov=True)), ValueError, "nesterov=True needs momentum"),
    "nesterov type": (dict(optimizer=rd.SGD(0.1, nesterov=1)), TypeError, "nesterov must be a bool"),
    "weight decay": (dict(optimizer=rd.SGD(0.1, weight_decay=-1.0)), ValueError, "weight_decay must be finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_are_named(name: str) -> None:
    kwargs, error, message = BAD[name]
    with pytest.raises(error, match=message):
        run(**kwargs)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rd.Reversible(history="/no/such/folder/x"), ValueError, "history must be"),
        (lambda: rd.Reversible(history=3), TypeError, "history must be"),
        (lambda: rd.Reversible(fractional_bits=61), ValueError, "fractional_bits"),
        (lambda: rd.Reversible(fractional_bits=4.0), TypeError, "fractional_bits"),
        (lambda: rd.Checkpoint(every=0), ValueError, "every must be at least 1"),
        (lambda: rd.Checkpoint(every=2.0), TypeError, "every must be an int"),
        (lambda: rd.from_module(3, sum), TypeError, "net must be a torch.nn.Module"),
        (lambda: rd.from_module(torch.nn.Linear(1, 1), 3), TypeError, "criterion"),
        (lambda: rd.from_module(torch.nn.ReLU(), sum), ValueError, "no parameter"),
        (lambda: rd.stack_modules([], sum), ValueError, "nets is empty"),
        (lambda: rd.stack_modules([torch.nn.Linear(1, 1), torch.nn.Linear(2, 1)], sum), ValueError, r"nets\[1\]"),
    ],
)
def test_settings_are_checked_when_made(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_data_set_in_the_place_of_batches_is_warned_about() -> None:
    """It trains on one example per step, as it is asked to; a stack, or a loss of one's own, may mean it."""
    loss, params = rd.from_module(torch.nn.Linear(4, 3), torch.nn.functional.cross_entropy)
    x, y = torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)
    for batches in ((x, y), {"input": x, "target": y}):
        with pytest.warns(UserWarning, match=r"last entry has shape \[5\]: each step gets a single example") as seen:
            rd.unroll(loss, params, batches, rd.SGD(0.1), steps=2)
        assert seen[0].filename == __file__
    for fine in ([(x, y)], (x[:, None], y[:, None]), rd.Minibatches((x, y), rd.epochs(5, 2, 1))):
        rd.unroll(loss, params, fine, rd.SGD(0.1), steps=2)
    rd.unroll(lambda p, batch: loss(p, batch), params, (x, y), rd.SGD(0.1), steps=2)
