"""The distiller: it helps, its hypergradients are right, its configurations are checked; evaluation is plain SGD."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import revdistill as rd
from revdistill.distill.config import ADJOINTS, Config
from revdistill.distill.distiller import Distiller
from revdistill.distill.evaluation import evaluate, train_plainly
from revdistill.distill.starts import kmeans
from revdistill.distill.strategies import STRATEGIES, momentum_for, plan, strategy1, strategy2, strategy3
from revdistill.outer import models
from revdistill.outer.data import load
from revdistill.outer.descent import MAX_FAILURES
from revdistill.outer.networks import NetworkStack, classification_loss, predictions

SMALL = Config(
    dataset="moons",
    architectures=("NonLinearNet",),
    steps=6,
    epochs=2,
    per_class=3,
    outer_steps=12,
    batch_size=64,
    lr=0.1,
)


def distil(config: Config, steps: int | None = None) -> Distiller:
    distiller = Distiller(config, load(config.dataset))
    for _ in range(steps or config.outer_steps):
        distiller.step()
    return distiller


def values(distiller: Distiller) -> list[torch.Tensor]:
    return [leaf.detach().clone() for leaf in distiller.synthetic.leaves.values()]


def test_distilling_helps() -> None:
    config = replace(SMALL, outer_steps=40, inits=4, start="noise", momentum=0.9)
    before = evaluate(Distiller(config, load("moons")).artifact(), load("moons"), "NonLinearNet")
    after = evaluate(distil(config).artifact(), load("moons"), "NonLinearNet")
    assert before.mean < 0.75
    assert after.mean > 0.8
    assert len(after.accuracies) == 10


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn_labels": True},
        {"learn_momentum": True},
        {"weight_decay": 0.3},
        {"init": "fixed"},
        {"start": "noise"},
        {"start": "kmeans"},
    ],
)
def test_adjoints_and_repetitions_agree(changes: dict[str, Any]) -> None:
    """One outer step's hypergradients, leaf by leaf; and the same seed gives the same bits."""

    def gradients(adjoint: str) -> list[torch.Tensor]:
        distiller = distil(replace(SMALL, adjoint=adjoint, outer_steps=3, clip=0.0, **changes), steps=1)
        return [leaf.grad for leaf in distiller.synthetic.leaves.values() if leaf.grad is not None]

    found = {name: gradients(name) for name in ADJOINTS}
    assert len(found["reversible"]) == 2 + ("learn_labels" in changes) + ("learn_momentum" in changes)
    for name in ADJOINTS:
        for mine, reference in zip(found[name], found["backprop"], strict=True):
            assert float((mine - reference).norm() / reference.norm()) < 1e-3  # float32, ReLU
    assert all(torch.equal(a, b) for a, b in zip(gradients("reversible"), found["reversible"], strict=True))
    config = replace(SMALL, **changes)
    assert all(torch.equal(a, b) for a, b in zip(values(distil(config, 4)), values(distil(config, 4)), strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_distilled_for_the_training_that_the_artifact_says(optimizer: str) -> None:
    """The parameters that the outer loss sees are those of torch.optim on the artifact, weight decay and all."""
    distiller = Distiller(replace(SMALL, optimizer=optimizer, weight_decay=0.3, lr=0.02), load("moons"))
    artifact, stack = distiller.artifact(), distiller.stacks[0]
    ends = distiller._train(
        distiller.synthetic, stack.parts()[0], stack.sample(5), 0, distiller.config.inner_steps, lambda x: x
    )
    plain = stack.sample(5)
    train_plainly(artifact, stack, plain, artifact.lr.tolist(), artifact.momentum.tolist())
    for name, end in ends.items():
        assert torch.allclose(end, plain[name], rtol=1e-3, atol=1e-4)


def test_centroids_are_a_class_s_means() -> None:
    """One cluster is the mean; n clusters of two tight groups find both; too few samples come again, equal ones are no
    error.
    """
    data = load("digits")
    x = kmeans(data, 1, 1, torch.Generator().manual_seed(0))
    assert x.shape == (1, 10, 1, 8, 8)
    for c in range(10):
        assert torch.allclose(x[0, c], data.x[data.y == c].mean(0), atol=1e-5)
    groups = torch.tensor([[-5.0, 0.0], [-5.1, 0.0], [5.0, 1.0], [5.1, 1.0], [2.0, 2.0], [2.0, 2.0]])
    small = replace(load("moons"), x=groups, y=torch.tensor([0, 0, 0, 0, 1, 1]))
    found = kmeans(small, 2, 2, torch.Generator().manual_seed(1))  # four of each class
    assert found.shape == (2, 4, 2)
    assert {tuple(p) for p in found[:, :2].reshape(-1, 2).tolist()} == {tuple(p) for p in groups[:4].tolist()}
    assert torch.equal(found[:, 2:], torch.full((2, 2, 2), 2.0))
    two = kmeans(small, 2, 1, torch.Generator().manual_seed(1))[:, 0]
    assert torch.allclose(two[two[:, 0].argsort()], torch.tensor([[-5.05, 0.0], [5.05, 1.0]]))
    assert torch.equal(found, kmeans(small, 2, 2, torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="no sample of class 1"):
        kmeans(replace(small, y=torch.zeros(6, dtype=torch.int64)), 1, 1, torch.Generator())


def test_several_architectures_and_kinds_of_data() -> None:
    config = replace(SMALL, architectures=("LinearNet", "NonLinearNet", "MLP"), outer_steps=2)
    assert distil(config).outer_step == 2
    for dataset, arch in (("digits", "MLP"), ("blobs", "MoreNonLinearNet"), ("circles", "NonLinearNet")):
        distiller = distil(replace(SMALL, dataset=dataset, architectures=(arch,), outer_steps=2, per_class=1))
        assert distiller.artifact().x.shape[2:] == load(dataset).input_shape


def test_a_distillation_that_diverges_says_so_and_stops() -> None:
    config = replace(SMALL, lr=5000.0, outer_steps=50)
    distiller = Distiller(config, load("moons"))
    before = values(distiller)
    report = distiller.step()
    assert report.diverged
    assert "range" in report.diverged or "finite" in report.diverged
    assert all(torch.equal(a, b) for a, b in zip(values(distiller), before, strict=True))
    for _ in range(MAX_FAILURES - 2):
        assert distiller.step().diverged
    with pytest.raises((rd.RangeError, rd.NonFiniteError), match=f"{MAX_FAILURES} outer steps in a row"):
        distiller.step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; accepted is an integer from 1 to 1,000,000"),
        ({"momentum": 1.5}, "momentum is 1.5; accepted is a number from 0 to 1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; accepted is a number of at least 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"init": "some"}, "init is 'some'; accepted is random or fixed"),
        ({"adjoint": "magic"}, "adjoint is 'magic'"),
        ({"architectures": ()}, "architectures"),
        ({"architectures": ("VGG",)}, "unknown architecture 'VGG'; accepted are LinearNet"),
        ({"architectures": ("no.such.module:f",)}, "cannot import"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"learn_momentum": True, "momentum": 0.0}, "learn_momentum"),
    ],
)
def test_configurations_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**changes)


@pytest.mark.parametrize(("dataset", "architecture"), [("moons", "NonLinearNet"), ("digits", "AlexCifarNet")])
def test_evaluation_is_plain_sgd_one_network_at_a_time(dataset: str, architecture: str) -> None:
    """Against a loop over single networks with torch.optim.SGD, written out."""
    config = replace(SMALL, dataset=dataset, architectures=(architecture,), outer_steps=1)
    artifact, data = distil(config).artifact(), load(dataset)
    found = evaluate(artifact, data, architecture, restarts=3)
    assert len(set(found.accuracies)) == 3
    stack = NetworkStack(architecture, 3, data.input_shape, data.classes, torch.device("cpu"))
    starts = stack.sample(2**40 + artifact.seed)
    for e in range(3):
        net = models.build(architecture, data.input_shape, data.classes)
        net.load_state_dict({name: p[e] for name, p in starts.items()})
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        x, y = torch.from_numpy(artifact.x), torch.from_numpy(artifact.y)
        for k in range(artifact.inner_steps):
            for group in optimizer.param_groups:
                group["lr"], group["momentum"] = float(artifact.lr[k]), float(artifact.momentum[k])
            optimizer.zero_grad()
            classification_loss(net(x[k % len(x)]), y[k % len(x)]).backward()
            optimizer.step()
        accuracy = float((predictions(net(data.x_test)) == data.y_test).float().mean())
        assert found.accuracies[e] == pytest.approx(accuracy, abs=0.005)  # a float32 tie or two


def test_fixed_init_is_evaluated_from_its_own_network() -> None:
    artifact, data = distil(replace(SMALL, init="fixed")).artifact(), load("moons")
    found = evaluate(artifact, data, "NonLinearNet", restarts=3)
    assert found.std == 0
    assert len(set(found.accuracies)) == 1


def test_evaluation_refuses_other_data() -> None:
    artifact = distil(SMALL, 1).artifact()
    with pytest.raises(ValueError, match=r"entries of shape \[2\], but dataset 'digits'"):
        evaluate(artifact, load("digits"), "MLP")


class _BatchNormNet(torch.nn.Sequential):
    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(
            torch.nn.Linear(inputs, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2), torch.nn.Linear(8, classes)
        )


def own_network(input_shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    return _BatchNormNet(input_shape[0], classes)


def wrong_output(input_shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    return torch.nn.Linear(input_shape[0], classes + 1)


def no_network(input_shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    return [input_shape, classes]


def wrong_input(input_shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    return torch.nn.Linear(input_shape[0] + 1, classes)


def test_a_users_own_factory() -> None:
    distiller = distil(replace(SMALL, architectures=(f"{__name__}:own_network",), outer_steps=3))
    found = evaluate(distiller.artifact(), load("moons"), f"{__name__}:own_network", restarts=4)
    assert len(found.accuracies) == 4
    with pytest.raises(ValueError, match="does not take inputs"):
        distil(replace(SMALL, architectures=(f"{__name__}:wrong_input",)))
    with pytest.raises(ValueError, match=r"outputs of shape \[3\] for 2 classes; accepted are \[1\] or \[2\]"):
        distil(replace(SMALL, architectures=(f"{__name__}:wrong_output",)))
    with pytest.raises(ValueError, match=r"returned list; it must return a torch\.nn\.Module"):
        distil(replace(SMALL, architectures=(f"{__name__}:no_network",)))


def test_nothing_seeds_the_generators_of_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: torch.manual_seed within fork_rng(devices=[]) seeds every GPU, and leaves it so."""

    def seed_all(seed: int) -> None:
        raise AssertionError("the caller's generators on GPUs are lost")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_all)
    state = torch.get_rng_state()
    distiller = distil(replace(SMALL, architectures=("NonLinearNet", f"{__name__}:own_network")), steps=2)
    distiller.validation_accuracy()
    evaluate(distiller.artifact(), load("moons"), "NonLinearNet", restarts=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_outer_steps_are_made_with_an_unrolls_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic kernels, and on a GPU no TensorFloat-32, for the outer loss too: a run that is resumed has the same
    bits.
    """
    seen = []
    evaluated = NetworkStack.mean_loss

    def watched(self: NetworkStack, *args: Any) -> torch.Tensor:
        seen.append(torch.get_deterministic_debug_mode())
        value = evaluated(self, *args)
        value.register_hook(lambda _: seen.append(torch.get_deterministic_debug_mode()))
        return value

    monkeypatch.setattr(NetworkStack, "mean_loss", watched)
    distil(SMALL, steps=1)
    assert seen == [2, 2]  # errors where there is no deterministic kernel; forward, and back
    assert torch.get_deterministic_debug_mode() == 0


def test_strategies_are_the_studys() -> None:
    lr = np.linspace(0.01, 0.5, 200).tolist()
    one = strategy1(lr, 40)
    assert len(one) == 2000
    assert one[0] == 0.3
    assert one[1] == one[40] == pytest.approx(0.33)
    assert max(one) == pytest.approx(0.778, abs=1e-3)
    assert one[-1] == pytest.approx(0.100, abs=1e-3)
    two = strategy2(lr, 40)
    assert len(two) == 2000
    assert two[:200] == lr
    assert two[-1] == pytest.approx(lr[-1] * 0.9**9)
    three = strategy3(lr, 40)
    assert len(three) == 2000
    assert three[:200] == lr
    assert three[200:240] == pytest.approx([r * 0.98 for r in lr[160:]])
    assert three[-1] == pytest.approx(lr[-1] * 0.98**45)
    assert STRATEGIES["raw"](lr, 40) == lr
    assert momentum_for(one, [0.5] * 199 + [0.7])[-1] == 0.7


def test_strategy_1_takes_steps_of_the_same_length_with_momentum() -> None:
    lr = [0.01] * 20
    rates, momenta = plan("strategy1", lr, [0.9] * 20, 4)
    assert momenta == [0.9] * 200
    assert rates == pytest.approx([0.1 * rate for rate in strategy1(lr, 4)])
    assert plan("strategy1", lr, [0.0] * 20, 4)[0] == strategy1(lr, 4)
    assert plan("raw", lr, [0.9] * 20, 4) == (lr, [0.9] * 20)
