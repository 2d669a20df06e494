"""The contract of every adjoint: over every problem and optimizer setting, the same hypergradient as plain autograd.

An adjoint inherits the whole suite by subclassing AdjointContract.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import revdistill as rd
from revdistill.engine.loss.determinism import Determinism
from tests.engine.problems import (
    ADAMW_SETTINGS,
    PROBLEMS,
    SETTINGS,
    STEPS,
    WITHOUT_WAY_BACK,
    Case,
    optimizer_of,
    tensors_of,
)
from tests.engine.reference import train

SEED = 11
# Fixed point resolves 2^-48 and momentum 0.9 over 12 steps amplifies little: what is left is the adjoint's own
# rounding.
TOLERANCE = 1e-9


def outer_loss(theta: dict[str, Tensor]) -> Tensor:
    weights = torch.Generator().manual_seed(1)
    draws = [torch.randn(p.shape, generator=weights, dtype=torch.float64).to(p.dtype) for p in theta.values()]
    return sum((p * w).sum() + p.square().sum() for p, w in zip(theta.values(), draws, strict=True))


def gradients(theta: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(outer_loss(theta), list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(leaves.items(), found, strict=True)}


def seed_like_the_engine(k: int) -> None:
    """The documented promise is (seed, step); the reference draws the same numbers through the engine's own context."""
    with Determinism.capture(torch.device("cpu"), SEED).step(k):
        state = torch.get_rng_state()
    torch.set_rng_state(state)


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    scale = max(float(e.norm()) for e in expected.values())
    assert scale > 0
    return max(float((found[n] - e).norm()) / max(float(e.norm()), 1e-6 * scale) for n, e in expected.items())


def make(problem: str, setting: str) -> tuple[Case, dict[str, Any], dict[str, Tensor]]:
    torch.manual_seed(3)
    case = PROBLEMS[problem]()
    settings = SETTINGS[setting](case)
    return case, settings, case.leaves | tensors_of(settings)


_references: dict[tuple[str, str], dict[str, Tensor]] = {}


def reference(problem: str, setting: str) -> dict[str, Tensor]:
    if (problem, setting) not in _references:
        case, settings, leaves = make(problem, setting)
        theta = train(case, settings, STEPS, seed_like_the_engine, decoupled=setting in ADAMW_SETTINGS)
        _references[problem, setting] = gradients(theta, leaves)
    return _references[problem, setting]


class AdjointContract:
    adjoint: ClassVar[Any]
    refuses: ClassVar[set[str]] = set()

    @pytest.mark.parametrize(("problem", "setting"), list(itertools.product(PROBLEMS, SETTINGS)))
    def test_hypergradient_is_autograds(self, problem: str, setting: str) -> None:
        case, settings, leaves = make(problem, setting)

        def unroll() -> dict[str, Tensor]:
            optimizer = optimizer_of(setting, settings)
            return rd.unroll(
                case.loss,
                case.params,
                case.batches,
                optimizer,
                steps=STEPS,
                hyper=case.hyper,
                adjoint=self.adjoint,
                seed=SEED,
            )

        if setting in self.refuses:
            with pytest.raises(rd.UnsupportedError, match="Checkpoint"):
                unroll()
            return
        error = worst_error(gradients(unroll(), leaves), reference(problem, setting))
        assert error <= TOLERANCE

    @pytest.mark.parametrize("setting", ["plain", "adam"])
    @pytest.mark.parametrize("problem", PROBLEMS)
    def test_losses_along_the_way(self, problem: str, setting: str) -> None:
        """save_at, in any order, a step twice, both ends: as if every horizon had an unroll of its own."""
        save_at = (STEPS, 0, 5, 6, 5)
        case, settings, leaves = make(problem, setting)
        optimizer = optimizer_of(setting, settings)
        found = rd.unroll(
            case.loss,
            case.params,
            case.batches,
            optimizer,
            steps=STEPS,
            hyper=case.hyper,
            adjoint=self.adjoint,
            seed=SEED,
            save_at=save_at,
        )
        horizons = [train(case, settings, k, seed_like_the_engine) for k in save_at]
        expected = {name: torch.stack([theta[name] for theta in horizons]) for name in case.params}
        for name, p in expected.items():
            torch.testing.assert_close(found[name], p, rtol=1e-11, atol=1e-12)
        assert worst_error(gradients(found, leaves), gradients(expected, leaves)) <= TOLERANCE

    def test_per_network_rates(self) -> None:
        """lr [T, E]: each stacked network trains, and is differentiated, as if alone."""
        torch.manual_seed(0)
        nets = [torch.nn.Linear(4, 3).double() for _ in range(3)]
        x = torch.randn(5, 6, 4, dtype=torch.float64, requires_grad=True)
        y = torch.arange(30).reshape(5, 6) % 3
        lr = (0.1 + torch.rand(STEPS, 3, dtype=torch.float64)).requires_grad_()
        criterion = torch.nn.functional.cross_entropy
        loss, params = rd.stack_modules(nets, criterion)
        theta = rd.unroll(loss, params, (x, y), rd.SGD(lr, 0.8), steps=STEPS, adjoint=self.adjoint)
        together = torch.autograd.grad(sum(p.pow(3).sum() for p in theta.values()), [x, lr])
        alone_x, alone_lr = torch.zeros_like(x), []
        for e, net in enumerate(nets):
            loss, params = rd.from_module(net, criterion)
            rates = lr[:, e].detach().requires_grad_()
            single = rd.unroll(loss, params, (x, y), rd.SGD(rates, 0.8), steps=STEPS, adjoint=rd.Backprop())
            for name, p in single.items():
                torch.testing.assert_close(theta[name][e], p, rtol=1e-12, atol=1e-12)
            gx, glr = torch.autograd.grad(sum(p.pow(3).sum() for p in single.values()), [x, rates])
            alone_x += gx
            alone_lr.append(glr)
        torch.testing.assert_close(together[0], alone_x, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(together[1], torch.stack(alone_lr, dim=1), rtol=1e-9, atol=1e-11)

    def test_batches_as_a_function(self) -> None:
        case, _, leaves = make("tanh_mlp", "plain")
        leaves = {name: t for name, t in leaves.items() if name.startswith("params")}

        def run(batches: Any) -> dict[str, Tensor]:
            return gradients(
                rd.unroll(case.loss, case.params, batches, rd.SGD(0.1), steps=7, adjoint=self.adjoint), leaves
            )

        table = tuple(t.detach() for t in case.batches)
        expected = run(table)
        for name, g in run(lambda k: tuple(t[k % len(t)] for t in table)).items():
            torch.testing.assert_close(g, expected[name], rtol=0, atol=0)

    def test_float32_params_agree_with_float64(self) -> None:
        case, _, _ = make("tanh_mlp", "plain")

        def run(dtype: torch.dtype) -> Tensor:
            params = {n: p.detach().to(dtype).requires_grad_() for n, p in case.params.items()}
            batches = tuple(t.detach().to(dtype) if t.is_floating_point() else t for t in case.batches)
            theta = rd.unroll(case.loss, params, batches, rd.SGD(0.1), steps=20, adjoint=self.adjoint)
            return torch.cat([g.flatten() for g in gradients(theta, params).values()]).double()

        low, high = run(torch.float32), run(torch.float64)
        assert (
            float((low - high).norm() / high.norm()) < 1e-5
        )  # a smooth loss: float32's 6e-8 grows a little over 20 steps

    @pytest.mark.parametrize("steps", [0, 1, 2, 3])
    def test_few_steps(self, steps: int) -> None:
        case, _, _ = make("quadratic", "plain")
        lr = torch.full((steps,), 0.1, dtype=torch.float64, requires_grad=True)
        theta = rd.unroll(case.loss, case.params, case.batches, rd.SGD(lr), steps=steps, adjoint=self.adjoint)
        found = gradients(theta, case.leaves | {"lr": lr})
        expected = gradients(train(case, {"lr": lr, "momentum": 0.9}, steps, lambda k: None), case.leaves | {"lr": lr})
        for name, e in expected.items():
            torch.testing.assert_close(found[name], e, rtol=1e-10, atol=1e-12)


class TestReversible(AdjointContract):
    adjoint = rd.Reversible(graph_bytes=0)
    refuses: ClassVar[set[str]] = WITHOUT_WAY_BACK


class TestReversibleInHostMemory(AdjointContract):
    adjoint = rd.Reversible(history="host")
    refuses: ClassVar[set[str]] = WITHOUT_WAY_BACK


class TestReversibleOnDisk(AdjointContract):
    adjoint = rd.Reversible(history=tempfile.gettempdir())
    refuses: ClassVar[set[str]] = WITHOUT_WAY_BACK


class TestCheckpoint(AdjointContract):
    adjoint = rd.Checkpoint()


class TestCheckpointEveryFive(AdjointContract):
    adjoint = rd.Checkpoint(every=5)  # does not divide the number of steps


class TestStoreAll(AdjointContract):
    adjoint = rd.StoreAll()


class TestBackprop(AdjointContract):
    adjoint = rd.Backprop()


FIXED = [
    rd.Reversible(graph_bytes=0),
    rd.Reversible(history="host"),
    rd.Checkpoint(),
    rd.Checkpoint(every=4),
    rd.StoreAll(),
]


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s not in WITHOUT_WAY_BACK])
def test_fixed_point_adjoints_agree_to_the_last_bit_on_theta(setting: str) -> None:
    ends = []
    for adjoint in FIXED:
        case, settings, _ = make("tanh_mlp", setting)
        theta = rd.unroll(
            case.loss, case.params, case.batches, optimizer_of(setting, settings), steps=STEPS, adjoint=adjoint
        )
        ends.append(torch.cat([p.detach().flatten() for p in theta.values()]))
        with torch.no_grad():
            theta = rd.unroll(
                case.loss, case.params, case.batches, optimizer_of(setting, settings), steps=STEPS, adjoint=adjoint
            )
        ends.append(torch.cat([p.flatten() for p in theta.values()]))
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_quadratic_has_its_closed_form() -> None:
    """theta_T = c + A^T (theta_0 - c) for gradient descent on 0.5 |theta - c|^2: no autograd in the expected values."""
    start = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    centre = torch.tensor([[0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    lr, steps = torch.full((50,), 0.03, dtype=torch.float64, requires_grad=True), 50

    def loss(p: dict[str, Tensor], batch: tuple[Tensor]) -> Tensor:
        return 0.5 * (p["w"] - batch[0]).square().sum()

    for adjoint in (*FIXED, rd.Backprop()):
        theta = rd.unroll(loss, {"w": start}, (centre,), rd.SGD(lr, momentum=0.0), steps=steps, adjoint=adjoint)["w"]
        gain = 0.97**steps
        torch.testing.assert_close(theta, centre[0] + gain * (start - centre[0]), rtol=1e-12, atol=1e-12)
        g_start, g_centre, g_lr = torch.autograd.grad(theta.sum(), [start, centre, lr])
        torch.testing.assert_close(g_start, torch.full_like(start, gain), rtol=1e-12, atol=0)
        torch.testing.assert_close(g_centre, torch.full_like(centre, 1 - gain), rtol=1e-12, atol=0)
        expected = -float((start - centre[0]).detach().sum()) * gain / 0.97
        torch.testing.assert_close(g_lr, torch.full_like(lr, expected), rtol=1e-11, atol=0)


@pytest.mark.parametrize("adjoint", [*FIXED, rd.Backprop()], ids=repr)
def test_finite_differences(adjoint: Any) -> None:
    case, _, _ = make("tanh_mlp", "plain")

    def end(lr: Tensor, mu: Tensor, wd: Tensor, x: Tensor) -> Tensor:
        optimizer = rd.SGD(lr, mu, weight_decay=wd)
        theta = rd.unroll(case.loss, case.params, (x, case.batches[1]), optimizer, steps=8, adjoint=adjoint)
        return outer_loss(theta)

    at = [
        torch.full((8,), 0.2, dtype=torch.float64),
        torch.full((), 0.75, dtype=torch.float64),  # 49152 / 2^16 exactly, and so are the shifted values
        torch.full((), 0.02, dtype=torch.float64),
        case.batches[0].detach(),
    ]
    leaves = [t.clone().requires_grad_() for t in at]
    found = torch.autograd.grad(end(*leaves), leaves)
    h = 2.0**-10
    for i, direction in enumerate(
        [torch.randn_like(at[0]), torch.ones(()).double(), torch.ones(()).double(), torch.randn_like(at[3])]
    ):
        shifted = [[t + sign * h * direction if i == j else t for j, t in enumerate(at)] for sign in (1, -1)]
        difference = float((end(*shifted[0]) - end(*shifted[1])).detach()) / (2 * h)
        assert float((found[i] * direction).sum()) == pytest.approx(
            difference, rel=2e-4
        )  # h^2 times a third derivative


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_torch_optim_sgd_takes_the_same_steps(momentum: float) -> None:
    for extra in (
        {},
        {"dampening": 0.3},
        {"weight_decay": 0.05},
        {"nesterov": True},
        {"dampening": 0.3, "weight_decay": 0.1},
    ):
        case, _, _ = make("tanh_mlp", "plain")
        mu = round(momentum * 65536) / 65536
        mine = rd.unroll(case.loss, case.params, case.batches, rd.SGD(0.1, momentum, **extra), steps=STEPS)
        leaves = {name: p.detach().clone().requires_grad_() for name, p in case.params.items()}
        optimizer = torch.optim.SGD(leaves.values(), lr=0.1, momentum=mu, **extra)
        for k in range(STEPS):
            optimizer.zero_grad()
            case.loss(leaves, tuple(t.detach()[k % len(t)] for t in case.batches)).backward()
            optimizer.step()
        for name, p in leaves.items():
            torch.testing.assert_close(mine[name], p, rtol=1e-11, atol=1e-11)


def test_float64_params_are_left_as_they_were() -> None:
    """Regression: the conversion to fixed point once scaled float64 parameters in place."""
    case, _, _ = make("quadratic", "plain")
    before = case.params["theta"].detach().clone()
    outer_loss(rd.unroll(case.loss, case.params, case.batches, rd.SGD(0.1), steps=5)).backward()
    assert torch.equal(case.params["theta"].detach(), before)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["device", "host", "file"])
def test_ten_thousand_steps_come_back_bit_for_bit(place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    loss, params = rd.from_module(net, torch.nn.functional.cross_entropy)
    x, y = torch.randn(7, 16, 10, requires_grad=True), torch.randint(0, 4, (7, 16))
    history = str(tmp_path) if place == "file" else place
    lr = torch.full((10_000,), 0.01, requires_grad=True)
    theta, stats = rd.unroll(
        loss, params, (x, y), rd.SGD(lr), steps=10_000, adjoint=rd.Reversible(history, graph_bytes=0), return_stats=True
    )
    sum(p.square().sum() for p in theta.values()).backward()  # ReversalError if any bit differs
    assert lr.grad is not None
    assert torch.isfinite(lr.grad).all()
    ideal = -torch.log2(torch.tensor(58982 / 65536)).item()
    bits = stats.history_bits_per_parameter_step
    print(f"bits per parameter and step: ideal {ideal:.4f}, kept {bits:.4f}")
    assert bits is not None
    assert bits <= 1.05 * ideal


@pytest.mark.parametrize("adjoint", [rd.Reversible(graph_bytes=0), rd.Checkpoint(every=2), rd.StoreAll()], ids=repr)
def test_a_momentum_of_zero_has_a_derivative(adjoint: Any) -> None:
    """Regression: Checkpoint kept no v where none was needed to train, and multiplied by another step's."""

    def by_hand(momentum: Tensor, w: Tensor, x: Tensor) -> Tensor:
        v = torch.zeros_like(w)
        for k in range(5):
            (g,) = torch.autograd.grad((w - x[k]).pow(4).sum(), w, create_graph=True)
            v = momentum[k] * v + g
            w = w - 0.01 * v
        return w

    def ours(momentum: Tensor, w: Tensor, x: Tensor) -> Tensor:
        def loss(p: dict[str, Tensor], batch: tuple[Tensor]) -> Tensor:
            return (p["w"] - batch[0]).pow(4).sum()

        return rd.unroll(loss, {"w": w}, (x,), rd.SGD(0.01, momentum), steps=5, adjoint=adjoint)["w"]

    found = []
    for way in (ours, by_hand):
        torch.manual_seed(0)
        momentum = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        w, x = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, dtype=torch.float64)
        found.append(torch.autograd.grad(way(momentum, w, x).square().sum(), [momentum, w]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
