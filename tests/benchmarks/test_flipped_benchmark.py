"""The benchmark of flipped labels compares what it says it compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flipped
import hidden_harm
import influences
import pytest
import report_flipped
import torch
import torch.nn.functional as F
from influences import Recipe
from torch import Tensor

import revdistill as rd
from revdistill.outer.data import Dataset

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
RECIPE = Recipe(8, 2, 0.05)


def some(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 784, generator=generator), torch.randint(0, 10, (n,), generator=generator)


def small_data() -> Dataset:
    """Of MNIST's shape."""
    parts = [(x.reshape(-1, 1, 28, 28), y) for x, y in (some(600, 0), some(300, 1), some(50, 2))]
    (x, y), (x_validation, y_validation), (x_test, y_test) = parts
    return Dataset("some", x, y, x_validation, y_validation, x_test, y_test, 10, {"mean": [0.0], "std": [1.0]})


def test_weights_of_every_label_are_differentiated_through_training() -> None:
    """Against autograd through a plain loop; the given label's column is what rd.attribute scores."""
    (x, y), queries = some(20, 3), some(5, 4)
    asks = (influences.Ask(), influences.Ask(3.0, along=True))
    found = influences.metagradient((x, y), influences.one_hot(y), queries, RECIPE, 7, asks)
    table = influences.one_hot(y).requires_grad_()
    net = influences.network(7)
    params: dict[str, Tensor] = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in params.items()}
    measured = []
    for k, padded in enumerate(RECIPE.order(20, 7)):
        rows = padded[padded >= 0]
        log_p = torch.func.functional_call(net, params, (x[rows],)).log_softmax(1)
        loss = -(table[rows] * log_p).sum() / len(rows)
        gradient = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        velocity = {name: 0.9 * v + g for (name, v), g in zip(velocity.items(), gradient, strict=True)}
        params = {name: p - RECIPE.lr * velocity[name] for name, p in params.items()}
        if k in (2, 5):  # the last steps of the two epochs
            logits = torch.func.functional_call(net, params, (queries[0],))
            measured.append([F.cross_entropy(logits, queries[1]), F.cross_entropy(logits / 3, queries[1]) * 3])
    expected = (measured[1][0], (measured[0][1] + measured[1][1]) / 2)
    for bars, asked in zip(found.bars, expected, strict=True):
        (by_hand,) = torch.autograd.grad(asked, table, retain_graph=True)
        torch.testing.assert_close(bars, by_hand, rtol=1e-3, atol=1e-6)
    loss_each, start = rd.from_module(influences.network(7), torch.nn.CrossEntropyLoss(reduction="none"))
    order = RECIPE.order(20, 7)
    scores = rd.attribute(loss_each, start, (x, y), rd.SGD(RECIPE.lr, 0.9), order=order, queries=queries).scores
    torch.testing.assert_close(influences.given(found.bars[0], y), scores.mean(0), rtol=1e-3, atol=1e-6)


def test_the_plain_training_is_the_metagradients() -> None:
    (x, y), queries = some(20, 3), some(5, 4)
    theta = influences.metagradient((x, y), influences.one_hot(y), queries, RECIPE, 7).theta
    _, checkpoints = influences.train((x, y), RECIPE, 7)
    assert len(checkpoints) == RECIPE.epochs
    for name, p in checkpoints[-1].items():
        torch.testing.assert_close(p, theta[name], rtol=1e-4, atol=1e-6)


def test_tracin_is_minus_the_sum_of_products_of_gradients() -> None:
    examples, queries = some(4, 3), some(3, 4)
    net, checkpoints = influences.train(examples, RECIPE, 7)
    expected = torch.zeros(4)
    for params in checkpoints:
        net.load_state_dict(params)

        def gradient(x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(net(x), y), net.parameters())])

        asked = gradient(*queries)
        expected -= 0.1 * torch.stack([gradient(x[None], y[None]) @ asked for x, y in zip(*examples, strict=True)])
    found = influences.tracin(net, checkpoints, examples, queries, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_judging() -> None:
    table = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0]])
    padded = F.pad(table, (0, 7), value=9.0)
    assert influences.against_the_best_other(padded, torch.tensor([0, 2])).tolist() == [2.0, -1.0]
    truth = torch.tensor([True, False, True, False, False, False, False, False, False, False])
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    found = influences.judged(scores, truth)
    assert found == {"auroc": 15 / 16, "precision": 0.5, "precision_worst_tenth": 1.0}


def test_as_many_labels_are_flipped_as_asked_for_and_clean_ones_stay_apart() -> None:
    task = flipped.flipped_task(small_data(), 0.2, (100, 40, 30), 0)
    assert int(task.flipped.sum()) == 20
    assert [len(part[1]) for part in (task.examples, task.held, task.second, task.test)] == [100, 40, 30, 50]
    assert not (task.held[0][:, None] == task.second[0][None]).all(2).any()


@pytest.mark.parametrize("name", list(hidden_harm.CASES))
def test_cases_of_hidden_harm(name: str) -> None:
    data = small_data()
    case = hidden_harm.CASES[name](data, 500, 0)
    share = {"poisoned": 0.02, "near_duplicates": 0.01, "other_distribution": 0.2}[name]
    assert int(case.guilty.sum()) == int(share * 500)
    wrong = {"poisoned": hidden_harm.TARGET, "near_duplicates": hidden_harm.MISTAKEN}
    if name in wrong:
        assert (case.examples[1][case.guilty] == wrong[name]).all()
        assert not (case.candidates[1] == wrong[name]).any()
        assert not (case.other[1] == wrong[name]).any()
    assert torch.equal(case.examples[0][~case.guilty].sort(0)[0].sum(0) > 0, torch.ones(784, dtype=torch.bool))


def test_a_small_comparison_and_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flipped, "TRAININGS", 2)
    monkeypatch.setattr(flipped, "PLAIN", 3)
    task = flipped.flipped_task(small_data(), 0.2, (60, 20, 20), 0)
    found = flipped.compared(task, dict.fromkeys(flipped.RECIPES, Recipe(30, 2, 0.05)), 1, 0)
    assert set(found["methods"]) == set(report_flipped.FLIPS)
    run = {"seed": 0, "cpu_seconds": 60.0}
    harmful = hidden_harm.measured(hidden_harm.other_distribution(small_data(), 100, 0), RECIPE, 0, small_data())
    assert set(harmful["methods"]) == set(report_flipped.HARM)
    results: dict[str, Any] = {"flips_20": [run | found], "other_distribution": [run | harmful]}
    written = report_flipped.section(results, "a machine")
    assert "2 minutes" in written
    for name, _ in report_flipped.FLIPS.values():
        assert f"| {name} |" in written
    assert f"{found['methods']['loss']['auroc']:.3f} +- 0.000" in report_flipped.summary(results, "a machine")


def test_committed_results_have_every_method() -> None:
    results = json.loads((RESULTS / "flipped.json").read_text())
    for part, methods in (dict.fromkeys(report_flipped.PARTS, report_flipped.FLIPS)).items():
        assert [run["seed"] for run in results[part]] == list(range(flipped.SEEDS))
        assert all(set(run["methods"]) == set(methods) for run in results[part])
    for case in report_flipped.CASES:
        assert [run["seed"] for run in results[case]] == list(range(flipped.SEEDS))
        assert all(set(run["methods"]) == set(report_flipped.HARM) for run in results[case])
