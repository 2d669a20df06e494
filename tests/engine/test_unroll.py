"""What rd.unroll does beside the hypergradient: defaults, callbacks, random numbers, modules."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from revdistill.engine.loss.determinism import Determinism
from revdistill.engine.unrolled import default_adjoint
from tests.engine.small import CE, data, mlp, total

AGAIN = rd.Reversible(graph_bytes=0)  # each gradient once more on the way back


def test_the_example_of_the_contract() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    loss, params = rd.from_module(net, CE)
    x = torch.randn(30, 10, 1, 28, 28, requires_grad=True)
    y = torch.arange(10).expand(30, 10)
    eta = torch.full((90,), 0.02, requires_grad=True)
    theta = rd.unroll(loss, params, (x, y), rd.SGD(lr=eta, momentum=0.9), steps=90)
    outer = CE(torch.func.functional_call(net, theta, (torch.randn(20, 1, 28, 28),)), torch.arange(20) % 10)
    outer.backward()
    for t in (x, eta, *params.values()):
        assert t.grad is not None
        assert torch.isfinite(t.grad).all()
        assert t.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (rd.SGD(0.1, 0.9), rd.Reversible),
        (rd.SGD(0.1, 0.0), rd.Checkpoint),
        (rd.SGD(0.1, torch.tensor([0.9, 0.0, 0.9])), rd.Checkpoint),
        (rd.SGD(0.1, 0.9, nesterov=True), rd.Checkpoint),
        (rd.SGD(0.1, 1e-9), rd.Checkpoint),  # acts as the nearest n / 2^16, which is 0
    ],
)
def test_default_adjoint(optimizer: rd.SGD, expected: type, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def note(problem: Any) -> Any:
        chosen.append(default_adjoint(problem))
        return chosen[0]

    monkeypatch.setattr(importlib.import_module("revdistill.engine.unrolled"), "default_adjoint", note)
    loss, params = rd.from_module(mlp(), CE)
    rd.unroll(loss, params, data(5), optimizer, steps=3)
    assert type(chosen[0]) is expected


def test_on_step_sees_every_step() -> None:
    loss, params = rd.from_module(mlp(), CE)
    batches = data(5)
    for adjoint in (rd.Reversible(), rd.Checkpoint(), rd.StoreAll(), rd.Backprop()):
        seen: list[tuple[int, dict[str, Tensor], Tensor]] = []
        theta = rd.unroll(
            loss,
            params,
            batches,
            rd.SGD(0.1),
            steps=9,
            adjoint=adjoint,
            on_step=lambda k, p, v, seen=seen: seen.append((k, p, v)),
        )
        total(theta).backward()
        assert [k for k, _, _ in seen] == list(range(9))
        for k, p, value in seen:
            assert not value.requires_grad
            assert not any(t.requires_grad for t in p.values())
            torch.testing.assert_close(loss(p, tuple(t[k % 4] for t in batches)).detach(), value)


def test_stats() -> None:
    loss, params = rd.from_module(mlp(), CE)
    count = sum(p.numel() for p in params.values())
    steps = 700

    def stats(adjoint: Any) -> rd.UnrollStats:
        return rd.unroll(loss, params, data(5), rd.SGD(0.01), steps=steps, adjoint=adjoint, return_stats=True)[1]

    reversible = stats(rd.Reversible())
    assert (reversible.steps, reversible.parameters, reversible.state_bytes) == (steps, count, 24 * count)
    assert reversible.history_bytes == 2 * count * 5  # five spills of 16 bits in 700 steps
    assert reversible.history_bits_per_parameter_step == pytest.approx(80 / steps)
    with torch.no_grad():
        assert stats(rd.Reversible()) == reversible
    assert stats(rd.StoreAll()).history_bytes == 4 * count * steps
    assert stats(rd.Backprop()).history_bits_per_parameter_step is None


def test_random_numbers_are_the_same_both_ways_and_the_generator_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Dropout(0.5), nn.Linear(30, 3))
    loss, params = rd.from_module(net, CE)
    batches = data(5)

    def run(**kwargs: Any) -> Tensor:
        theta = rd.unroll(loss, params, batches, rd.SGD(0.1), steps=8, adjoint=AGAIN, **kwargs)
        total(theta).backward()  # ReversalError if the masks differed
        return torch.cat([p.detach().flatten() for p in theta.values()])

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = run(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(run(seed=3), first)
    assert not torch.equal(run(seed=4), first)
    drawn = run()
    assert not torch.equal(run(), drawn)
    torch.manual_seed(5)
    assert torch.equal(run(), drawn)


def test_batch_norm_leaves_the_modules_buffers_alone() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    before = {name: b.clone() for name, b in net.named_buffers()}
    loss, params = rd.from_module(net, CE)
    total(rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=5, adjoint=AGAIN)).backward()
    stacked, many = rd.stack_modules([net, net], CE)
    total(rd.unroll(stacked, many, data(5), rd.SGD(0.1), steps=5, adjoint=AGAIN)).backward()
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())


@pytest.mark.parametrize("shared", [True, False])
def test_a_stack_of_one_is_the_network_itself(shared: bool) -> None:
    net, (x, y) = mlp(), data(5)
    loss, params = rd.from_module(net, CE)
    stacked, many = rd.stack_modules([net], CE, shared_batches=shared)
    alone = rd.unroll(loss, params, (x, y), rd.SGD(torch.full((9,), 0.1), 0.9), steps=9)
    batches = (x, y) if shared else (x.unsqueeze(1), y.unsqueeze(1))
    in_stack = rd.unroll(stacked, many, batches, rd.SGD(torch.full((9, 1), 0.1), 0.9), steps=9)
    assert all(torch.equal(alone[name], in_stack[name][0]) for name in alone)


def test_frozen_shared_empty_and_scalar_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.again = nn.Linear(4, 4)
            self.again.weight = self.first.weight  # one parameter with two names
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.nothing = nn.Parameter(torch.zeros(0, 3))
            self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.again(torch.tanh(self.first(x))) * self.scale * self.frozen + self.nothing.sum()

    torch.manual_seed(0)
    loss, params = rd.from_module(Odd().double(), CE)
    assert set(params) == {"first.weight", "first.bias", "again.bias", "scale", "nothing"}
    x = torch.randn(4, 6, 4, dtype=torch.float64, requires_grad=True)
    found = []
    for adjoint in (AGAIN, rd.Backprop()):
        theta = rd.unroll(loss, params, (x, data(5)[1]), rd.SGD(0.1), steps=6, adjoint=adjoint)
        assert theta["scale"].shape == ()
        assert theta["nothing"].shape == (0, 3)
        found.append(torch.autograd.grad(total(theta), [x, params["scale"], params["first.weight"]]))
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)


def test_parameters_that_the_loss_ignores_keep_their_value() -> None:
    params = {"used": torch.ones(2, requires_grad=True), "unused": torch.full((3,), 0.5, requires_grad=True)}
    theta = rd.unroll(lambda p, b: p["used"].square().sum(), params, lambda k: (), rd.SGD(0.1), steps=4)
    total(theta).backward()
    assert theta["unused"].tolist() == [0.5] * 3
    assert params["unused"].grad is not None
    assert params["unused"].grad.tolist() == [1.0] * 3


def test_non_contiguous_and_expanded_tensors() -> None:
    loss, params = rd.from_module(mlp(), CE)
    x, y = data(5)
    straight = rd.unroll(loss, params, (x, y), rd.SGD(0.1), steps=6)
    expected = torch.autograd.grad(total(straight), x)[0]
    turned = x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    found = torch.autograd.grad(total(rd.unroll(loss, params, (turned, y), rd.SGD(0.1), steps=6)), turned)[0]
    torch.testing.assert_close(found, expected)
    params = {
        name: p.detach().t().contiguous().t().requires_grad_() if p.ndim == 2 else p for name, p in params.items()
    }
    total(rd.unroll(loss, params, (x, y[:1].expand(4, -1)), rd.SGD(0.1), steps=6)).backward()


def test_another_thread_count_and_autocast_around_one_pass_change_nothing() -> None:
    loss, params = rd.from_module(mlp(), CE)
    batches = data(5)
    expected = torch.autograd.grad(
        total(rd.unroll(loss, params, batches, rd.SGD(0.1), steps=6, adjoint=AGAIN)), batches[0]
    )[0]
    threads = torch.get_num_threads()
    outer = total(rd.unroll(loss, params, batches, rd.SGD(0.1), steps=6, adjoint=AGAIN))
    try:
        torch.set_num_threads(threads + 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = torch.autograd.grad(outer, batches[0])[0]
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found, expected)


def test_several_threads_walk_back_bit_for_bit() -> None:
    """Products, sums and loops that are large enough for torch to share them out. (Other tests have one thread.)"""
    torch.manual_seed(0)
    loss, params = rd.from_module(nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 10)).double(), CE)
    batches = torch.randn(2, 200, 300, dtype=torch.float64, requires_grad=True), torch.randint(10, (2, 200))
    threads, found = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        for adjoint in (AGAIN, rd.Backprop()):
            theta = rd.unroll(loss, params, batches, rd.SGD(0.1), steps=4, adjoint=adjoint)
            found.append(torch.autograd.grad(total(theta), batches[0])[0])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-12)


def test_autocast_around_both_passes_works() -> None:
    loss, params = rd.from_module(mlp(), CE)
    batches = data(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theta = rd.unroll(loss, params, batches, rd.SGD(0.1), steps=6, adjoint=AGAIN)
    total(theta).backward()
    plain = rd.unroll(loss, params, batches, rd.SGD(0.1), steps=6, adjoint=AGAIN)
    assert not torch.equal(theta["0.weight"], plain["0.weight"])


def test_settings_of_torch_are_restored() -> None:
    def settings() -> tuple[Any, ...]:
        return (
            torch.get_deterministic_debug_mode(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.get_num_threads(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.is_autocast_enabled("cpu"),
        )

    before = settings()
    loss, params = rd.from_module(mlp(), CE)
    total(rd.unroll(loss, params, data(5), rd.SGD(0.1), steps=3)).backward()
    with pytest.raises(ZeroDivisionError):
        rd.unroll(lambda p, b: 1 / 0, params, data(5), rd.SGD(0.1), steps=3)
    assert settings() == before


ADJOINTS: list[Any] = [rd.Reversible(), rd.Checkpoint(), rd.StoreAll(), rd.Backprop()]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_a_batch_computed_from_what_wants_a_gradient_is_refused(adjoint: Any) -> None:
    """Regression: passes are made without gradients, so that such a batch showed none, and x had no gradient in
    silence.
    """
    x, w = torch.randn(4, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"batches\(0\) returned a tensor of shape \[2\] that requires grad"):
        rd.unroll(
            lambda p, b: (p["w"] * b[0]).sum() ** 2,
            {"w": w},
            lambda k: (x[k] * 2,),
            rd.SGD(0.01),
            steps=4,
            adjoint=adjoint,
        )


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_callbacks_have_the_callers_grad_mode(adjoint: Any) -> None:
    loss, params = rd.from_module(mlp(), CE)
    x, y = (t.detach() for t in data(5))
    seen = []

    def batch(k: int) -> tuple[Tensor, ...]:
        seen.append(torch.is_grad_enabled())
        return x[k], y[k]

    def on_step(*_: Any) -> None:
        seen.append(torch.is_grad_enabled())

    for mode in (True, False):
        seen.clear()
        with torch.set_grad_enabled(mode):
            rd.unroll(loss, params, batch, rd.SGD(0.1), steps=2, adjoint=adjoint, on_step=on_step)
        assert seen == [mode] * 4


def test_step_seeds_differ() -> None:
    captured = Determinism.capture(torch.device("cpu"), 0)
    draws = []
    for k in range(50):
        with captured.step(k):
            draws.append(float(torch.rand(())))
    assert len(set(draws)) == 50


@pytest.mark.parametrize("networks", [1, 2])
@pytest.mark.parametrize("named", [False, True])
def test_a_batch_of_its_own_for_each_network_is_asked_for(networks: int, named: bool) -> None:
    nets = [torch.nn.Linear(3, 1) for _ in range(networks)]
    loss, params = rd.stack_modules(nets, torch.nn.functional.mse_loss, shared_batches=False)
    x, y = torch.ones(networks, 5, 3), torch.ones(5, 1)
    message = rf"batch\[{'y' if named else 1!r}\] has shape \[5, 1\], .* a batch of its own: \[{networks}, ...\]"
    batch = {"input": x, "y": y} if named else (x, y)
    with pytest.raises(ValueError, match=message):
        rd.unroll(loss, params, [batch], rd.SGD(0.1), steps=1)
    rd.unroll(
        loss,
        params,
        [batch | {"y": y.expand(networks, 5, 1)} if named else (x, y.expand(networks, 5, 1))],
        rd.SGD(0.1),
        steps=1,
    )
