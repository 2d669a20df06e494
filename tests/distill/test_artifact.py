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
from revdistill.distill import parametrization
from revdistill.distill.artifact import Artifact, read, write
from revdistill.distill.evaluation import evaluate, train_plainly
from revdistill.distill.parametrization import form_of
from revdistill.outer.data import load
from revdistill.outer.hdf5 import reading
from revdistill.outer.models import build
from revdistill.outer.networks import NetworkStack
from revdistill.outer.random_streams import evaluation_seed
from revdistill.outer.whitening import Whitening
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


_WHITENING = ("mean", "components", "scales")
# the attributes of version 1
FIRST = {"format_version", "revdistill_version", "torch_version", "dataset", "architectures", "steps", "epochs", "seed"}
FIRST |= {"normalization", "config", "evaluation"}


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
        assert set(f.attrs) == FIRST
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


def _delete(name: str) -> Any:
    def change(f: h5py.File, path: Path) -> None:
        del f[name]

    return change


def _both(x: np.ndarray, pack: int) -> Any:
    def change(f: h5py.File, path: Path) -> None:
        _set("x", x)(f, path)
        f.attrs["pack"] = pack

    return change


def _scaled(first: float) -> Any:
    def change(f: h5py.File, path: Path) -> None:
        f["whitening_scales"][0] = first

    return change


def _long_components(f: h5py.File, path: Path) -> None:
    f["whitening_components"][0, 0] = 1e20


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


def formed(kind: str, **changes: Any) -> Artifact:
    """Eight images of 4 x 4 in each of two batches, stored in another form, or whitened."""
    draw = np.random.default_rng(1)

    def values(*shape: int) -> np.ndarray:
        return draw.normal(size=shape).astype(np.float32)

    form, pack, x = {}, 1, values(2, 8, 1, 4, 4)
    if kind == "packed":
        form, pack = {"x": values(2, 2, 1, 4, 4)}, 2
    elif kind == "bases":
        form = {"bases": values(3, 1, 2, 2), "coefficients": values(2, 8, 3)}
    if form:
        made = form_of({name: v.shape for name, v in form.items()}, pack)
        x = made.inputs({name: torch.from_numpy(v) for name, v in form.items()}).numpy()
    whitening = Whitening.of(torch.from_numpy(values(30, 1, 4, 4))) if kind == "whitened" else None
    rates: dict[str, Any] = {name: np.full(4, 0.5, np.float32) for name in ("lr", "momentum")}
    rest: dict[str, Any] = {"y": np.arange(16).reshape(2, 8) % 2, "form": form, "pack": pack, "whitening": whitening}
    return artifact(x=x, **rest | rates | changes)


FORMS: dict[str, set[str]] = {
    "packed": {"x"},
    "bases": {"bases", "coefficients"},
    "whitened": {"x", "whitening_mean", "whitening_components", "whitening_scales"},
}


@pytest.mark.parametrize("kind", FORMS)
def test_other_forms_are_read_as_they_were_written(kind: str, tmp_path: Path) -> None:
    """In a version that readers which know of none refuse; with the bits of the inputs that were trained on."""
    path = tmp_path / "distilled.h5"
    soft = np.full((2, 8, 2), 0.5, np.float32)
    for a in (formed(kind), formed(kind, y=soft, optimizer="adam", weight_decay=0.1, classes=["cat", "dog"])):
        write(path, a)
        found = read(path)
        assert equal(found, a)
        assert found.pack == a.pack
        assert found.form.keys() == a.form.keys()
        assert all(np.array_equal(found.form[name], a.form[name]) for name in a.form)
        if kind == "whitened":
            assert found.whitening is not None
            assert a.whitening is not None
            assert all(torch.equal(getattr(found.whitening, n), getattr(a.whitening, n)) for n in _WHITENING)
            assert found.whitening.rest == a.whitening.rest
        else:
            assert found.whitening is None
        with h5py.File(path) as f:
            assert set(f) == {"y", "lr", "momentum"} | FORMS[kind]
            assert f.attrs["format_version"] == 5
            assert f.attrs["steps"] == 2
            assert {"optimizer", "weight_decay", "classes", "pack"} <= set(f.attrs)
        with reading(path) as file, pytest.raises(rd.ArtifactError, match=r"version 5; this release .* 1 and 2 and 3"):
            file.check_version(1, 2, 3, 4)
    numbers = {"packed": 2 * 2 * 16, "bases": 3 * 4 + 2 * 8 * 3, "whitened": 2 * 8 * 16}[kind]
    assert formed(kind).numbers == {"inputs": numbers, "labels": 0}
    assert formed(kind, y=soft).numbers == {"inputs": numbers, "labels": 2 * 8 * 2}


def test_earlier_versions_are_written_as_before(tmp_path: Path) -> None:
    more = ({}, {"optimizer": "adam"}, {"weight_decay": 0.1}, {"classes": [3, 7]})
    names = ["optimizer", "weight_decay", "classes"]
    for version, changes in enumerate(more, 1):
        write(tmp_path / "a.h5", artifact(**changes))
        with h5py.File(tmp_path / "a.h5") as f:
            assert f.attrs["format_version"] == version
            assert set(f) == {"x", "y", "lr", "momentum"}
            assert set(f.attrs) == FIRST | set(names[: version - 1])
            assert np.array_equal(f["x"][()], artifact().x)


HOSTILE_FORMS: dict[str, tuple[str, Any, str]] = {
    "no pack": ("packed", _attribute("pack", None), "no attribute 'pack'"),
    "pack 0": ("packed", _attribute("pack", 0), "'pack' is 0, which does not go with 'x'"),
    "negative pack": ("packed", _attribute("pack", -2), "'pack' is -2"),
    "pack of another size": ("packed", _attribute("pack", 3), r"'pack' is 3, .* shape \[2, 2, 1, 4, 4\]"),
    "huge pack": ("packed", _attribute("pack", 2**40), "'pack' is 1099511627776"),
    "pack as text": ("packed", _attribute("pack", "2"), "expected an integer"),
    "packed otherwise": ("packed", _attribute("pack", 4), r"'y' has shape \[2, 8\]"),
    "packed vectors": ("packed", _set("x", np.zeros((2, 2, 4), np.float32)), "'pack' is 2, which does not go with"),
    "packed nothing": ("packed", _set("x", np.zeros((2, 2, 1, 0, 4), np.float32)), "x' has shape|damaged"),
    "packed nan": ("packed", _set("x", np.full((2, 2, 1, 4, 4), np.nan, np.float32)), "not finite"),
    "packed by link": ("packed", _soft_link, "link to somewhere else"),
    "from few numbers": ("packed", _both(np.zeros((2**7, 2**7, 1, 8, 8), np.float32), 64), "pack' is 64, which does"),
    "many numbers": ("packed", _both(np.zeros((3, 1, 1, 64, 2048), np.float32), 64), "inputs of 1,610,612,736 numbers"),
    "long images": (
        "packed",
        _both(np.zeros((1, 1, 1, 2, 2**16), np.float32), 2),
        "images of 2 x 65,536; at most 2,048",
    ),
    "pack with bases": ("bases", _attribute("pack", 2), "does not go with bases"),
    "no coefficients": ("bases", _delete("coefficients"), "no dataset 'coefficients'"),
    "no bases": ("bases", _delete("bases"), "no dataset 'x'"),
    "other bases": (
        "bases",
        _set("bases", np.zeros((4, 1, 2, 2), np.float32)),
        r"'coefficients' has shape \[2, 8, 3\]",
    ),
    "bases of vectors": ("bases", _set("bases", np.zeros((3, 4), np.float32)), r"bases of shape \[3, 4\]"),
    "empty bases": ("bases", _set("bases", np.zeros((3, 0, 2, 2), np.float32)), r"bases of shape \[3, 0, 2, 2\]"),
    "no images": ("bases", _set("coefficients", np.zeros((2, 0, 3), np.float32)), r"x' has shape \[2, 0, 1, 4, 4\]"),
    "other images": ("bases", _set("coefficients", np.zeros((2, 7, 3), np.float32)), r"'y' has shape \[2, 8\]"),
    "bases nan": ("bases", _set("bases", np.full((3, 1, 2, 2), np.inf, np.float32)), "not finite"),
    "bases too large": ("bases", _set("bases", np.full((3, 1, 2, 2), 3e38, np.float32)), "inputs that are not finite"),
    "long bases": (
        "bases",
        _set("bases", np.zeros((3, 1, 2, 2**14), np.float32)),
        "images of 4 x 32,768; at most 2,048",
    ),
    "bases float64": ("bases", _set("bases", np.zeros((3, 1, 2, 2))), "dtype float64"),
    "no rest": ("whitened", _attribute("whitening_rest", None), "no attribute 'whitening_rest'"),
    "rest of 0": ("whitened", _attribute("whitening_rest", 0.0), "from 1e-30 to 1e30, got 0.0"),
    "rest nan": ("whitened", _attribute("whitening_rest", math.nan), "finite"),
    "no mean": ("whitened", _delete("whitening_mean"), "no dataset 'whitening_mean'"),
    "other mean": ("whitened", _set("whitening_mean", np.zeros(15, np.float32)), r"it must be \[\d+, 15\]"),
    "other features": ("whitened", _set("x", np.zeros((2, 8, 1, 4, 5), np.float32)), "whitens inputs of 16 features"),
    "scales": ("whitened", _set("whitening_scales", np.ones(3, np.float32)), r"scales \[3\] it must be \[3, 16\]"),
    "scale of 0": ("whitened", _scaled(0.0), "from 1e-30 to 1e30, got 0.0"),
    "scale of nothing": ("whitened", _scaled(1e-40), "from 1e-30 to 1e30"),
    "components": ("whitened", _long_components, "must be between -1 and 1"),
    "far mean": ("whitened", _set("whitening_mean", np.full(16, 1e38, np.float32)), "'whitening_mean' below 1e30"),
}


@pytest.mark.parametrize("name", [*HOSTILE, *HOSTILE_FORMS])
def test_hostile_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too large is refused before anything is made of it."""
    kind, change, message = HOSTILE_FORMS[name] if name in HOSTILE_FORMS else ("", *HOSTILE[name])
    path = tmp_path / "a.h5"
    write(path, formed(kind) if kind else artifact())
    with h5py.File(path, "a") as f:
        change(f, tmp_path)
    if "at most" in message or "numbers" in message:
        monkeypatch.setattr(parametrization, "enlarged", None)
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
