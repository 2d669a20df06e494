"""Schedules that are not learned: functions of the step, and torch's schedulers, which are held against torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as torchs

import revdistill as rd
from tests.engine.small import CE

STEPS = 10


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(3, 6, 4, dtype=torch.float64, generator=draw), torch.arange(18).reshape(3, 6) % 3


def two_after_each_other(o: torch.optim.Optimizer) -> Any:
    return torchs.SequentialLR(
        o, [torchs.LinearLR(o, total_iters=4), torchs.CosineAnnealingLR(o, STEPS)], milestones=[4]
    )


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda o: torchs.CosineAnnealingLR(o, STEPS),
    "step": lambda o: torchs.StepLR(o, 3),
    "lambda": lambda o: torchs.LambdaLR(o, lambda k: 0.9**k),
    "sequential": two_after_each_other,
    "one cycle": lambda o: torchs.OneCycleLR(o, 0.5, total_steps=STEPS + 1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_followed_as_torch_does(name: str) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    loss, params = rd.from_module(net, CE)
    ours = rd.SGD(lr=scheduler, momentum=scheduler)
    theta = rd.unroll(loss, params, data(), ours, steps=STEPS)

    x, y = data()
    for k in range(STEPS):  # the scheduler has stayed where it was
        optimizer.zero_grad()
        CE(net(x[k % 3]), y[k % 3]).backward()
        optimizer.step()
        scheduler.step()
    for n, p in net.named_parameters():  # up to momentum's rounding
        torch.testing.assert_close(theta[n], p.detach(), rtol=1e-3, atol=1e-4)


def test_a_scheduler_goes_on_from_where_it_is() -> None:
    w = {"w": torch.ones(1, dtype=torch.float64)}
    optimizer = torch.optim.SGD(w.values(), lr=1.0)
    scheduler = torchs.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    theta = rd.unroll(lambda p, b: p["w"].sum(), w, lambda k: (), rd.SGD(scheduler, 0.0), steps=2)
    assert float(theta["w"]) == 1 - 0.5 - 0.25


def test_a_function_of_the_step() -> None:
    """For every hyperparameter, in groups too; the same as a tensor of its values."""
    net = network()
    loss, params = rd.from_module(net, CE)

    def rate(k: int) -> float:
        return 0.1 * 0.9**k

    rates = torch.tensor([rate(k) for k in range(STEPS)], dtype=torch.float64)
    by_function = rd.AdamW(rate, (lambda k: 0.9, 0.999), weight_decay=dict.fromkeys(params, rate), max_norm=rate)
    by_tensor = rd.AdamW(rates, (0.9, 0.999), weight_decay=rates, max_norm=rates)
    a, b = (rd.unroll(loss, params, data(), o, steps=STEPS) for o in (by_function, by_tensor))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_it_counts_on_from_the_state() -> None:
    loss, params = rd.from_module(network(), CE)
    optimizer = rd.SGD(lambda k: 0.1 / (1 + k), 0.9)
    whole = rd.unroll(loss, params, data(), optimizer, steps=STEPS)
    half, state = rd.unroll(loss, params, data(), optimizer, steps=4, return_state=True)
    rest = rd.unroll(loss, half, data(), optimizer, steps=STEPS - 4, state=state)
    assert all(torch.equal(whole[n], rest[n]) for n in whole)


def test_a_scheduler_at_another_step_than_the_state_is_refused() -> None:
    """Regression: the same scheduler given to each piece began anew in each."""
    w = {"w": torch.ones(1, dtype=torch.float64)}
    optimizer = torch.optim.SGD(w.values(), lr=1.0)
    schedulers = [torchs.ExponentialLR(optimizer, 0.5)]
    schedulers.append(torchs.ChainedScheduler([torchs.ExponentialLR(torch.optim.SGD(w.values(), lr=1.0), 0.5)]))
    for scheduler in schedulers:
        sgd = rd.SGD(scheduler, 0.0)
        half, state = rd.unroll(lambda p, b: p["w"].sum(), w, lambda k: (), sgd, steps=2, return_state=True)
        with pytest.raises(ValueError, match=r"lr is a scheduler at its step 0, but the state .* from step 2"):
            rd.unroll(lambda p, b: p["w"].sum(), half, lambda k: (), sgd, steps=2, state=state)
        for _ in range(2):
            scheduler.optimizer.step()
            scheduler.step()
        rest = rd.unroll(lambda p, b: p["w"].sum(), half, lambda k: (), sgd, steps=2, state=state)
        assert float(rest["w"]) == 1 - 1 - 0.5 - 0.25 - 0.125


def test_schedulers_in_groups() -> None:
    """Regression: betas by parameter were not read, and a momentum by parameter was not seen to follow."""
    params = {n: torch.ones(2, dtype=torch.float64) for n in ("a", "b")}

    def loss(p: dict[str, Tensor], _: Any) -> Tensor:
        return (p["a"] ** 4).sum() + (p["b"] ** 4).sum()

    schedule = one_cycle()
    for optimizer in (
        rd.SGD({"a": schedule, "b": 0.1}, {"a": schedule, "b": 0.5}),
        rd.SGD(schedule, {"a": schedule, "b": schedule}),
    ):
        rd.unroll(loss, params, lambda k: (), optimizer, steps=3)
    with pytest.raises(ValueError, match="changes momentum too"):
        rd.unroll(loss, params, lambda k: (), rd.SGD({"a": schedule, "b": 0.1}, 0.5), steps=3)
    adam = torch.optim.Adam([torch.ones(1)], lr=0.1)
    schedule = torchs.OneCycleLR(adam, 0.5, total_steps=STEPS + 1)
    each, one = (
        rd.unroll(loss, params, lambda k: (), rd.Adam(schedule, (beta, 0.999)), steps=3)
        for beta in (dict.fromkeys(params, schedule), schedule)
    )
    assert all(torch.equal(each[n], one[n]) for n in each)


def plateau() -> Any:
    return torchs.ReduceLROnPlateau(torch.optim.SGD([torch.ones(1)], lr=0.1))


def two_groups() -> Any:
    groups = [{"params": [torch.ones(1)]}, {"params": [torch.ones(1)], "lr": 0.5}]
    return torchs.ExponentialLR(torch.optim.SGD(groups, lr=0.1), 0.9)


def one_cycle() -> Any:
    return torchs.OneCycleLR(torch.optim.SGD([torch.ones(1)], lr=0.1, momentum=0.9), 0.5, total_steps=STEPS + 1)


@pytest.mark.parametrize(
    ("optimizer", "kind", "message"),
    [
        (lambda: rd.SGD(plateau()), TypeError, "lr is a ReduceLROnPlateau, which waits for a metric"),
        (lambda: rd.SGD(two_groups()), ValueError, "parameter groups of different values"),
        (lambda: rd.SGD(one_cycle()), ValueError, "changes momentum too, .* give momentum=scheduler as well"),
        (lambda: rd.Adam(one_cycle()), ValueError, r"changes momentum too, .* give betas=\(scheduler, beta2\) as well"),
        (lambda: rd.SGD(0.1, weight_decay=lambda k: "0"), TypeError, r"weight_decay\(0\) returned str"),
        (lambda: rd.SGD(lambda k: float("nan")), ValueError, r"lr\(0\) returned nan"),
        (lambda: rd.SGD(lambda k: -0.1), ValueError, "lr must be finite and at least 0, got -0.1"),
        (lambda: rd.SGD(lambda k: torch.ones((), requires_grad=True)), ValueError, r"lr\(0\) returned a tensor that"),
        (lambda: rd.Adam(0.1, eps=two_groups()), ValueError, "eps is a scheduler of an optimizer that has no eps"),
    ],
)
def test_bad_schedules_are_named(optimizer: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        rd.unroll(lambda p, b: p["w"].sum(), {"w": torch.ones(2)}, lambda k: (), optimizer(), steps=3)
