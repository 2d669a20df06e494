"""The training that the command attributes: its draws, its figures, and that it is the library's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import revdistill as rd
from revdistill.attribute import flipping
from revdistill.attribute.attributing import Attributing
from revdistill.attribute.config import AttributeConfig
from revdistill.attribute.experiment import Experiment, balanced, flipped
from revdistill.attribute.flipping import accuracies_without, figures, left_out
from revdistill.outer.data import load

SMALL = AttributeConfig(dataset="moons", arch="NonLinearNet", examples=40, epochs=2, batch_size=16, queries=4)


def test_queries_are_of_each_class_as_many() -> None:
    y = torch.tensor([0] * 10 + [1] * 2 + [3] * 10)
    for count, expected in ((3, [1, 1, 0, 1]), (6, [2, 2, 0, 2]), (12, [5, 2, 0, 5]), (22, [10, 2, 0, 10])):
        chosen = balanced(y, count, torch.Generator().manual_seed(1))
        assert len(chosen.unique()) == count
        assert torch.bincount(y[chosen], minlength=4).tolist() == expected
    one, other = (balanced(y, 4, torch.Generator().manual_seed(seed)).tolist() for seed in (1, 2))
    assert one != other


def test_flipped_labels_are_of_another_class() -> None:
    y = torch.arange(400) % 4
    found, wrong = flipped(y, 4, 0.25, torch.Generator().manual_seed(0))
    assert int(wrong.sum()) == 100
    assert torch.equal(found != y, wrong)
    assert len({int(c) for c in (found - y)[wrong] % 4}) == 3
    assert int(flipped(y, 4, 1e-9, torch.Generator())[1].sum()) == 1
    assert int(flipped(y[:3], 4, 0.99, torch.Generator())[1].sum()) == 2
    assert torch.equal(flipped(y, 4, 0.0, torch.Generator())[0], y)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_scores_are_the_librarys_of_the_same_training(optimizer: str) -> None:
    """Stated with the module itself, as a user would; and as differences of whole trainings say."""
    config = replace(SMALL, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 0.01, eps=None)
    e = Experiment(config, load("moons"))
    found = e.attribute()
    x, y, data = e.x, e.y, load("moons")
    assert torch.equal(x, data.x[e.examples])
    assert torch.equal(y, data.y[e.examples])

    def trained(weights: Tensor) -> Tensor:
        params = {name: p.double().requires_grad_() for name, p in e.run().params.items()}
        if optimizer == "sgd":
            steps: torch.optim.Optimizer = torch.optim.SGD(params.values(), 0.05, 0.9, weight_decay=0.01)
        else:
            steps = torch.optim.AdamW(params.values(), 0.01, (0.9, 0.999), 1e-3, 0.01)
        for row in e.run().order:
            chosen = row[row >= 0]
            steps.zero_grad()
            (each_loss(params, x[chosen].double(), y[chosen]) * weights[chosen]).mean().backward()
            steps.step()
        with torch.no_grad():
            return each_loss(params, data.x_test[e.queries].double(), data.y_test[e.queries])

    assert torch.allclose(found.losses.double(), trained(torch.ones(40)), atol=1e-4)
    for i in (0, 17):
        more, less = torch.ones(2, 40, dtype=torch.float64)
        more[i], less[i] = 1.001, 0.999
        difference = (trained(more) - trained(less)) / 0.002
        assert torch.allclose(difference.float(), found.scores[:, i], rtol=0.01, atol=1e-5)


def each_loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """NonLinearNet, written out: one logit for two classes."""
    hidden = torch.relu(x @ params["1.weight"].T + params["1.bias"])
    logit = (hidden @ params["3.weight"].T + params["3.bias"])[:, 0]
    return torch.nn.functional.binary_cross_entropy_with_logits(logit, y.to(x.dtype), reduction="none")


def test_the_check_in_chunks_is_the_check_of_the_library(tmp_path: Path) -> None:
    e = Experiment(replace(SMALL, check=True, retrainings=12, drop=0.1), load("moons"))
    result = Attributing(tmp_path / "run", e).run(progress=False)
    expected = e.attribute().check(0.1, 12, SMALL.seed)
    assert result.check is not None
    assert np.array_equal(result.check.dropped, expected.dropped)
    assert np.allclose(result.check.actual, expected.actual, atol=1e-5)
    assert np.allclose(result.check.predicted, expected.predicted, atol=1e-6)
    assert result.check.smoothness == pytest.approx(expected.smoothness, abs=1e-3)


def test_figures_of_flipped_labels() -> None:
    e = Experiment(replace(SMALL, examples=20, flip=0.25), load("moons"))
    wrong = e.flipped.numpy()
    assert wrong.sum() == 5
    harm, losses = wrong.astype(float), -np.arange(20.0)
    harm[np.flatnonzero(wrong)[0]] = -1.0  # one of five is the last, the others are ahead of all
    found = figures(e, harm, losses, {"none": [0.5, 0.7]})
    assert found.auroc["harm"] == pytest.approx(4 / 5)
    places = np.flatnonzero(wrong)
    above = [sum(not wrong[j] for j in range(i + 1, 20)) for i in places]
    assert found.auroc["training_loss"] == pytest.approx(sum(above) / (5 * 15))
    assert found.worst == 2
    assert found.precision == {"harm": 1.0, "training_loss": float(wrong[:2].mean())}
    assert found.test_samples == len(load("moons").y_test) - 4
    assert found.accuracy["none"]["mean"] == pytest.approx(0.6)
    assert found.accuracy["none"]["std"] == pytest.approx(0.2 / 2**0.5)
    for name, expected in (("none", []), ("flipped", places.tolist()), ("training_loss", list(range(5)))):
        assert np.flatnonzero(left_out(name, wrong, harm, losses)).tolist() == expected
    assert left_out("harm", wrong, harm, losses).sum() == 5


def test_trainings_without_examples_do_not_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    e = Experiment(replace(SMALL, flip=0.25), load("moons"))
    seen: list[tuple[Tensor, Tensor]] = []
    train = flipping.train

    def watched(stack: object, params: object, batch: object, **kwargs: object) -> None:
        def batch_of(k: int) -> tuple[Tensor, Tensor]:
            assert callable(batch)
            seen.append(batch(k))
            return seen[-1]

        train(stack, params, batch_of, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(flipping, "train", watched)
    without = np.arange(40) < 13
    (found,) = accuracies_without(e, [without])
    assert len(found) == flipping.RESTARTS
    assert len(set(found)) > 1
    x, y = (torch.cat(part) for part in zip(*seen, strict=True))
    rows = [tuple(row) for row in e.x[13:].tolist()]
    assert sorted(map(tuple, x.tolist())) == sorted(rows * 2)  # two epochs
    labels = dict(zip(rows, e.y[13:].tolist(), strict=True))
    assert all(labels[tuple(row)] == label for row, label in zip(x.tolist(), y.tolist(), strict=True))


def test_what_stands_for_none_is_kept() -> None:
    """A later release may take another value; a job of this one keeps its own."""
    assert (AttributeConfig().lr, AttributeConfig().eps) == (1e-3, 1e-3)
    sgd = AttributeConfig(optimizer="sgd")
    assert (sgd.lr, sgd.eps) == (0.01, None)
    assert AttributeConfig.from_dict(sgd.to_dict()) == sgd
    assert AttributeConfig(eps=0.25).family.engine(0.1, 0.9, 0.0).eps == 0.25  # type: ignore[attr-defined]


def test_own_networks_are_measured_as_they_are_evaluated() -> None:
    """Dropout trains, and is off where queries are measured."""
    e = Experiment(replace(SMALL, arch=f"{__name__}:dropping"), load("moons"))
    found = e.attribute()
    net = dropping((2,), 2).eval()
    assert found.theta is not None
    logits = torch.func.functional_call(net, found.theta, (e.data.x_test[e.queries],))
    expected = torch.nn.functional.cross_entropy(logits, e.data.y_test[e.queries], reduction="none")
    assert torch.allclose(found.losses, expected, atol=1e-5)
    assert isinstance(found, rd.Attribution)


def dropping(input_shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """A user's own factory."""
    return torch.nn.Sequential(
        torch.nn.Linear(2, 6), torch.nn.Dropout(0.5), torch.nn.Tanh(), torch.nn.Linear(6, classes)
    )
