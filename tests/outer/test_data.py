"""Datasets: the built-in ones, and .npz files from users and strangers."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import revdistill as rd
from revdistill.outer.data import BUILT_IN, load


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_datasets(name: str) -> None:
    data, again = load(name), load(name)
    assert data.x.dtype == torch.float32
    assert data.y.dtype == torch.int64
    assert torch.equal(data.x, again.x)
    assert torch.equal(data.y_test, again.y_test)
    assert set(data.y.tolist()) == set(data.y_test.tolist()) == set(range(data.classes))
    if name == "digits":
        assert data.input_shape == (1, 8, 8)
        assert abs(float(data.x.mean())) < 1e-5
        assert abs(float(data.x.std()) - 1) < 1e-3
        raw = data.x * data.normalization["std"][0] + data.normalization["mean"][0]
        assert float((raw * 16 - (raw * 16).round()).abs().max()) < 1e-4  # what was recorded undoes what was done
    else:
        assert data.normalization == {"mean": [0.0, 0.0], "std": [1.0, 1.0]}


def test_moons_are_the_studys() -> None:
    from sklearn.datasets import make_moons
    from sklearn.model_selection import train_test_split

    x, y = make_moons(n_samples=1500, noise=0.05, random_state=8)
    _, x_test, _, y_test = train_test_split(x, y, test_size=0.33, random_state=8)
    data = load("moons")
    assert np.array_equal(data.x_test.numpy(), x_test.astype(np.float32))
    assert np.array_equal(data.y_test.numpy(), y_test)
    assert len(data.x) + len(data.x_validation) == 1005


def test_rows_lead_to_the_samples_as_they_were_found(tmp_path: Path) -> None:
    """Where parts are drawn from the training part, and where they are given."""
    x, y = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32), np.arange(80) % 2
    parts = {"x_test": x[60:], "y_test": y[60:], "x_val": x[50:60], "y_val": y[50:60]}
    whole = load(str(save(tmp_path / "a.npz", x=x, y=y)))
    given = load(str(save(tmp_path / "b.npz", x_train=x[:50], y_train=y[:50], **parts)))
    for data, tested in ((whole, x), (given, x[60:])):
        mean, std = (np.array(data.normalization[key], np.float32) for key in ("mean", "std"))
        assert np.allclose(data.x.numpy() * std + mean, x[data.rows], atol=1e-5)
        assert np.allclose(data.x_test.numpy() * std + mean, tested[data.rows_test], atol=1e-5)
    assert len(set(whole.rows.tolist()) | set(whole.rows_test.tolist())) == len(whole.rows) + len(whole.rows_test)
    assert given.rows.tolist() == list(range(50))


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


X, Y = np.random.default_rng(0).normal(size=(60, 3)), np.arange(60) % 3


def test_npz(tmp_path: Path) -> None:
    data = load(str(save(tmp_path / "a.npz", x=X, y=Y + 5)))
    assert (data.input_shape, data.classes) == ((3,), 3)
    assert len(data.x) + len(data.x_validation) + len(data.x_test) == 60
    images = load(str(save(tmp_path / "b.npz", x=(X[:, :, None] * np.ones(4)).astype(np.uint8), y=Y)))
    assert images.input_shape == (1, 3, 4)
    given = load(str(save(tmp_path / "c.npz", x=X, y=Y, x_test=X[:7], y_test=Y[:7])))
    assert len(given.x_test) == 7


def test_units_do_not_matter(tmp_path: Path) -> None:
    """Features in a large unit are normalised like others; what varies by rounding alone stays as it is."""
    metres = load(str(save(tmp_path / "a.npz", x=X, y=Y)))
    terametres = load(str(save(tmp_path / "b.npz", x=X * 1e-12, y=Y)))
    assert torch.allclose(terametres.x_test, metres.x_test, atol=1e-5)
    rounded = np.array([0.1, 0.1 + 1e-8])[Y % 2]
    constant = load(str(save(tmp_path / "c.npz", x=np.c_[X, rounded, np.full(60, 1.1e15)].astype(np.float32), y=Y)))
    assert constant.normalization["std"][3:] == [1, 1]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no y": ({"x": X}, "has no array 'y'"),
    "objects": ({"x": X, "y": np.array([{}] * 60)}, "Python objects"),
    "strings": ({"x": np.array([["a"]] * 60), "y": Y}, "x has dtype"),
    "complex": ({"x": X + 1j, "y": Y}, "x has dtype complex128"),
    "one dimension": ({"x": X[:, 0], "y": Y}, r"x has shape \(60,\)"),
    "empty": ({"x": X[:0], "y": Y[:0]}, r"x has shape \(0, 3\)"),
    "lengths": ({"x": X, "y": Y[:-1]}, r"y is int64 of shape \(59,\)"),
    "halves as classes": ({"x": X, "y": Y + 0.5}, "0.5 at position 0; accepted are integer classes"),
    "nan": (
        {"x": np.where(np.arange(180).reshape(60, 3) > 177, np.nan, X), "y": Y},
        r"2 of them, the first nan at \[59",
    ),
    "seconds since 1970": ({"x": np.c_[X, 1.7e9 + X[:, 0]], "y": Y}, "feature 4 goes from 1.* subtract 1699999997"),
    "large whole numbers": ({"x": np.arange(180).reshape(60, 3) + 2**40, "y": Y}, "feature 1 goes from 1099511627776"),
    "a class of one": ({"x": X, "y": np.where(np.arange(60) == 7, 9, Y)}, r"1 of 4 classes have one sample \(\[9\]\)"),
    "too large for float32": ({"x": X * 1e300, "y": Y}, "not finite in float32"),
    "one class": ({"x": X, "y": Y * 0}, "1 class"),
    "too few": ({"x": X[:2], "y": Y[:2]}, "too few samples"),
    "test shape": ({"x": X, "y": Y, "x_test": X[:, :2], "y_test": Y}, "x_test has entries"),
    "test classes": ({"x": X, "y": Y, "x_test": X, "y_test": Y + 1}, r"classes \[.*3.*\] that y does not have"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_npz(name: str, tmp_path: Path) -> None:
    arrays, message = BAD[name]
    path = save(tmp_path / "bad.npz", **arrays)
    with pytest.raises(rd.ArtifactError, match=message) as caught:
        load(str(path))
    assert "bad.npz" in str(caught.value)


def test_damaged_npz(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.npz", x=X, y=Y).read_bytes()
    path = tmp_path / "damaged.npz"
    draw = np.random.default_rng(1)
    outcomes = set()
    for i in range(150):
        data = bytearray(whole)
        if i % 3 == 0:
            data = data[: draw.integers(0, len(data))]
        else:
            for _ in range(i % 3 * 3):
                data[draw.integers(0, len(data))] ^= 1 << draw.integers(0, 8)
        path.write_bytes(data)
        try:
            load(str(path))
            outcomes.add("fine")
        except rd.ArtifactError as error:
            outcomes.add("refused" if "damaged.npz" in str(error) else "refused without a name")
    assert outcomes in ({"refused"}, {"fine", "refused"})
    with pytest.raises(rd.ArtifactError, match="no such file"):
        load(str(tmp_path / "none.npz"))


def test_a_declared_size_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "huge.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**40, 3)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
        archive.writestr("y.npy", header.getvalue())
    with pytest.raises(rd.ArtifactError, match="declares 26388279066624 bytes"):
        load(str(path))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown dataset 'digitz'; accepted are digits, moons"):
        load("digitz")
