"""Everything that could make the way back differ in silence: each either works, as autograd does, or ends in its named
error.

The rest of the catalogue is tested beside what it belongs to: in-place changes of batches, NaN in the Hessian product
alone, wrong shapes and dtypes in test_errors; the number of threads, autocast, dropout, BatchNorm, frozen, shared,
empty and 0-dim parameters, expanded and non-contiguous tensors in test_unroll; several threads in test_threads.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

import revdistill as rd
from tests.engine.small import CE

AGAIN = [rd.Reversible(graph_bytes=0), rd.Checkpoint(), rd.StoreAll()]  # every gradient is evaluated a second time
FIXED = [*AGAIN, rd.Reversible(), rd.Reversible(graph_bytes=2**20)]
EVERY = [*FIXED, rd.Backprop()]
STEPS = 10
Params = dict[str, Tensor]


def problem() -> tuple[Params, tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(0)
    params = {
        "a": torch.randn(3, dtype=torch.float64, generator=draw),
        "b": torch.randn(2, 2, dtype=torch.float64, generator=draw),
    }
    batches = (torch.randn(4, 3, dtype=torch.float64, generator=draw),)
    return {n: p.requires_grad_() for n, p in params.items()}, tuple(t.requires_grad_() for t in batches)


def quartic(params: Params, batch: tuple[Tensor, ...]) -> Tensor:
    return (params["a"] - batch[0]).abs().square().sum() * params["b"].square().sum()


def outer(theta: Params) -> Tensor:
    return torch.stack([p.sum() for p in theta.values()]).sum()


def unrolled(loss: Callable[..., Tensor], params: Params, batches: Any, adjoint: Any, **kwargs: Any) -> Tensor:
    optimizer = kwargs.pop("optimizer", rd.SGD(0.02, 0.9))
    return outer(rd.unroll(loss, params, batches, optimizer, steps=STEPS, adjoint=adjoint, **kwargs))


# --- caught: what differs from one call to the next
# -----------------------------------------------------------------------------


class Counting(nn.Module):
    """A module that counts its calls in an attribute, which no copy of its buffers can undo."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.layer(x) * (1 + 0.01 * self.calls)
        return result


def python_random() -> Callable[..., Tensor]:
    draw = random.Random(0)
    return lambda p, b: quartic(p, b) * (1 + 0.1 * draw.random())


def numpy_random() -> Callable[..., Tensor]:
    draw = np.random.default_rng(0)
    return lambda p, b: quartic(p, b) * (1 + 0.1 * draw.random())


def own_generator() -> Callable[..., Tensor]:
    draw = torch.Generator().manual_seed(0)
    return lambda p, b: quartic(p, b) * (1 + 0.1 * torch.rand((), generator=draw, dtype=torch.float64))


@pytest.mark.parametrize("adjoint", AGAIN, ids=repr)
@pytest.mark.parametrize("make", [python_random, numpy_random, own_generator], ids=lambda make: make.__name__)
def test_random_numbers_that_are_not_torchs_are_caught(make: Callable[[], Callable[..., Tensor]], adjoint: Any) -> None:
    params, batches = problem()
    value = unrolled(make(), params, batches, adjoint)
    with pytest.raises(rd.ReversalError, match=r"gradient at step .* must be deterministic"):
        value.backward()


@pytest.mark.parametrize("make", [python_random, numpy_random, own_generator], ids=lambda make: make.__name__)
def test_random_numbers_that_are_drawn_once_are_right(make: Callable[[], Callable[..., Tensor]]) -> None:
    """Where every graph is kept, nothing is evaluated again."""
    params, batches = problem()
    found, expected = (
        torch.autograd.grad(unrolled(make(), params, batches, adjoint), batches)[0]
        for adjoint in (rd.Reversible(graph_bytes=2**20), rd.Backprop())
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adjoint", AGAIN, ids=repr)
def test_a_module_that_counts_is_caught(adjoint: Any) -> None:
    torch.manual_seed(0)
    loss, params = rd.from_module(Counting().double(), CE)
    batches = (torch.randn(2, 5, 3, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.long))
    value = unrolled(loss, params, batches, adjoint)
    with pytest.raises(rd.ReversalError, match=r"the attribute 'calls' \(0, now \d+\).*no counters or other state"):
        value.backward()


@pytest.mark.parametrize("adjoint", FIXED, ids=repr)
def test_what_a_loss_keeps_between_its_calls_has_to_be_detached(adjoint: Any) -> None:
    """Where graphs are kept nothing is evaluated again, and the part of the way back through it would be missing."""

    def loss(kept: list[Tensor], detach: bool) -> Callable[..., Tensor]:
        def keeping(p: Params, b: tuple[Tensor, ...]) -> Tensor:
            value = quartic(p, b)
            last = kept[-1] if kept else 0.0
            kept.append(value.detach() if detach else value)
            return value + (0.1 * last * p["a"].sum() if len(kept) <= STEPS else 0.0)

        return keeping

    params, batches = problem()
    with pytest.raises(rd.UnsupportedError, match=r"keeps a tensor computed from params.*detach\(\) what is kept"):
        unrolled(loss([], detach=False), params, batches, adjoint)
    unrolled(loss([], detach=True), params, batches, adjoint)


@pytest.mark.parametrize("adjoint", AGAIN, ids=repr)
def test_data_in_another_order_is_caught(adjoint: Any) -> None:
    params, _ = problem()
    rows, order = torch.randn(100, 3, dtype=torch.float64), itertools.count()
    value = unrolled(quartic, params, lambda k: (rows[next(order)],), adjoint)
    with pytest.raises(rd.ReversalError, match="batches given as a function must return the same"):
        value.backward()


@pytest.mark.parametrize("adjoint", AGAIN, ids=repr)
def test_data_changed_behind_torchs_back_are_caught(adjoint: Any) -> None:
    """Through numpy, which shares the memory, torch's count of in-place changes does not move."""
    params, batches = problem()
    data = batches[0].detach()
    value = unrolled(quartic, params, (data,), adjoint)
    data.numpy()[:] += 1.0
    with pytest.raises(rd.ReversalError, match="gradient at step"):
        value.backward()


@pytest.mark.parametrize("adjoint", FIXED, ids=repr)
def test_hyper_changed_in_place_is_caught(adjoint: Any) -> None:
    params, batches = problem()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = unrolled(lambda p, b, h: quartic(p, b) * h, params, batches, adjoint, hyper=scale)
    with torch.no_grad():
        scale.mul_(2.0)
    with pytest.raises(rd.ReversalError, match="batches or hyper was changed in place"):
        value.backward()


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_a_loss_that_changes_its_params_is_named(adjoint: Any) -> None:
    def loss(params: Params, batch: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            params["a"].mul_(0.9)
        return quartic(params, batch)

    params, batches = problem()
    with pytest.raises(rd.UnsupportedError, match="changes params or a batch in place"):
        unrolled(loss, params, batches, adjoint)


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_a_loss_that_changes_its_batch_is_caught(adjoint: Any) -> None:
    def loss(params: Params, batch: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            batch[0].mul_(0.9)
        return quartic(params, batch)

    params, batches = problem()
    with pytest.raises(rd.UnsupportedError, match=r"changes .* batch.* in place"):
        unrolled(loss, params, batches, adjoint)


# --- refused: what has no gradient here
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_a_sparse_gradient_is_named(adjoint: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    loss, params = rd.from_module(net, CE)
    with pytest.raises(rd.UnsupportedError, match=r"sparse=False"):
        unrolled(loss, params, (torch.randint(0, 5, (2, 4, 2)), torch.zeros(2, 4, dtype=torch.long)), adjoint)


def test_tensors_elsewhere_are_named() -> None:
    """The meta device stands in for a second device, which not every machine has."""
    params, batches = problem()
    meta = torch.zeros((), device="meta")
    with pytest.raises(ValueError, match=r"params\['b'\] is on device meta"):
        unrolled(quartic, params | {"b": meta}, batches, None)
    with pytest.raises(ValueError, match=r"batches\[0\] is on device meta"):
        unrolled(quartic, params, (batches[0].to("meta"),), None)
    with pytest.raises(ValueError, match=r"hyper is on device meta"):
        unrolled(lambda p, b, h: quartic(p, b), params, batches, None, hyper=meta)
    with pytest.raises(ValueError, match=r"lr is on device meta"):
        unrolled(quartic, params, batches, None, optimizer=rd.SGD(meta))


def test_a_complex_loss_is_named() -> None:
    params, batches = problem()
    with pytest.raises(ValueError, match=r"scalar floating-point tensor, got shape \[\], torch.complex128"):
        unrolled(lambda p, b: quartic(p, b).to(torch.complex128), params, batches, None)


# --- works: the same hypergradient as plain autograd's
# --------------------------------------------------------------------------


def complex_batches() -> tuple[Callable[..., Tensor], Params, Any]:
    params, batches = problem()
    return quartic, params, (torch.complex(batches[0].detach(), batches[0].detach().flip(0)).requires_grad_(),)


def overlapping_parameters() -> tuple[Callable[..., Tensor], Params, Any]:
    _, batches = problem()
    memory = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
    params = {
        "a": memory[:3].detach().requires_grad_(),
        "b": memory.as_strided((2, 2), (1, 1), 1).detach().requires_grad_(),
    }
    return quartic, params, batches


def overlapping_batches() -> tuple[Callable[..., Tensor], Params, Any]:
    params, _ = problem()
    memory = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64, requires_grad=True)
    return quartic, params, (memory.unfold(0, 3, 1),)


def batches_of_another_dtype() -> tuple[Callable[..., Tensor], Params, Any]:
    params, batches = problem()
    return quartic, params, (batches[0].detach().float().requires_grad_(),)


def a_loss_of_another_dtype() -> tuple[Callable[..., Tensor], Params, Any]:
    params, batches = problem()
    return lambda p, b: quartic(p, b).float(), params, batches


def hooks_on_the_module() -> tuple[Callable[..., Tensor], Params, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    net[0].register_forward_hook(lambda module, inputs, output: output * 1.1)
    net[1].register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 0.5,))
    loss, params = rd.from_module(net, CE)
    x = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    return loss, params, (x, torch.zeros(4, 5, dtype=torch.long))


def a_hook_on_a_parameter() -> tuple[Callable[..., Tensor], Params, Any]:
    params, batches = problem()
    params["a"].register_hook(lambda gradient: gradient * 2)  # of the hypergradient: once, at the end
    return quartic, params, batches


def a_dense_embedding() -> tuple[Callable[..., Tensor], Params, Any]:
    torch.manual_seed(0)
    loss, params = rd.from_module(nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double(), CE)
    return loss, params, (torch.randint(0, 5, (4, 4, 2)), torch.zeros(4, 4, dtype=torch.long))


WORKS = [
    complex_batches,
    overlapping_parameters,
    overlapping_batches,
    batches_of_another_dtype,
    a_loss_of_another_dtype,
    hooks_on_the_module,
    a_hook_on_a_parameter,
    a_dense_embedding,
]


@pytest.mark.parametrize("adjoint", FIXED, ids=repr)
@pytest.mark.parametrize("make", WORKS, ids=lambda make: make.__name__)
def test_odd_but_right(make: Callable[[], tuple[Callable[..., Tensor], Params, Any]], adjoint: Any) -> None:
    found, expected = [], []
    for into, chosen in ((found, adjoint), (expected, rd.Backprop())):
        loss, params, batches = make()
        learned = [t for t in (*params.values(), *batches) if t.requires_grad]
        into += torch.autograd.grad(unrolled(loss, params, batches, chosen), learned)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        single = torch.float32 in (a.dtype, b.dtype) or make is a_loss_of_another_dtype
        torch.testing.assert_close(a, b, rtol=1e-5 if single else 1e-9, atol=1e-6 if single else 1e-12)


@pytest.mark.parametrize("adjoint", FIXED, ids=repr)
def test_schedules_and_results_may_change_between_the_passes(adjoint: Any) -> None:
    """They were read into tables, or are the caller's copy: the way back does not look at them again."""
    params, batches = problem()
    lr = torch.full((STEPS,), 0.02, dtype=torch.float64, requires_grad=True)
    rates = {"a": torch.full((STEPS,), 0.02, dtype=torch.float64), "b": 0.01}

    def hypergradient(change: bool) -> list[Tensor]:
        found = []
        for optimizer in (rd.SGD(lr), rd.SGD(rates)):
            theta = rd.unroll(quartic, params, batches, optimizer, steps=STEPS, adjoint=adjoint)
            value = outer(theta)
            if change:
                with torch.no_grad():
                    for t in (lr, rates["a"], theta["a"]):
                        t.mul_(0.5)
            found += torch.autograd.grad(value, [batches[0], lr], allow_unused=True)
            if change:
                with torch.no_grad():
                    for t in (lr, rates["a"]):
                        t.mul_(2.0)
        return [t for t in found if t is not None]

    assert all(map(torch.equal, hypergradient(change=True), hypergradient(change=False)))


@pytest.mark.parametrize("graph_bytes", [None, 0], ids=["graphs kept", "no graphs"])
@pytest.mark.parametrize("what", ["x", "y", "hyper"])
def test_data_changed_behind_torchs_back_are_an_error(what: str, graph_bytes: int | None) -> None:
    """Regression: where the graphs of the steps are kept nothing is evaluated again, and numpy shares memory."""
    x, y = torch.randn(3, 6, 4), torch.arange(18).reshape(3, 6) % 3
    scale = torch.tensor(1.5, requires_grad=True)
    net = nn.Linear(4, 3)
    base, params = rd.from_module(net, nn.functional.cross_entropy)

    def loss(p: dict[str, Tensor], batch: tuple[Tensor, ...], hyper: Tensor) -> Tensor:
        return base(p, batch) * hyper

    changed = {"x": x, "y": y, "hyper": scale}[what]
    theta = rd.unroll(
        loss, params, (x, y), rd.SGD(0.1), steps=7, hyper=scale, adjoint=rd.Reversible(graph_bytes=graph_bytes)
    )
    shared = changed.detach().numpy().reshape(-1)
    shared[-1] = shared[-1] + 1 if what != "y" else (shared[-1] + 1) % 3
    with pytest.raises(rd.ReversalError, match=r"data of step|not the same bit for bit"):
        sum(p.square().sum() for p in theta.values()).backward()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool, torch.complex64]
)
def test_batches_of_any_dtype_are_watched(dtype: torch.dtype) -> None:
    x = torch.ones(3, 4).to(dtype)
    w = torch.randn(4, requires_grad=True)

    def loss(p: dict[str, Tensor], batch: tuple[Tensor]) -> Tensor:
        return (p["w"] * torch.view_as_real(batch[0])[:, 0] if dtype.is_complex else p["w"] * batch[0]).square().sum()

    def unroll() -> Tensor:
        return rd.unroll(loss, {"w": w}, (x,), rd.SGD(0.1), steps=4)["w"].sum()

    unroll().backward()
    theta = unroll()
    x.data[0, 0] = 0  # .data: torch does not count it
    with pytest.raises(rd.ReversalError, match="data of step"):
        theta.backward()


@pytest.mark.parametrize("adjoint", [*FIXED, rd.Backprop()], ids=repr)
def test_a_loss_that_calls_backward_is_refused(adjoint: Any) -> None:
    """Regression: what it added to the gradients was dropped."""
    params, batches = problem()

    def loss(p: Params, b: tuple[Tensor, ...]) -> Tensor:
        value = quartic(p, b)
        value.backward(retain_graph=True)
        return value

    with pytest.raises(rd.UnsupportedError, match=r"calls \.backward\(\) itself.*sum of all terms"):
        unrolled(loss, params, batches, adjoint)
    assert all(p.grad is None for p in params.values())

    def penalised(p: Params, b: tuple[Tensor, ...]) -> Tensor:
        value = quartic(p, b)
        slopes = torch.autograd.grad(value, list(p.values()), create_graph=True)
        return value + 1e-3 * torch.cat([s.flatten() for s in slopes]).square().sum()

    unrolled(penalised, params, batches, adjoint).backward()

    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    for reached in (lambda b, h: 2 * h, lambda b, h: b[0].square().sum()):

        def through_data(p: Params, b: tuple[Tensor, ...], h: Tensor, reached: Any = reached) -> Tensor:
            reached(b, h).backward()
            return quartic(p, b) * h

        with pytest.raises(rd.UnsupportedError, match=r"calls \.backward\(\) itself"):
            unrolled(through_data, params, batches, adjoint, hyper=scale)
    assert scale.grad is None


def jvp(p: Params, b: tuple[Tensor, ...]) -> Tensor:
    _, slope = torch.func.jvp(lambda z: (z * p["a"]).tanh(), (b[0],), (torch.ones_like(b[0]),))
    return quartic(p, b) + slope.square().sum()


def hessian(p: Params, b: tuple[Tensor, ...]) -> Tensor:
    return quartic(p, b) + torch.func.hessian(lambda z: (z * p["a"]).tanh().sum())(b[0]).square().mean()


def sparse(p: Params, b: tuple[Tensor, ...]) -> Tensor:
    return quartic(p, b) + torch.sparse.mm(ADJACENCY, (p["a"] * b[0]).unsqueeze(1)).square().sum()


def dual(p: Params, b: tuple[Tensor, ...]) -> Tensor:
    with forward_ad.dual_level():
        made = forward_ad.make_dual(b[0], torch.ones_like(b[0]))
        tangent = forward_ad.unpack_dual((made * p["a"]).tanh()).tangent
    assert tangent is not None
    return quartic(p, b) + tangent.square().sum()


ADJACENCY = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=torch.float64).to_sparse()


@pytest.mark.parametrize("adjoint", [rd.Reversible(), rd.Reversible(graph_bytes=0)], ids=repr)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("loss", [jvp, hessian, sparse, dual])
def test_derivatives_and_sparse_tensors_within_a_loss_are_right(loss: Callable[..., Tensor], adjoint: Any) -> None:
    """Regression: to count a kept graph's bytes failed in torch's words; forward-mode derivatives were None."""
    params, (rows, *_) = problem()
    rows = rows.detach().requires_grad_()
    found = torch.autograd.grad(
        unrolled(loss, params, (rows,), adjoint, optimizer=rd.SGD(0.02, 0.5)), [rows, params["a"]]
    )
    theta, v = dict(params), {n: torch.zeros_like(p) for n, p in params.items()}
    for k in range(STEPS):
        slopes = torch.autograd.grad(loss(theta, (rows[k % len(rows)],)), list(theta.values()), create_graph=True)
        v = {n: 0.5 * v[n] + slope for n, slope in zip(theta, slopes, strict=True)}
        theta = {n: p - 0.02 * v[n] for n, p in theta.items()}
    value = outer(theta)
    for mine, theirs in zip(found, torch.autograd.grad(value, [rows, params["a"]]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11)
