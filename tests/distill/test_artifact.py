"""The artifact: read as it was written, usable without this project, and refused where it is damaged or hostile."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import revdistill as rd
from revdistill.distill.artifact import Artifact, read, write
from revdistill.distill.evaluation import evaluate, train_plainly
from revdistill.outer.data import load
from revdistill.outer.models import build
from revdistill.outer.networks import NetworkStack
from revdistill.outer.random_streams import evaluation_seed
from tests.distill.fuzz import flip


def artifact(**changes: Any) -> Artifact:
    draw = np.random.default_rng(0)
    base = Artifact(
        x=draw.normal(size=(4, 6, 2)).astype(np.float32),
        y=np.arange(24).reshape(4, 6) % 2,
        lr=np.linspace(0.1, 0.2, 8, dtype=np.float32),
        momentum=np.full(8, 0.9, np.float32),
        dataset="moons",
        architectures=["NonLinearNet"],
        epochs=2,
        seed=3,
        normalization={"mean": [0.0, 0.0], "std": [1.0, 1.0]},
        config={"steps": 4},
        evaluation={"NonLinearNet": {"mean": 0.5}},
    )
    return replace(base, **changes)


def equal(a: Artifact, b: Artifact) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("x", "y", "lr", "momentum"))
    texts = (
        "dataset",
        "architectures",
        "epochs",
        "seed",
        "config",
        "evaluation",
        "optimizer",
        "weight_decay",
        "classes",
    )
    return arrays and all(getattr(a, n) == getattr(b, n) for n in texts)


def test_round_trip(tmp_path: Path) -> None:
    soft = artifact(y=np.full((4, 6, 2), 0.5, np.float32))
    for a in (
        artifact(),
        soft,
        artifact(optimizer="adam"),
        artifact(weight_decay=0.1),
        artifact(optimizer="adam", weight_decay=1),  # an int
        artifact(classes=[3, 7]),
        artifact(classes=["cat", "dog"], optimizer="adam"),
    ):
        write(tmp_path / "distilled.h5", a)
        assert equal(read(tmp_path / "distilled.h5"), a)
        assert equal(read(str(tmp_path / "distilled.h5")), a)  # regression: said to be damaged
    assert [p.name for p in tmp_path.iterdir()] == ["distilled.h5"]


def test_usable_without_this_project(tmp_path: Path) -> None:
    """The recipe of the contract, with h5py and torch only."""
    write(tmp_path / "distilled.h5", artifact())
    with h5py.File(tmp_path / "distilled.h5") as f:
        x, y, lr, momentum = (torch.tensor(f[name][()]) for name in ("x", "y", "lr", "momentum"))
        assert json.loads(f.attrs["architectures"]) == ["NonLinearNet"]
        names = {
            "format_version",
            "revdistill_version",
            "torch_version",
            "dataset",
            "architectures",
            "steps",
            "epochs",
            "seed",
        }
        assert set(f.attrs) == names | {"normalization", "config", "evaluation"}
        assert f.attrs["steps"] * f.attrs["epochs"] == len(lr)
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for k in range(len(lr)):
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = float(lr[k]), float(momentum[k])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x[k % len(x)]), y[k % len(x)]).backward()
        optimizer.step()


def _file(path: Path) -> Path:
    write(path / "a.h5", artifact())
    return path / "a.h5"


def _set(name: str, values: Any, **kwargs: Any) -> Any:
    def change(f: h5py.File, path: Path) -> None:
        del f[name]
        f.create_dataset(name, data=values, **kwargs)

    return change


def _attribute(name: str, value: Any) -> Any:
    def change(f: h5py.File, path: Path) -> None:
        if value is None:
            del f.attrs[name]
        else:
            f.attrs[name] = value

    return change


def _external_link(f: h5py.File, path: Path) -> None:
    write(path / "secret.h5", artifact())
    del f["x"]
    f["x"] = h5py.ExternalLink(str(path / "secret.h5"), "/x")


def _soft_link(f: h5py.File, path: Path) -> None:
    del f["x"]
    f["x"] = h5py.SoftLink("/lr")


def _external_storage(f: h5py.File, path: Path) -> None:
    (path / "secret.bin").write_bytes(bytes(48 * 4))
    del f["x"]
    f.create_dataset("x", (4, 6, 2), "float32", external=[(str(path / "secret.bin"), 0, 48 * 4)])


def _virtual(f: h5py.File, path: Path) -> None:
    write(path / "secret.h5", artifact())
    layout = h5py.VirtualLayout((4, 6, 2), "float32")
    layout[:] = h5py.VirtualSource(str(path / "secret.h5"), "x", (4, 6, 2))
    del f["x"]
    f.create_virtual_dataset("x", layout)


def _huge(f: h5py.File, path: Path) -> None:
    del f["x"]
    f.create_dataset("x", (2**20, 2**10, 2**10), "float32", chunks=(1, 1, 1))


def _bomb(f: h5py.File, path: Path) -> None:
    del f["x"]
    f.create_dataset("x", data=np.zeros((400, 600, 20), np.float32), compression="gzip")


def _group(f: h5py.File, path: Path) -> None:
    del f["x"]
    f.create_group("x/x/x/x/x")


def _no_x(f: h5py.File, path: Path) -> None:
    del f["x"]


HOSTILE: dict[str, tuple[Any, str]] = {
    "external link": (_external_link, "link to somewhere else"),
    "soft link": (_soft_link, "link to somewhere else"),
    "external storage": (_external_storage, "in another file"),
    "virtual": (_virtual, "in another file"),
    "huge": (_huge, "declares 4398046511104 bytes"),
    "compressed": (_bomb, "declares"),
    "group": (_group, "not a dataset"),
    "missing": (_no_x, "no dataset 'x'"),
    "float64": (_set("x", np.zeros((4, 6, 2))), "dtype float64; expected float32"),
    "objects": (_set("x", "text"), "dtype object"),
    "nan": (_set("x", np.full((4, 6, 2), np.nan, np.float32)), "not finite"),
    "x shape": (_set("x", np.zeros(4, np.float32)), r"'x' has shape \[4\]"),
    "no batches": (_set("x", np.zeros((0, 6, 2), np.float32)), r"'x' has shape \[0, 6, 2\]"),
    "y shape": (_set("y", np.zeros((4, 5), np.int64)), r"'y' has shape \[4, 5\]"),
    "y dtype": (_set("y", np.zeros((4, 6), np.int8)), "'y' has dtype int8"),
    "y negative": (_set("y", np.full((4, 6), -1)), "classes below 0"),
    "lr length": (_set("lr", np.zeros(7, np.float32)), r"'lr' has shape \[7\]"),
    "lr negative": (_set("lr", np.full(8, -1, np.float32)), "at least 0"),
    "momentum": (_set("momentum", np.full(8, 2, np.float32)), "between 0 and 1"),
    "version": (_attribute("format_version", 99), "format version 99"),
    "version type": (_attribute("format_version", "1"), "expected an integer"),
    "epochs": (_attribute("epochs", 3), "expected"),
    "many epochs": (_attribute("epochs", 2**62), "expected"),
    "no dataset": (_attribute("dataset", None), "no attribute 'dataset'"),
    "json": (_attribute("config", "{not json"), "not JSON"),
    "deep json": (_attribute("config", "[" * 100_000), "not JSON"),
    "json kind": (_attribute("config", "[1]"), "expected a dict"),
    "architectures": (_attribute("architectures", "[1]"), "must list names"),
    "normalization": (_attribute("normalization", '{"mean": 1, "std": []}'), "normalization"),
    "large attribute": (_attribute("dataset", "x" * (5 * 2**20)), "too large|at most"),
    "array attribute": (_attribute("dataset", np.zeros(1000)), "too large"),
    "seed": (_attribute("seed", 1.5), "expected an integer"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    path = _file(tmp_path)
    with h5py.File(path, "a") as f:
        change(f, tmp_path)
    with pytest.raises(rd.ArtifactError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


_whole: list[bytes] = []


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files(tmp_path: Path, data: st.DataObject) -> None:
    """Truncated or with flipped bits: read right, or refused; never another error, never a hang."""
    if not _whole:
        _whole.append(_file(tmp_path).read_bytes())
    contents = bytearray(_whole[0])
    if data.draw(st.booleans(), "truncate"):
        contents = contents[: data.draw(st.integers(0, len(contents)), "length")]
    else:
        flip(contents, data.draw(st.lists(st.integers(0, len(contents) * 8 - 1), min_size=1, max_size=20), "bits"))
    path = tmp_path / "damaged.h5"
    path.write_bytes(contents)
    try:
        size, message = read(path).x.nbytes, str(path)
    except rd.ArtifactError as error:
        size, message = 0, str(error)
    assert size <= len(contents)
    assert str(path) in message


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(rd.ArtifactError, match="no such file"):
        read(tmp_path / "none.h5")
    with pytest.raises(rd.ArtifactError, match="damaged or not"):
        read(tmp_path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "distilled.h5"
    write(path, artifact())
    with pytest.raises(TypeError):
        write(path, artifact(config={"not json": object()}))
    assert equal(read(path), artifact())
    assert [p.name for p in tmp_path.iterdir()] == ["distilled.h5"]


def test_adams_data_are_not_taken_for_sgds(tmp_path: Path) -> None:
    """Another format version: a release that knows of no optimizer refuses it. And a fresh network is trained
    by Adam.
    """
    path = tmp_path / "distilled.h5"
    for optimizer, version in (("sgd", 1), ("adam", 2)):
        write(path, artifact(optimizer=optimizer))
        with h5py.File(path) as f:
            assert (f.attrs["format_version"], f.attrs.get("optimizer")) == (version, None if version == 1 else "adam")
    with h5py.File(path, "a") as f:
        f.attrs["optimizer"] = "lion"
    with pytest.raises(rd.ArtifactError, match="'optimizer' is 'lion'"):
        read(path)


def test_data_for_a_weight_decay_are_not_taken_for_others(tmp_path: Path) -> None:
    """As above: a reader that knows of none would train without it."""
    path = tmp_path / "distilled.h5"
    for optimizer in ("sgd", "adam"):
        write(path, artifact(optimizer=optimizer, weight_decay=0.25))
        with h5py.File(path) as f:
            assert {n: f.attrs[n] for n in ("format_version", "optimizer", "weight_decay")} == {
                "format_version": 3,
                "optimizer": optimizer,
                "weight_decay": 0.25,
            }
    for value, message in ((-1.0, "'weight_decay' is -1.0"), (math.nan, "finite"), ("0.1", "finite"), (1, "finite")):
        with h5py.File(path, "a") as f:
            f.attrs["weight_decay"] = value
        with pytest.raises(rd.ArtifactError, match=message):
            read(path)


@pytest.mark.parametrize(("optimizer", "weight_decay"), [("sgd", 0.0), ("sgd", 0.3), ("adam", 0.0), ("adam", 0.3)])
def test_training_on_an_artifact_is_torch_optim(optimizer: str, weight_decay: float) -> None:
    a = artifact(
        optimizer=optimizer, weight_decay=weight_decay, architectures=["LinearNet"], lr=np.full(8, 0.05, np.float32)
    )
    stack = NetworkStack("LinearNet", 1, (2,), 2, torch.device("cpu"))
    net, found = build("LinearNet", (2,), 2), stack.sample(evaluation_seed(a.seed))
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(found[name][0])
    steps: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=weight_decay)
    if optimizer == "adam":
        steps = torch.optim.Adam(net.parameters(), lr=0.05, betas=(0.9, 0.999), weight_decay=weight_decay)
    for k in range(8):
        steps.zero_grad()
        logits = net(torch.from_numpy(a.x[k % 4]))[:, 0]
        torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(a.y[k % 4]).float()).backward()
        steps.step()
    train_plainly(a, stack, found, a.lr.tolist(), a.momentum.tolist())
    for name, p in net.named_parameters():
        assert torch.allclose(found[name][0], p, rtol=1e-4, atol=1e-6)
    data = load("moons")
    expected = float(((net(data.x_test)[:, 0] > 0) == data.y_test).float().mean())
    assert evaluate(a, data, "LinearNet", restarts=1).mean == pytest.approx(expected, abs=1e-6)


def test_classes_with_names_are_not_taken_for_numbers(tmp_path: Path) -> None:
    """Another format version, and everything in it that earlier ones have; without names nothing is added."""
    path = tmp_path / "distilled.h5"
    write(path, artifact(classes=[3, 7], weight_decay=0.25))
    with h5py.File(path) as f:
        assert (f.attrs["format_version"], f.attrs["classes"]) == (4, "[3, 7]")
        assert (f.attrs["optimizer"], f.attrs["weight_decay"]) == ("sgd", 0.25)
    for value in ("[]", "[3]", "[3, 3]", "[3, 7.5]", "[true, false]", '[3, "7"]', "[[3], [7]]", "{}", "[1, 2, 3", 7):
        with h5py.File(path, "a") as f:
            f.attrs["classes"] = value
        with pytest.raises(rd.ArtifactError, match="'classes'"):
            read(path)
    write(path, artifact(y=np.full((4, 6, 2), 0.5, np.float32), classes=[3, 7, 9]))
    with pytest.raises(rd.ArtifactError, match="'classes' has 3 classes, but 'y' has 2"):
        read(path)
