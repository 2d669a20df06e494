"""revdistill data, and what the other commands say of the data that they read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from revdistill.cli import main as command

X, Y = np.random.default_rng(0).integers(0, 256, (60, 6, 6, 3)).astype(np.uint8), np.arange(60) % 3
QUICK = ["--steps", "2", "--epochs", "1", "--outer-steps", "1"]


def invoke(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = command.run(arguments)
    return code, *capsys.readouterr()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "photos.npz"
    names = np.array(["bee", "ant", "cow\x1b[2J"])[Y]
    np.savez(path, train_images=X, train_labels=names[:, None], test_images=X[:9], test_labels=names[:9], ids=Y)
    return path


def test_everything_that_would_be_read_is_said(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = invoke("data", str(published), capsys=capsys)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == str(published)
    for line in (
        "train_images training inputs 60 x 6 x 6 x 3 uint8",
        "test_labels test labels 9 <U7",
        "inputs images of 6 x 6, 3 channels",
        "samples 54 training, 6 validation, 9 test",
        "split validation data: 10% of the training data, drawn by a fixed seed",
        "note images [60, 6, 6, 3] have their channels last: moved, to 3 channels of 6 x 6",
        "left unread ids",
        "values 0 to 255 in the training part, before normalization",
    ):
        assert line in lines
    (bee,) = [line.split() for line in lines if line.startswith("1 bee")]
    assert int(bee[2]) + int(bee[3]) == 20
    assert bee[4] == "3"
    assert "2 cow?[2J" in "\n".join(lines)
    assert any(line.startswith("normalization per channel: mean ") for line in lines)


def test_a_built_in_dataset_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = invoke("data", "moons", capsys=capsys)
    assert code == 0
    for text in ("2 features", "904 training, 101 validation, 495 test", "test data: 33%", "normalization  none"):
        assert text in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data"], "Missing argument 'DATASET'"),
        (["data", "digitz"], "DATASET: unknown dataset 'digitz'"),
        (["data", "none.npz"], "DATASET: none.npz: no such file"),
        (["data", "mnist", "--data-dir", "here"], "DATASET: mnist: no train-images"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = invoke(*arguments, capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_train_and_tune_say_what_is_not_as_expected(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [
        "images [60, 6, 6, 3] have their channels last: moved, to 3 channels of 6 x 6",
        "classes: 0 = ant, 1 = bee, 2 = cow?[2J",
        "left unread: ids",
    ]
    train = ["train", "--dataset", str(published), *QUICK, "--arch", "LinearNet", "--out", str(tmp_path / "run")]
    code, out, _ = invoke(*train, capsys=capsys)
    assert code == 0
    assert out.splitlines()[1:4] == said
    tune = ["tune", "--dataset", str(published), *QUICK[:2], "--outer-steps", "1", "--arch", "LinearNet"]
    code, out, _ = invoke(*tune, "--out", str(tmp_path / "tuned"), capsys=capsys)
    assert code == 0
    assert out.splitlines()[1:4] == said
    evaluate = ["evaluate", str(tmp_path / "run"), "--dataset", str(published), "--restarts", "1", "--json"]
    code, out, err = invoke(*evaluate, capsys=capsys)
    assert code == 0
    assert out.startswith("{")
    assert err.splitlines() == said
