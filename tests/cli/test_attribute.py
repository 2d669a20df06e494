"""revdistill attribute: what it writes, that a killed one goes on to the same files, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from revdistill.cli import main as command
from revdistill.cli.texts import check_lines

import revdistill as rd
from revdistill.attribute import plots
from revdistill.attribute.attributing import Attributing
from revdistill.attribute.check import Check, random_subsets
from revdistill.attribute.found import read_config
from revdistill.attribute.result import read
from revdistill.outer.directory import read_metrics

SETTINGS = (
    "--dataset moons --arch NonLinearNet --examples 60 --epochs 1 --batch-size 20 --queries 5 --check "
    "--retrainings 12 --drop 0.05 --flip 0.1 --seed 3"
)
TINY = ["attribute", *SETTINGS.split()]
FILES = ("attribution.h5", "harmful.csv", "flipped.json")
PICTURES = {"examples.png", "scores.png", "check.png"}


def invoke(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = command.run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "moons"
    assert command.run([*TINY, "--out", str(directory)]) == 0
    return directory


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "draw_all", lambda *_: [])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_written(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {*FILES, "attributing.h5", "metrics.jsonl", "plots"}
    assert {path.name for path in (finished / "plots").iterdir()} == PICTURES
    loaded, kept = rd.Attribution.load(finished / "attribution.h5"), read(finished / "attribution.h5")
    assert loaded.scores.shape == (5, 60)
    assert np.array_equal(loaded.scores.numpy(), kept.scores)
    assert loaded.checked is not None
    assert loaded.checked.dropped.shape == (12, 60)
    assert (loaded.checked.dropped.sum(1) == 3).all()
    assert kept.config == read_config(finished / "attributing.h5").to_dict()
    parts = [entry["part"] for entry in read_metrics(finished / "metrics.jsonl")]
    assert parts == ["attribution", "smoothness", *["retrainings"] * 2, *["flipped labels"] * 4]


def test_the_table_of_harmful_examples(finished: Path) -> None:
    """All examples by mean score; their indices lead to them in the data as scikit-learn makes them."""
    from sklearn.datasets import make_moons

    with h5py.File(finished / "attribution.h5") as file:
        harm = file["scores"][()].astype(np.float64).mean(0)
        places, wrong = file["examples"][()], file["wrong"][()]
        queries = file["queries"][()]
    _, y = make_moons(n_samples=1500, noise=0.05, random_state=8)
    rows = rows_of(finished / "harmful.csv")
    assert [float(row["score"]) for row in rows] == sorted(harm.tolist(), reverse=True)
    assert dict(zip(places.tolist(), harm.tolist(), strict=True)) == {int(r["index"]): float(r["score"]) for r in rows}
    flipped = {int(row["index"]) for row in rows if row["flipped"] == "1"}
    assert flipped == set(places[wrong > 0].tolist())
    assert len(flipped) == 6
    for row in rows:
        assert (int(row["label"]) != y[int(row["index"])]) == (row["flipped"] == "1")
    assert not set(places.tolist()) & set(queries.tolist())
    assert abs(int(y[queries].sum()) * 2 - 5) == 1  # of each class as many, as far as that goes


def test_flipped_json_against_the_table(finished: Path) -> None:
    found, rows = json.loads((finished / "flipped.json").read_text()), rows_of(finished / "harmful.csv")
    wrong = [row["flipped"] == "1" for row in rows]
    pairs = [float(float(a["score"]) > float(b["score"])) for a in rows for b in rows if a["flipped"] > b["flipped"]]
    assert found["auroc"]["harm"] == pytest.approx(np.mean(pairs))
    assert (found["flipped"], found["examples"], found["worst"]) == (6, 60, 6)
    assert found["precision"]["harm"] == pytest.approx(np.mean(wrong[:6]))
    assert set(found["accuracy"]) == {"none", "flipped", "harm", "training_loss"}
    assert all(len(each["accuracies"]) == 5 for each in found["accuracy"].values())
    assert read(finished / "attribution.h5").flipped == found


@pytest.mark.usefixtures("without_pictures")
def test_what_is_said(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = invoke(*TINY, "--resume", "--out", str(finished), capsys=capsys)
    assert (code, err) == (0, "")
    shown = invoke("show", str(finished), capsys=capsys)
    assert (shown[0], shown[2]) == (0, "")
    first = rows_of(finished / "harmful.csv")[0]
    check = read(finished / "attribution.h5").check
    assert check is not None
    for said in (out, shown[1]):
        assert first["index"] in said
        assert f"LDS {check.mean:.3f} (" in said
        assert f"smoothness {check.smoothness:.2f}" in said
        assert "6 of 60 labels were flipped on purpose" in said
        assert "the highest training losses" in said
    assert "resuming after step 8 of 8" in out
    assert str(finished / "plots/check.png") in shown[1]
    assert invoke("show", str(finished / "attribution.h5"), capsys=capsys)[1] == shown[1]


def test_what_helps_is_said_where_the_check_is_bad() -> None:
    scores, losses = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)), torch.ones(3)
    dropped = random_subsets(20, 0.2, 30, 0)
    actual = losses - (scores @ dropped.T.float()).T
    for true, smoothness, said in (
        (actual, 0.9, ""),
        (actual, 0.2, "training is not smooth"),
        (actual[torch.arange(29, -1, -1)], 0.9, "an LDS below 0.8"),
    ):
        check = Check.of(scores, losses, dropped, true, drop=0.2, seed=0, smoothness=smoothness)
        lines = check_lines(check)
        assert "30 trainings, each without 20 % of the examples" in lines[0]
        assert len(lines) == 2 + bool(said)
        assert lines[-1].startswith(said or "smoothness 0.90")
        assert not said or "GELU or softplus" in lines[-1]


@pytest.mark.usefixtures("without_pictures")
def test_one_that_is_killed_after_every_step_gives_the_same_files(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, step, made = tmp_path / "run", Attributing.step, 0

    def killed(self: Attributing) -> Any:
        nonlocal made
        if made:
            raise SystemExit(137)
        made += 1
        return step(self)

    resume: list[str] = []
    for done in range(8):
        made = 0
        with monkeypatch.context() as patch:
            patch.setattr(Attributing, "step", killed)
            if done < 7:
                with pytest.raises(SystemExit):
                    command.run([*TINY, *resume, "--out", str(out)])
            else:
                assert command.run([*TINY, *resume, "--out", str(out)]) == 0
        resume = ["--resume"]
        said = capsys.readouterr().out
        assert f"resuming after step {done} of 8" in said or not done
        assert (out / "attribution.h5").exists() == (done == 7)
    for name in FILES:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    lines = [[entry | {"seconds": 0} for entry in read_metrics(p / "metrics.jsonl")] for p in (out, finished)]
    assert lines[0] == lines[1]


@pytest.mark.usefixtures("heard_signals", "without_pictures")
def test_ctrl_c_stops_within_a_step_and_loses_no_finished_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, retrained = tmp_path / "run", Attributing._retrain

    def stopped(self: Attributing) -> Any:
        if self.outer_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("it went on")
        return retrained(self)

    with monkeypatch.context() as patch:
        patch.setattr(Attributing, "_retrain", stopped)
        code, _, err = invoke(*TINY, "--out", str(out), capsys=capsys)
    assert code == 130
    assert "stopped after step 3 of 8; go on with:\n" in err
    assert f"revdistill attribute --resume --out {out}\n" in err
    code, said, err = invoke("attribute", "--resume", "--out", str(out), capsys=capsys)
    assert (code, err) == (0, "")
    assert "resuming after step 3 of 8" in said
    assert all((out / name).read_bytes() == (finished / name).read_bytes() for name in FILES)


BAD = {
    "examples": (["--examples", "9999"], "examples is 9999; accepted is an integer from 2 to 904, the number of"),
    "one example": (["--examples", "1"], "--examples"),
    "queries": (
        ["--queries", "496"],
        "queries is 496; accepted is an integer from 1 to 495, the test samples of moons",
    ),
    "no sample to measure": (["--queries", "495", "--flip", "0.1"], "from 1 to 494, all but one of the test samples"),
    "drop": (["--drop", "1"], "--drop"),
    "retrainings": (["--retrainings", "2"], "--retrainings"),
    "flip": (["--flip", "1"], "--flip"),
    "optimizer": (["--optimizer", "lion"], "'sgd', 'adam', 'adamw', 'rmsprop'"),
    "eps of none": (["--optimizer", "sgd", "--eps", "0.1"], "eps is 0.1; accepted is none with optimizer sgd"),
    "rate": (["--lr", "1e-300"], "lr is 1e-300; accepted is a number of at least 1e-30"),
    "misfit": (["--arch", "LeNet"], "at least 12 x 12"),
    "own architecture": (["--arch", "no.such:thing"], "cannot import 'no.such'"),
    "dataset": (["--dataset", "moonz"], "--dataset: unknown dataset 'moonz'; accepted are digits"),
    "resume nothing": (["--resume", "--out", "nothing"], "nothing holds no attributing.h5 to resume from"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke("attribute", "--dataset", "moons", *arguments, capsys=capsys)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("revdistill: ")
    assert not list(tmp_path.iterdir())


def test_what_is_refused_of_a_directory(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        code, out, err = invoke(*arguments, capsys=capsys)
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    assert f"--out: {finished} already holds an attribution; give another directory, or resume it" in refused(
        *TINY, "--out", str(finished)
    )
    other = refused("attribute", "--resume", "--out", str(finished), "--lr", "0.5")
    assert "--lr is 0.5, but the attribution in" in other
    assert "has 0.001; resume without it" in other
    message = refused("tune", "--dataset", "moons", "--out", str(finished))
    assert "already holds the metrics.jsonl of another job" in message
    message = refused("evaluate", str(finished))
    assert "holds no distilled.h5 but an attribution's attribution.h5 (revdistill show" in message
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(finished / "attributing.h5", half)
    assert f"(revdistill attribute --resume --out {half})" in refused("show", str(half))
    (half / "attribution.h5").write_bytes((finished / "attribution.h5").read_bytes()[:3000])
    assert "attribution.h5: is damaged" in refused("show", str(half))


DAMAGED: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "losses": (lambda file: replaced(file, "losses", np.zeros(4, np.float32)), "'losses' has shape [4]; expected [5]"),
    "actual": (lambda file: replaced(file, "actual", np.zeros((13, 5), np.float32)), "expected [1 to 12, 5]"),
    "accuracies": (lambda file: file.attrs.__setitem__("accuracies", '{"harm": [1]}'), "must hold 5 numbers of each"),
    "smoothness": (lambda file: file.attrs.__setitem__("smoothness", '["a"]'), "must list a number or null"),
}


def replaced(file: h5py.File, name: str, values: np.ndarray) -> None:
    del file[name]
    file.create_dataset(name, data=values)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint(name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = DAMAGED[name]
    shutil.copy(finished / "attributing.h5", tmp_path)
    with h5py.File(tmp_path / "attributing.h5", "a") as file:
        damage(file)
    code, out, err = invoke("attribute", "--resume", "--out", str(tmp_path), capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "attributing.h5: " in err
    assert message in err


def test_own_data_with_names_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features that are no points: a table is drawn. Data that changed meanwhile are not gone on with."""
    monkeypatch.chdir(tmp_path)
    x, names = np.random.default_rng(0).normal(size=(60, 5)), np.array(["$a$", "\u0436", "a long name of a class"])
    np.savez("a.npz", x=x, y=names[np.arange(60) % 3])
    small = "--dataset a.npz --arch LinearNet --epochs 1 --queries 3 --optimizer sgd --out run"
    code, out, err = invoke("attribute", *small.split(), capsys=capsys)
    assert (code, err) == (0, "")
    assert "a.npz: LinearNet trained on 40 samples, 1 steps of sgd" in out
    rows = rows_of(tmp_path / "run/harmful.csv")
    assert list(rows[0]) == ["index", "label", "score"]
    assert len(rows) == 40
    assert all(row["label"] == names[int(row["index"]) % 3] for row in rows)
    assert {path.name for path in (tmp_path / "run/plots").iterdir()} == PICTURES - {"check.png"}
    assert not (tmp_path / "run/flipped.json").exists()
    np.savez("a.npz", x=x * 1.001, y=names[np.arange(60) % 3])
    code, _, err = invoke("attribute", "--resume", "--out", "run", capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot resume run with other data" in err
