"""The benchmarks of Adam and of training schedules compare what they say they compare."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import maclaurin2015
import methods
import pytest
import report_tuning
import report_tuning_pictures
import tasks
import torch
import torch.nn.functional as F
import trainings

import revdistill as rd
from revdistill.outer.data import load
from tests.outer.legible import illegible
from tests.outer.test_image_files import write_mnist

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


@pytest.mark.parametrize("name", [n for n in methods.ADAM_METHODS if n != "adam-autograd"])
def test_every_adam_method_gives_the_hypergradient(name: str) -> None:
    task = tasks.make("tiny", dtype=torch.float64)
    expected_x, expected_rates = methods.adam_by_autograd(task, 7)
    x, rates = methods.ADAM_METHODS[name].run(task, 7)
    torch.testing.assert_close(x, expected_x, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(rates, expected_rates, rtol=1e-6, atol=1e-10)


def test_the_comparisons_training_is_the_unrolls() -> None:
    """What measures a schedule takes the steps that were differentiated through."""
    net = trainings.network(3)
    x, y = torch.randn(5, 8, 784, generator=torch.Generator().manual_seed(0)), torch.arange(40).reshape(5, 8) % 10
    lr, momentum = torch.linspace(0.01, 0.1, 20).reshape(5, 4), torch.linspace(0.5, 0.9, 5)
    loss, params = rd.from_module(net, F.cross_entropy)
    layer = {name: i // 2 for i, name in enumerate(params)}
    optimizer = rd.SGD({name: lr[:, layer[name]] for name in params}, momentum)
    theta = rd.unroll(loss, params, (x, y), optimizer, steps=5)
    trained = trainings.plain_training(copy.deepcopy(net), lambda k: (x[k], y[k]), lr, momentum)
    for name, p in trained.named_parameters():  # type: ignore[attr-defined]
        torch.testing.assert_close(p.detach(), theta[name].detach(), rtol=1e-4, atol=1e-6)


def test_the_random_search_finds_what_is_best(tmp_path: Path) -> None:
    mnist = trainings.Mnist(load("mnist", write_mnist(tmp_path)))

    def draw(generator: torch.Generator) -> Any:
        quality = float(torch.rand((), generator=generator))

        def train(seed: int) -> Any:
            return lambda x: F.one_hot(mnist.data.y_validation[: len(x)], 10) * quality

        return quality, train

    mnist.held_out = lambda seed: (mnist.data.x_validation, mnist.data.y_validation)  # type: ignore[method-assign]
    best, _, tried = trainings.random_search(mnist, draw, seconds=0.3)
    drawn = torch.Generator().manual_seed(0)
    assert best == max(float(torch.rand((), generator=drawn)) for _ in range(tried))
    assert tried > 1


@pytest.mark.parametrize("experiment", ["schedule", "penalties", "images"])
def test_an_experiment_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str) -> None:
    monkeypatch.setattr(maclaurin2015, "STEPS", 5)
    monkeypatch.setattr(maclaurin2015, "RESTARTS", 2)
    monkeypatch.setattr(maclaurin2015, "SMALL", 100)
    mnist = trainings.Mnist(load("mnist", write_mnist(tmp_path / "files")))
    found = json.loads(json.dumps(maclaurin2015.EXPERIMENTS[experiment](mnist, True)))
    assert len(found["curve"]) == 3
    assert found["peak_bytes"] > 0
    for who in report_tuning.WHO:
        assert 0 <= found[who]["test_accuracy"] <= 1
    ((name, figure),) = report_tuning_pictures.pictures({"experiments": {experiment: found["drawn"]}})
    assert name == f"maclaurin_{experiment}"
    assert illegible(figure) == []
    if experiment == "images":
        monkeypatch.setattr(maclaurin2015, "random_search", lambda *_: pytest.fail("nothing is measured"))
        assert maclaurin2015.images(mnist, True, learn_only=True) == {"drawn": found["drawn"]}


def test_the_tables_have_every_figure() -> None:
    adam = json.loads((RESULTS / "adam.json").read_text())
    text = report_tuning.adam_section(adam, "here") + report_tuning.adam_summary(adam, "here")
    for entry in adam["speed"]:
        assert all(f"{m['ratio_to_autograd']:.2f}" in text for m in entry["methods"])
    schedules = json.loads((RESULTS / "maclaurin2015.json").read_text())
    text = report_tuning.schedules_section(schedules, "here")
    for name, found in schedules["experiments"].items():
        assert f"{found['learned']['test_accuracy']:.1%}" in text
        assert (RESULTS / f"maclaurin_{name}.png").exists()
        assert f"maclaurin_{name}.png" in text
