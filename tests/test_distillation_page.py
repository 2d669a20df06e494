"""docs/distillation.md: its loop gives `evaluate`'s accuracies, from the file alone; files are what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdistill.distill.artifact import Artifact, write
from revdistill.distill.classes import fitted
from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.distill.evaluation import evaluate
from revdistill.outer.data import Dataset, load
from revdistill.outer.image_files import FROM_FILES
from revdistill.outer.networks import NetworkStack
from revdistill.outer.random_streams import evaluation_seed

PAGE = (Path(__file__).parents[1] / "docs/distillation.md").read_text()
NETWORK, READ, IMAGES, TRAIN = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
ROW = Path(__file__).parents[1] / "benchmarks/results/mnist_lenet_10.h5"
LENET = ("conv1", "conv2", "fc1", "fc2", "fc3")
FORMS: dict[str, dict[str, Any]] = {
    "version 1": {},
    "version 3": {"weight_decay": 0.05, "learn_labels": True},
    "bases": {"bases": 8, "weight_decay": 0.05, "learn_labels": True, "steps": 1, "epochs": 12},
    "packed": {"pack": 2},
    "whitened": {"zca": True, "pack": 2, "lr": 0.2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Some digits, as large as LeNet takes them."""
    from sklearn.datasets import load_digits

    found = load_digits(n_class=10)
    x = torch.from_numpy(found.images[:400] / 16).float()[:, None]
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x=F.interpolate(x, size=(28, 28), mode="nearest"), y=found.target[:400])
    return load(str(path))


def made(data: Dataset, changes: dict[str, Any]) -> Artifact:
    """Before anything is learned: what the data are is nothing to the page."""
    usual: dict[str, Any] = {"architectures": ("LeNet",), "steps": 2, "epochs": 6, "momentum": 0.8, "lr": 0.02}
    return Distiller(Config(data.name, **usual | changes), data).artifact()


@pytest.mark.parametrize("form", FORMS)
def test_the_loop_gives_what_evaluate_gives(
    form: str, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = made(data, FORMS[form])
    monkeypatch.chdir(tmp_path)
    write(Path("distilled.h5"), artifact)
    said = evaluate(artifact, data, "LeNet", restarts=2).accuracies
    starts = NetworkStack("LeNet", 2, (1, 28, 28), 10, torch.device("cpu")).sample(evaluation_seed(artifact.seed))
    mean, std = (torch.tensor(data.normalization[key]).view(-1, 1, 1) for key in ("mean", "std"))
    names: dict[str, Any] = {"x_test": data.x_test * std + mean, "y_test": data.y_test}
    exec(NETWORK, names)
    exec(READ + IMAGES, names)
    torch.testing.assert_close(names["data"]["x"], torch.from_numpy(artifact.x), rtol=1e-5, atol=1e-5)
    fresh, accuracies = names["fresh"], []
    for number in range(2):
        names["fresh"] = lambda number=number: started(fresh(), starts, number)
        exec(TRAIN, names)
        accuracies.append(float(names["accuracy"]))
    torch.testing.assert_close(names["images"], fitted(artifact, data).x_test, rtol=1e-4, atol=1e-4)
    assert max(said) > 0.3  # the training did something
    assert accuracies == pytest.approx(said, abs=1.5 / len(data.x_test))  # one image may lie on the border


@pytest.mark.skipif(
    "REVDISTILL_DATA_DIR" not in os.environ, reason="REVDISTILL_DATA_DIR does not say where MNIST's files are"
)
def test_the_loop_reproduces_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the table, from its committed file, by networks of its own."""
    shutil.copy(ROW, tmp_path / "distilled.h5")
    monkeypatch.chdir(tmp_path)
    (_, _), (x, y) = FROM_FILES["mnist"](Path(os.environ["REVDISTILL_DATA_DIR"]))
    names: dict[str, Any] = {"x_test": torch.tensor(x) / 255, "y_test": torch.tensor(y)}
    exec(NETWORK + READ + IMAGES, names)
    accuracies = []
    for seed in range(3):
        torch.manual_seed(seed)
        exec(TRAIN, names)
        accuracies.append(float(names["accuracy"]))
    row = json.loads(str(names["file"].attrs["evaluation"]))["LeNet"]
    assert np.mean(accuracies) == pytest.approx(row["mean"], abs=3 * row["std"])


def test_the_loop_is_short() -> None:
    assert len(READ.splitlines()[:2]) + len(TRAIN.splitlines()) == 10
    assert len(NETWORK[NETWORK.index("def") :].splitlines()) <= 10


def started(net: nn.Module, starts: dict[str, Tensor], number: int) -> nn.Module:
    """The page's network with the start of another."""
    drawn = [starts[f"{layer}.{part}"][number] for layer in LENET for part in ("weight", "bias")]
    with torch.no_grad():
        for own, p in zip(net.parameters(), drawn, strict=True):
            own.copy_(p)
    return net


def test_the_network_starts_as_ours() -> None:
    names: dict[str, Any] = {}
    exec(NETWORK, names)
    torch.manual_seed(0)
    ours = NetworkStack("LeNet", 1, (1, 28, 28), 10, torch.device("cpu")).sample(0)
    for own, p in zip(names["fresh"]().parameters(), ours.values(), strict=True):
        assert own.shape == p.shape[1:]
        if own.ndim > 1:
            assert float(own.detach().std()) == pytest.approx(float(p.std()), rel=0.25)
        else:
            assert not own.any()


def test_every_dataset_and_attribute_is_listed(data: Dataset, tmp_path: Path) -> None:
    named = {name for row in re.findall(r"^\| (`.*?) \|", PAGE, flags=re.M) for name in re.findall(r"`(\w+)`", row)}
    found = set[str]()
    for form in ("bases", "whitened"):
        write(tmp_path / "a.h5", replace(made(data, FORMS[form]), classes=["a"] * 10))
        with h5py.File(tmp_path / "a.h5") as file:
            found |= set(file) | set(file.attrs)
    assert found == named
