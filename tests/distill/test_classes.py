"""Classes go by their names: from the data's labels to the artifact, and back where it is evaluated and shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from revdistill.cli import main as command

from revdistill.distill.artifact import Artifact, read
from revdistill.distill.classes import fitted
from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.distill.evaluation import evaluate
from revdistill.distill.plots import images
from revdistill.outer.data import Dataset, load
from tests.distill.test_artifact import artifact

DRAW = np.random.default_rng(0)
Y = np.arange(80) % 2
X = DRAW.normal(size=(80, 3)) * 0.3 + np.eye(3)[Y] * 3  # apart: a network that is right on them is right on all


def written(path: Path, labels: Any, **arrays: Any) -> str:
    np.savez(path, x=X, y=labels, x_test=X[:20], y_test=labels[:20], **arrays)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = command.run(arguments)
    return code, *capsys.readouterr()


def test_labels_3_and_7_from_train_to_evaluate_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, own = str(tmp_path / "run"), written(tmp_path / "own.npz", np.array([7, 3])[Y])
    quick = ["--arch", "NonLinearNet", "--steps", "3", "--epochs", "2", "--outer-steps", "20", "--per-class", "2"]
    code, printed, _ = run(capsys, "train", "--dataset", own, *quick, "--out", out)
    assert code == 0
    assert "classes: 0 = 3, 1 = 7\n" in printed
    found = read(tmp_path / "run/distilled.h5")
    assert found.classes == [3, 7]
    assert found.evaluation["NonLinearNet"]["mean"] > 0.9

    code, printed, err = run(capsys, "show", out)
    assert (code, err) == (0, "")
    assert "classes         0 = 3, 1 = 7\n" in printed

    def accuracy(dataset: str) -> float:
        code, printed, _ = run(capsys, "evaluate", out, "--dataset", dataset, "--restarts", "2", "--json")
        assert code == 0
        return float(json.loads(printed)["NonLinearNet"]["mean"])

    assert accuracy(own) > 0.9
    texts = written(tmp_path / "texts.npz", np.array(["7", "3"])[Y])
    assert accuracy(texts) == accuracy(own)
    swapped = written(tmp_path / "swapped.npz", np.array([3, 7])[Y])  # the names say so: everything is wrong
    assert accuracy(swapped) == pytest.approx(1 - accuracy(own))

    for labels in (Y, np.array([3, 8])[Y], np.array(["cat", "dog"])[Y], np.arange(80) % 3 + 3):
        code, printed, err = run(capsys, "evaluate", out, "--dataset", written(tmp_path / "others.npz", labels))
        assert (code, printed, err.count("\n")) == (2, "", 1)
        assert "that the distilled data do not have; they have [3, 7]" in err


def dataset(labels: Any, path: Path) -> Dataset:
    return load(written(path / "data.npz", labels))


def test_some_of_the_classes_in_their_own_order(tmp_path: Path) -> None:
    data = dataset(np.array(["dog", "ant"])[Y], tmp_path)
    base = replace(artifact(), x=np.zeros((4, 6, 3), np.float32), classes=["bee", "dog", "ant"])
    found = fitted(base, data)
    assert (found.classes, found.class_names) == (3, ("bee", "dog", "ant"))
    assert found.y_test.tolist() == np.array([1, 2])[Y[:20]].tolist()
    assert torch.equal(found.x, data.x)
    assert evaluate(base, data, "LinearNet", restarts=1).restarts == 1  # networks with three outputs
    soft = replace(base, y=np.full((4, 6, 3), 1 / 3, np.float32))
    assert fitted(soft, data).classes == 3


@pytest.mark.parametrize("soft", [False, True])
def test_an_artifact_without_names(tmp_path: Path, soft: bool) -> None:
    """Its classes are 0 to n - 1; an earlier release's may be those of the very file that it was distilled from."""
    plain = replace(artifact(), x=np.zeros((4, 6, 3), np.float32))
    plain = replace(plain, y=np.full((4, 6, 2), 0.5, np.float32)) if soft else plain
    numbers = dataset(Y, tmp_path)
    assert fitted(plain, numbers) is numbers
    more = dataset(np.arange(80) % 4, tmp_path)
    if soft:
        with pytest.raises(ValueError, match=r"classes \[2, 3\] that the distilled data do not have"):
            fitted(plain, more)
    else:
        assert fitted(plain, more) is more  # hard labels need not show every class
    named = dataset(Y * 4 + 3, tmp_path)
    with pytest.raises(ValueError, match=r"classes \[3, 7\] that the distilled data do not have; they have \[0, 1\]"):
        fitted(plain, named)
    assert fitted(replace(plain, dataset=named.name), named) is named


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"entries of shape \[2\], but dataset .* of \[3\]"):
        fitted(artifact(), dataset(Y, tmp_path))


def distilled(data: Dataset) -> Artifact:
    return Distiller(Config(steps=2, architectures=("MLP",)), data).artifact()


def test_names_are_kept_and_shown_over_the_images(tmp_path: Path) -> None:
    x = DRAW.normal(size=(80, 1, 6, 6))
    names = np.array(["$x$", "a long name of a class"])
    np.savez(tmp_path / "images.npz", x=x, y=names[Y])
    found = distilled(load(str(tmp_path / "images.npz")))
    assert found.classes == names.tolist()
    assert [t for ax in images(found).axes if (t := ax.get_title())] == [r"\$x\$", "a long na..."]
    assert distilled(load("digits")).classes == []
