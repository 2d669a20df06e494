"""Rows of distilled images are what they say, are measured fairly, and are kept as they come."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import image_cells
import image_place
import image_race
import image_rows
import images
import numpy as np
import pytest
import report_images
import report_images_race
import torch
from click.testing import CliRunner
from image_rows import BASELINES, ROWS, Baseline
from revdistill.cli import train as train_command
from revdistill.cli.main import cli

from revdistill.distill import config as config_module
from revdistill.distill import distillation
from revdistill.distill.artifact import Artifact, read
from revdistill.distill.config import Config
from revdistill.distill.strategies import plan
from revdistill.distill.synthetic import Synthetic
from revdistill.outer.data import Dataset, load
from revdistill.outer.networks import NetworkStack
from revdistill.outer.random_streams import evaluation_seed
from tests.outer.legible import illegible
from tests.outer.test_image_files import write_cifar10, write_mnist

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
FROM_AN_SDIST = (Path(__file__).parents[2] / "PKG-INFO").exists()  # which has one of the artifacts (MANIFEST.in)
MEASURED = json.loads((RESULTS / "images.json").read_text())
SMALL: dict[str, Any] = {"steps": 2, "epochs": 2, "per_class": 1, "window": None, "start": "real", "pack": 1}
SMALL |= {"bases": None, "zca": False, "pool": 0, "batch_size": 16, "outer_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = tmp_path_factory.mktemp("files")
    write_mnist(files / "mnist")
    write_cifar10(files / "cifar10")
    return files


@pytest.fixture(scope="module")
def mnist(folder: Path) -> Dataset:
    return load("mnist", folder)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Small rows and choices; the directory that everything goes to."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    for name in ("mnist_lenet_10", "mnist_lenet_10_hard", "mnist_fixed_10"):
        labels = not name.endswith("hard")
        config = replace(ROWS[name].config, **SMALL, architectures=("MLP",), learn_labels=labels)
        monkeypatch.setitem(ROWS, name, replace(ROWS[name], config=config))
    monkeypatch.setitem(ROWS, "mnist_fixed_10", replace(ROWS["mnist_fixed_10"], networks=("MLP",)))
    monkeypatch.setattr(distillation, "RESTARTS", 2)
    monkeypatch.setattr(image_cells, "TEST_IMAGES", 20)
    monkeypatch.setattr(image_cells, "RATES", (0.01, 0.02))
    monkeypatch.setattr(image_cells, "STEPS", (1, 3))
    monkeypatch.setattr(images, "FIRST_STEPS", 2)
    monkeypatch.setattr(images, "FIRST_SECONDS", 0.0)
    return tmp_path / "out"


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["images.py", "--data-dir", str(folder), *words])
    images.main()


@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith(tuple(image_rows._PRESETS))])
def test_a_row_is_what_the_preset_distils(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """revdistill train --preset best --dataset DATASET --arch NETWORK --budget N."""
    row, asked = ROWS[name], []

    def distiller(config: Config, *_: Any) -> None:
        asked.append(config)
        raise ValueError("that is all")

    monkeypatch.setattr(train_command, "Distiller", distiller)
    words = ["train", "--preset", "best", "--data-dir", str(folder), "--dataset", row.config.dataset]
    words += ["--arch", row.config.architectures[0], "--budget", str(row.budget // 10)]
    words += ["--no-learn-labels"] if name.endswith("_hard") else []
    CliRunner().invoke(cli, words)
    (config,) = asked
    assert replace(config, threads=row.config.threads) == row.config  # the command takes the threads of this machine
    assert row.config.learn_labels is not name.endswith("_hard")


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_rows_store_as_many_numbers_as_their_budget(dataset: str, folder: Path) -> None:
    data = load(dataset, folder)
    for name, row in ROWS.items():
        if row.config.dataset == dataset and not name.endswith("_hard"):
            synthetic = Synthetic(replace(row.config, start="noise", zca=False), data)
            numbers = sum(values.numel() for values in synthetic.stored().values())
            if row.config.bases:  # labels are a part of the budget
                numbers += synthetic.labels().numel()
            assert 0.95 < numbers / (row.budget * data.x[0].numel()) <= 1, name
    assert [name for name, row in ROWS.items() if row.config.init == "fixed"] == ["mnist_fixed_10"]


def test_networks_are_trained_as_by_hand(mnist: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 by SGD with momentum and weight decay; and looked at where each plan ends."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, 1, 28, 28, generator=rng), torch.randint(10, (2, 6), generator=rng)
    batches = image_cells.Batches(x, y, weight_decay=0.1)
    rates, momenta = (0.05, 0.02, 0.1, 0.05), (0.9, 0.5, 0.8, 0.3)
    plans = [image_cells.Plan("first", rates[:2], momenta[:2]), image_cells.Plan("all", rates, momenta)]
    looked: list[dict[str, torch.Tensor]] = []

    def accuracies(_: NetworkStack, params: dict[str, torch.Tensor], *on: torch.Tensor) -> torch.Tensor:
        assert on[0] is mnist.x_test
        assert on[1] is mnist.y_test
        looked.append({name: p.detach().clone() for name, p in params.items()})
        return torch.tensor([len(looked) / 10])

    with monkeypatch.context() as inside:
        inside.setattr(NetworkStack, "accuracies", accuracies)
        found = image_cells.accuracies(batches, plans, mnist, "MLP", 3, "cpu")
    np.testing.assert_allclose(found, [0.1, 0.2], rtol=1e-6)

    stack = NetworkStack("MLP", 1, (1, 28, 28), 10, torch.device("cpu"))
    params = {name: p.double().requires_grad_() for name, p in stack.sample(evaluation_seed(3)).items()}
    velocity = {name: torch.zeros_like(p) for name, p in params.items()}
    for k, (rate, momentum) in enumerate(zip(rates, momenta, strict=True)):
        logits = stack.logits(params, x[k % 2].double())[0]
        loss = -torch.log_softmax(logits, -1)[torch.arange(6), y[k % 2]].mean()
        for (name, p), grad in zip(params.items(), torch.autograd.grad(loss, list(params.values())), strict=True):
            velocity[name] = momentum * velocity[name] + grad + 0.1 * p.detach()
            params[name] = (p.detach() - rate * velocity[name]).requires_grad_()
        if k in (1, 3):
            for name, p in params.items():
                torch.testing.assert_close(looked[k // 2][name], p.detach().float(), rtol=1e-3, atol=1e-4)


def test_a_plan_that_another_goes_on_with_is_trained_once(mnist: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, train = [], image_cells.train
    monkeypatch.setattr(
        image_cells, "train", lambda *a, lr, **more: (lengths.append(len(lr)), train(*a, lr=lr, **more))
    )
    batches = image_cells.Batches(mnist.x[None, :4], mnist.y[None, :4])
    plans = [image_cells.Plan("", rates, (0.9,) * len(rates)) for rates in ((0.1, 0.1), (0.1, 0.1, 0.2), (0.1, 0.2))]
    image_cells.accuracies(batches, plans, mnist, "MLP", 0, "cpu")
    assert sorted(lengths) == [2, 3]


def test_a_schedule_is_chosen_on_held_out_data(mnist: Dataset) -> None:
    """Where the test labels are wrong, another would be the best on them."""
    upset = _upset(mnist)
    artifact = _artifact(mnist, rate=0.02, epochs=20)
    found = image_cells.distilled_cell(artifact, image_rows.SCHEDULES, upset, "MLP-GELU", False, networks=2)
    reached = {}
    for name in image_rows.SCHEDULES:
        plans = [image_cells.Plan("", *map(tuple, plan(name, artifact.lr.tolist(), artifact.momentum.tolist(), 1)))]
        batches = image_cells.Batches(torch.from_numpy(artifact.x), torch.from_numpy(artifact.y))
        reached[name] = image_cells.accuracies(batches, plans, image_cells.held_out(upset), "MLP-GELU", 2, "cpu")[0]
    assert reached[found["schedule"]] == max(reached.values())
    assert found["tried"] == 3


def test_what_networks_are_measured_on(mnist: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """All test images for the network that the data are for, a fixed choice of some for another; and a schedule that is
    no other than the learned one is not tried.
    """
    monkeypatch.setattr(image_cells, "TEST_IMAGES", 30)
    artifact = _artifact(mnist, rate=0.001, epochs=50)
    own, other = (
        image_cells.distilled_cell(artifact, image_rows.SCHEDULES, mnist, name, name == "MLP", networks=2)
        for name in ("MLP", "MLP-GELU")
    )
    assert (own["test_images"], other["test_images"]) == (len(mnist.y_test), 30)
    assert own["tried"] == other["tried"] == 1
    assert (own["schedule"], own["restarts"], len(own["accuracies"])) == ("raw", 2, 2)
    chosen = [image_cells.tested(mnist, False).x_test for _ in range(2)]
    assert torch.equal(*chosen)
    assert not torch.equal(chosen[0], mnist.x_test[:30])

    known = {"schedule": "raw", "restarts": 10, "mean": 0.5, "std": 0.0, "accuracies": [0.5] * 10}
    artifact = replace(artifact, evaluation={"MLP": known, "MLP-GELU": known})
    found = [
        image_cells.distilled_cell(artifact, ("raw",), mnist, name, name == "MLP")["mean"]
        for name in ("MLP", "MLP-GELU")
    ]
    assert found[0] == 0.5  # the run's own evaluation, on all test images
    assert found[1] != 0.5


def _upset(data: Dataset) -> Dataset:
    """What is learned is right on held-out data, and wrong on test data."""
    return replace(data, x_validation=data.x, y_validation=data.y, x_test=data.x, y_test=(data.y + 1) % 10)


def test_a_row_for_a_narrow_network_is_measured_on_the_usual_one(
    mnist: Dataset, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its own; and a GPU distils it for the usual one."""
    seen = []

    def cell(*words: Any) -> dict[str, Any]:
        seen.append(words[3:5])
        return {"mean": 0.5, "std": 0.0}

    monkeypatch.setattr(images, "distilled_cell", cell)
    monkeypatch.setattr(image_place.Place, "artifact", lambda *_: None)
    monkeypatch.setattr(config_module, "check_device", lambda _: None)
    command = images.Command(image_place.Place.at(small), device="cuda")
    name, narrow = "mnist_convnet_10", ROWS["mnist_convnet_10"].config.architectures
    assert narrow == ("ConvNet-3:width=16",)
    command.measure(name, mnist)
    assert seen == [(network, network == "ConvNet-3") for network in image_cells.COLUMNS]
    assert command.config(name).architectures == ("ConvNet-3",)
    assert replace(command, device="cpu").config(name) == ROWS[name].config


def _artifact(data: Dataset, rate: float, epochs: int) -> Artifact:
    lr, momentum = np.full(epochs, rate, np.float32), np.full(epochs, 0.9, np.float32)
    first = torch.stack([(data.y == c).nonzero()[0, 0] for c in range(10)])
    return Artifact(
        x=data.x[first][None].numpy(),
        y=np.arange(10)[None],
        lr=lr,
        momentum=momentum,
        dataset="mnist",
        architectures=["MLP"],
        epochs=epochs,
        seed=0,
        normalization=data.normalization,
        config={},
    )


def test_baselines_are_real_images_and_centroids(mnist: Dataset) -> None:
    """Random images are others for each network; centroids are the means, here of all of a class."""
    random, kmeans = (image_cells._Images(Baseline("mnist", 10, start), mnist) for start in ("real", "kmeans"))
    assert not torch.equal(random(0).x, random(1).x)
    real = {image.numpy().tobytes() for image in mnist.x}
    assert all(image.numpy().tobytes() in real for image in random(0).x[0])
    means = torch.stack([mnist.x[mnist.y == c].double().mean(0) for c in range(10)]).float()
    torch.testing.assert_close(kmeans(0).x[0], means, rtol=1e-4, atol=1e-5)
    assert torch.equal(kmeans(1).y[0], torch.arange(10))
    assert image_cells._Images(Baseline("mnist", 100, "real"), mnist)(0).x.shape == (10, 10, 1, 28, 28)


def test_baselines_take_the_best_of_a_grid(mnist: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best on held-out data, of networks that are not those which are measured."""
    monkeypatch.setattr(image_cells, "TEST_IMAGES", 20)
    monkeypatch.setattr(image_cells, "RATES", (1e-9, 0.005))
    monkeypatch.setattr(image_cells, "STEPS", (1, 40))
    seeds, train = [], image_cells.accuracies
    monkeypatch.setattr(image_cells, "accuracies", lambda *a: (seeds.append(a[4]), train(*a))[1])
    found = image_cells.baseline_cell(BASELINES["mnist_100_kmeans"], _upset(mnist), "MLP", networks=3)
    assert len(set(seeds)) == 3 + image_cells.CHOICE_NETWORKS
    assert (found["rate"], found["steps"], found["tried"], found["test_images"]) == (0.005, 40, 4, 20)
    assert len(found["accuracies"]) == found["restarts"] == 3
    np.testing.assert_allclose(found["mean"], np.mean(found["accuracies"]))


def test_rows_are_distilled_measured_and_reported(
    small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "mnist_lenet_10,mnist_lenet_10_hard"
    words = ["--out", str(small), "--only", names, "mnist_fixed_10", "--minutes", "0.03", "--count", "2"]
    run(monkeypatch, folder, *words)
    path = small / "images.json"
    results = json.loads(path.read_text())
    assert list(results["rows"]) == ["mnist_lenet_10", "mnist_lenet_10_hard", "mnist_fixed_10"]
    row = results["rows"]["mnist_lenet_10"]
    assert row["minutes"] == pytest.approx(0.01)  # they share the time
    assert row["config"]["outer_steps"] == read(small / "mnist_lenet_10-0.01min/distilled.h5").config["outer_steps"]
    assert row["numbers"] == {"inputs": 2 * 7840, "labels": 200}
    assert results["rows"]["mnist_lenet_10_hard"]["numbers"]["labels"] == 0
    assert results["cells"]["mnist_fixed_10"]["MLP"]["restarts"] == 1  # there is but one such network
    assert "held-out accuracy" in capsys.readouterr().out

    run(monkeypatch, folder, *words)  # all of it is there
    assert json.loads(path.read_text()) == results
    assert "held-out accuracy" not in capsys.readouterr().out
    sets = ["--out", str(small), "--measure", "--count", "2", "--only", "mnist_lenet_10", "mnist_10_random"]
    run(monkeypatch, folder, *sets, "--networks", "MLP,LeNet")
    run(monkeypatch, folder, "--out", str(small), "--measure", "--only", "mnist_fixed_10")
    cells = json.loads(path.read_text())["cells"]
    assert [list(cells[name]) for name in ("mnist_10_random", "mnist_lenet_10")] == [["LeNet", "MLP"], ["MLP", "LeNet"]]
    assert cells["mnist_lenet_10"]["MLP"] == results["cells"]["mnist_lenet_10"]["MLP"]
    assert list(cells["mnist_fixed_10"]) == ["MLP"]

    results = json.loads(path.read_text())
    results["rows"]["mnist_lenet_10_cuda"] = row | {"machine": row["machine"] | {"gpu": "a GPU"}}
    results["cells"]["mnist_lenet_10_cuda"] = {"MLP": cells["mnist_lenet_10"]["MLP"] | {"mean": 0.4321}}
    main, full = report_images.summary(results), report_images.section(results)
    assert "79.50 +- 8.08" not in main  # of a row that was not run
    for text in (main, full):
        assert ROWS["mnist_lenet_10"].title in text
        for name in ("mnist_lenet_10", "mnist_lenet_10_hard"):
            assert report_images._figure(results["cells"][name]["MLP"]) in text
        assert report_images._figure(cells["mnist_10_random"]["MLP"]) in text
        assert "15,680 + 200 of labels" in text
        assert "43.2%" in text
        assert "a GPU" in text
    assert "(2 networks)" in full
    assert main.count("\n| [MNIST") == 2  # lines, however many versions


def test_rows_of_another_machine_are_taken_in(
    small: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, folder, "--out", str(small), "--only", "mnist_lenet_10", "mnist_lenet_10_hard", "--count", "2")
    home, runs = tmp_path / "results", tmp_path / "runs"
    home.mkdir()
    (home / "images.json").write_text(json.dumps({"rows": {}, "cells": {"mnist_10_random": {"MLP": {}}}, "race": 1}))
    monkeypatch.setattr(image_place, "RESULTS", home)
    monkeypatch.setattr(image_place, "RUNS", runs)
    run(monkeypatch, folder, "--take", str(small))
    there, here = (json.loads((at / "images.json").read_text()) for at in (small, home))
    assert here["rows"] == there["rows"]
    assert here["cells"] == {"mnist_10_random": {"MLP": {}}, **there["cells"]}
    assert here["race"] == 1
    assert {path.name for path in home.iterdir()} == {"images.json", "mnist_lenet_10.h5", "mnist_lenet_10.png"}
    place = image_place.Place.at(None)
    for name in here["rows"]:
        assert place.artifact(name).config == here["rows"][name]["config"]


def test_a_run_goes_on_with_the_steps_that_it_was_planned_for(
    small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--out", str(small), "--only", "mnist_lenet_10", "--minutes", "0.01", "--count", "2"]
    stopped = images.InterruptedRunError(2, 2)

    def stop(_: Any) -> None:
        raise stopped

    monkeypatch.setattr(images, "steps_for", lambda *_: 3)
    with monkeypatch.context() as inside:
        inside.setattr(images.Shown, "finish", stop)
        with pytest.raises(SystemExit, match="mnist_lenet_10: stopped after outer step 2; the same command goes on"):
            run(inside, folder, *words)
    monkeypatch.setattr(images, "steps_for", lambda *_: pytest.fail("the end is known"))
    run(monkeypatch, folder, *words)
    kept = json.loads((small / "images.json").read_text())["rows"]["mnist_lenet_10"]
    assert kept["config"]["outer_steps"] == 3

    monkeypatch.setitem(ROWS, "mnist_lenet_10", replace(ROWS["mnist_fixed_10"], networks=()))
    with pytest.raises(SystemExit, match=r"has other settings than mnist_lenet_10 has now; remove .*0.01min"):
        run(monkeypatch, folder, *words)


def test_the_time_sets_how_many_steps_there_are(mnist: Dataset, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which a start takes 3 s, a step 2 s and the first one 7 s, a look 1 s."""
    now = [0.0]
    costs = {"start": 3.0, "step": 2.0, "look": 1.0}

    class Timed:
        def __init__(self, *_: Any) -> None:
            now[0] += costs["start"]
            self.steps = 0

        def step(self) -> None:
            self.steps += 1
            now[0] += costs["step"] + 5.0 * (self.steps == 1)

        def validation_accuracy(self) -> float:
            now[0] += costs["look"]
            return 0.5

    monkeypatch.setattr(images.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(images, "Distiller", Timed)
    found = images.steps_for(ROWS["mnist_lenet_10"].config, mnist, 200.0)
    # 3 + (7 + 2) + 1 spent; the start, the 5 s more of a first step and ten looks come again
    assert found == (200 - 13 - 3 - 5 - 10) // 2
    assert images.steps_for(ROWS["mnist_lenet_10"].config, mnist, 0.1) == 1


def test_what_is_distilled_anew_is_measured_anew(tmp_path: Path) -> None:
    kept = image_place.Kept(tmp_path / "images.json")
    row = {"config": {"seed": 0}, "seconds": 1.0, "machine": {"threads": 1}}
    kept.row("mnist_lenet_10", row)
    kept.cell("mnist_lenet_10", "MLP", {"mean": 0.5})
    kept.row("mnist_lenet_10", row | {"machine": {"threads": 2}})
    assert kept.read()["rows"]["mnist_lenet_10"] == row  # it was distilled by one
    assert kept.read()["cells"]["mnist_lenet_10"] == {"MLP": {"mean": 0.5}}
    kept.row("mnist_lenet_10", row | {"seconds": 2.0})
    assert kept.read()["cells"] == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "mnist_lenet"], "--only has mnist_lenet; accepted are mnist_lenet_10, "),
        (["--only", "mnist_10_random"], "--only has mnist_10_random"),
        (["--measure", "--only", "race"], "--only has race"),
        (["--measure", "--networks", "MPL"], "--networks has MPL; accepted are LeNet, "),
        (["--minutes", "0"], "--minutes is 0.0"),
        (["--threads", "0"], "--threads is 0"),
        (["--count", "1"], "--count is 1"),
    ],
)
def test_mistakes_are_named(
    words: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, folder, *words)
    assert message in capsys.readouterr().err


def test_what_is_besides_is_run_and_reported(
    mnist: Dataset, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RACE", "CHOICE"):
        short = replace(getattr(image_race, name), epochs=1, batch_size=64)
        monkeypatch.setattr(image_race, name, short)
    results = {"rows": {}, "cells": {}, **{name: beside(mnist, True) for name, beside in image_race.BESIDES.items()}}
    results = MEASURED | json.loads(json.dumps(results))
    text = report_images.section(results)
    compared = results["starts_and_windows"]["found"]
    assert [(one["start"], one["window"]) for one in compared] == [
        ("real", 40),
        ("real", None),
        ("kmeans", 40),
        ("kmeans", None),
    ]
    assert all(report_images_race.in_words(one) in text for one in compared)
    assert not illegible(report_images_race.picture(results))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.h5")), ids=lambda p: p.name)
def test_committed_artifacts_are_those_of_the_table(path: Path) -> None:
    artifact = read(path)
    row = (MEASURED["rows"] | MEASURED.get("earlier", {}))[path.stem]
    assert artifact.config == row["config"]
    assert artifact.evaluation.keys() == set(artifact.architectures)
    assert path.with_suffix(".png").exists()
    if path.stem in MEASURED["rows"]:
        assert row["numbers"] == artifact.numbers


def test_every_row_of_the_table_has_the_settings_of_the_script() -> None:
    for name, row in MEASURED["rows"].items():
        about = image_rows.row_of(name)
        expected = replace(about.config, **(about.on_gpu if name.endswith(image_rows.CUDA) else {}))
        config = Config.from_dict(row["config"] | {"device": "cpu"})
        assert image_rows.agrees(config, expected, row["minutes"] is not None), f"{name}: other settings"
        for networks in zip(about.made_for, about.config.architectures, strict=True):
            assert set(networks) & MEASURED["cells"][name].keys()
        if not FROM_AN_SDIST:
            assert name.endswith(("_hard", "_hard_cuda")) or (RESULTS / f"{name}.h5").exists()
    assert Config.from_dict(MEASURED["race"]["config"]) == image_race.RACE
