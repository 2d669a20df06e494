"""A .npz file in the forms that people publish: names of arrays, layouts of images, labels."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import revdistill as rd
from revdistill.outer.data import Dataset, load

DRAW = np.random.default_rng(0)
N = 60
X, Y = DRAW.normal(size=(N, 3)), np.arange(N) % 3
X_TEST, Y_TEST = DRAW.normal(size=(9, 3)), np.arange(9) % 3
X_VAL, Y_VAL = DRAW.normal(size=(7, 3)), np.arange(7) % 3


def read(folder: Path, **arrays: Any) -> Dataset:
    np.savez(folder / "a.npz", **arrays)
    return load(str(folder / "a.npz"))


def pixels(data: Dataset, part: str = "x_test") -> np.ndarray:
    """A part of the inputs as it was before normalization."""
    values = getattr(data, part).double().numpy()
    shape = (-1, 1, 1) if values.ndim == 4 else (-1,)
    mean, std = (np.array(data.normalization[key]).reshape(shape) for key in ("mean", "std"))
    found: np.ndarray = values * std + mean
    return found


# names

NAMES = {
    "this project's": ("x", "y", None, None, "x_test", "y_test"),
    "keras'": ("x_train", "y_train", None, None, "x_test", "y_test"),
    "MedMNIST's": ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels"),
    "capitals": ("X", "Y", "X_val", "Y_val", "X_test", "Y_test"),
    "scikit-learn's": ("X_train", "y_train", None, None, "X_test", "y_test"),
    "reversed": ("train_x", "train_y", "valid_x", "valid_y", "test_x", "test_y"),
    "other words": ("data", "labels", "validation-features", "validation-targets", "testImages", "testTargets"),
    "one word": ("xtrain", "Ytrain", "XVal", "yval", "Xtest", "testy"),
}


@pytest.mark.parametrize("style", NAMES)
def test_names_say_what_arrays_are(tmp_path: Path, style: str) -> None:
    arrays = dict(zip(NAMES[style], (X, Y, X_VAL, Y_VAL, X_TEST, Y_TEST), strict=True))
    data = read(tmp_path, **{name: values for name, values in arrays.items() if name})
    assert np.allclose(pixels(data), X_TEST, atol=1e-6)
    assert data.y_test.tolist() == Y_TEST.tolist()
    if None in arrays:
        assert len(data.x) + len(data.x_validation) == N
    else:  # given, and so not held out
        assert np.allclose(pixels(data, "x"), X, atol=1e-6)
        assert np.allclose(pixels(data, "x_validation"), X_VAL, atol=1e-6)
        assert data.y_validation.tolist() == Y_VAL.tolist()
        assert not data.origin.splits
    assert data.origin.unread == ()


def test_validation_data_without_test_data(tmp_path: Path) -> None:
    data = read(tmp_path, x=X, y=Y, x_val=X_VAL, y_val=Y_VAL)
    assert (len(data.x), len(data.x_validation), len(data.x_test)) == (45, 7, 15)
    assert data.origin.splits == ("test data: 25% of the training data, drawn by a fixed seed",)


def test_what_is_left_unread_is_named(tmp_path: Path) -> None:
    """Objects too: they are never unpickled. Of two arrays for one role, one that cannot be read gives way."""
    objects = np.array([{"a": 1}, None], dtype=object)
    data = read(tmp_path, x=X, y=Y, x_mean=X[0], ids=np.arange(N), about=objects, labels=objects)
    assert data.origin.unread == ("x_mean", "ids", "about", "labels")
    assert [r.name for r in data.origin.read] == ["x", "y"]
    assert (data.origin.read[0].role, data.origin.read[0].shape, data.origin.read[0].dtype) == (
        "training inputs",
        (N, 3),
        "float64",
    )


BAD_NAMES: dict[str, tuple[dict[str, Any], str]] = {
    "a lone test set": ({"x": X, "y": Y, "x_test": X}, "no array 'y_test', the labels of 'x_test'"),
    "lone test labels": ({"x": X, "y": Y, "test_labels": Y}, "no array 'x_test', the inputs of 'test_labels'"),
    "a misnamed half": ({"x": X, "y": Y, "X_val": X, "y_vla": Y}, r"no array 'y_val', .* it holds \['X_val', .*y_vla"),
    "two inputs": ({"x": X, "X_train": X, "y": Y}, "arrays 'x' and 'X_train' are both training inputs"),
    "two test labels": (
        {"x": X, "y": Y, "x_test": X, "y_test": Y, "test_labels": Y},
        "'y_test' and 'test_labels' are both test labels",
    ),
    "positions": ({"arr_0": X, "arr_1": Y}, "no array 'x' and no array 'y'; it holds .*accepted are x and y"),
    "only test data": ({"x_test": X, "y_test": Y}, "no array 'x' and no array 'y'"),
    "labels of objects": ({"x": X, "y": Y.astype(object)}, "array 'y' holds Python objects; .*astype"),
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_leave_a_doubt(tmp_path: Path, name: str) -> None:
    arrays, message = BAD_NAMES[name]
    with pytest.raises(rd.ArtifactError, match=rf"a\.npz: .*{message}"):
        read(tmp_path, **arrays)


def test_what_is_no_array_is_left_unread(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as file:
        file.writestr("README.txt", "about")
        file.writestr("folder/", "")
    assert load(str(tmp_path / "a.npz")).origin.unread == ("README.txt", "folder/")
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as file:
        file.writestr("y_test", "about")
    with pytest.raises(rd.ArtifactError, match=r"no array 'x_test'"):
        load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("scaled", ["x", "x_test", "x_val"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_parts_on_different_scales(tmp_path: Path, scaled: str, dtype: type) -> None:
    """One of them was divided by 255, and the other forgotten."""
    arrays: dict[str, np.ndarray] = {name: images(4, 4).astype(dtype) for name in ("x", "x_test", "x_val")}
    labels = {"y": Y, "y_test": Y, "y_val": Y}
    assert read(tmp_path, **arrays, **labels).value_range[1] > 200
    arrays[scaled] = arrays[scaled] / 255
    with pytest.raises(rd.ArtifactError, match=r"x goes from 0 to (1|255), but x_\w+ from 0 to (1|255); bring both"):
        read(tmp_path, **arrays, **labels)


def test_two_arrays_of_one_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("y.npy", file.read("x.npy"))
    with pytest.raises(rd.ArtifactError, match="two arrays of the name 'y'"):
        load(str(tmp_path / "a.npz"))


# images


def images(*shape: int) -> np.ndarray:
    return DRAW.integers(0, 256, (N, *shape)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(6, 5, 3), (8, 8, 4), (8, 6, 1)])
def test_channels_that_come_last_are_moved(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x, x_test = images(*shape), images(*shape)[:9]
    data = read(tmp_path, x=x, y=Y, x_test=x_test, y_test=Y_TEST, x_val=x_test, y_val=Y_TEST)
    height, width, channels = shape
    assert data.input_shape == (channels, height, width)
    for part, values in (("x", x), ("x_test", x_test), ("x_validation", x_test)):
        assert np.allclose(pixels(data, part), values.transpose(0, 3, 1, 2), atol=1e-3)
    assert data.normalization["mean"] == pytest.approx(x.mean((0, 1, 2)).tolist(), rel=1e-5)  # of each channel
    assert f"images [60, {height}, {width}, {channels}] have their channels last" in data.origin.notes[0]
    assert data.value_range == (x.min(), x.max())


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 4), (3, 4, 4), (1, 1, 3), (16, 4, 5), (2, 8, 4)])
def test_channels_that_come_first_stay(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = images(*shape)
    data = read(tmp_path, x=x, y=Y, x_test=x[:9], y_test=Y_TEST)
    assert data.input_shape == shape
    assert np.allclose(pixels(data), x[:9], atol=1e-3)
    assert bool(data.origin.notes) == (shape[0] not in (1, 3, 4))  # said where it is unusual


@pytest.mark.parametrize("shape", [(3, 3, 3), (4, 4, 4), (4, 4, 3), (3, 8, 1), (8, 8, 13), (8, 8, 2)])
def test_a_layout_that_leaves_a_doubt_is_refused_and_can_be_said(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x, (one, two, last) = images(*shape), shape
    message = (
        rf"a\.npz: x has shape .*{one} channels of {two} x {last} or {last} channels of {one} x {two}; add an array"
    )
    with pytest.raises(rd.ArtifactError, match=message):
        read(tmp_path, x=x, y=Y)
    for layout, expected in (("NCHW", (one, two, last)), ("NHWC", (last, one, two))):
        data = read(tmp_path, x=x, y=Y, layout=layout)
        assert data.input_shape == expected
        assert data.origin.unread == ()


def test_a_wrong_layout(tmp_path: Path) -> None:
    with pytest.raises(rd.ArtifactError, match=r"layout is .*'HWCN'; accepted are 'NCHW' and 'NHWC'"):
        read(tmp_path, x=images(8, 8, 3), y=Y, layout="HWCN")
    assert read(tmp_path, x=X, y=Y, layout="HWCN").origin.unread == ("layout",)  # nothing to lay out


# labels

WORDS = np.array(["bee", "ant", "cow"])
LABELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "others than 0, 1, 2": (Y * 4 + 3, (3, 7, 11)),
    "a column": (Y[:, None].astype(np.uint8), (0, 1, 2)),
    "one-hot": (np.eye(3)[Y], (0, 1, 2)),
    "one-hot, whole": (np.eye(3, dtype=np.uint8)[Y], (0, 1, 2)),
    "floats": (Y.astype(np.float32) + 1, (1, 2, 3)),
    "booleans": (Y == 1, (0, 1)),
    "strings": (WORDS[Y], ("ant", "bee", "cow")),
    "bytes": (np.char.encode(WORDS[Y][:, None]), ("ant", "bee", "cow")),
    "numbers as strings": (np.array(["10", "9", "-1"])[Y], (-1, 9, 10)),
    "numbers with zeros before them": (np.array(["10", "09", "9"])[Y], ("09", "10", "9")),
    "large": (Y.astype(np.uint64) + 2**63, (2**63, 2**63 + 1, 2**63 + 2)),
}


@pytest.mark.parametrize("form", LABELS)
def test_forms_of_labels(tmp_path: Path, form: str) -> None:
    labels, names = LABELS[form]
    data = read(tmp_path, x=X, y=labels, x_test=X[:9], y_test=labels[:9])
    assert data.class_names == names
    assert data.classes == len(names)
    meant = np.asarray(labels).argmax(1) if "one-hot" in form else np.asarray(labels).reshape(N)
    meant = np.char.decode(meant) if meant.dtype.kind == "S" else meant
    assert [str(names[i]) for i in data.y_test.tolist()] == [str(type(names[0])(v)) for v in meant[:9].tolist()]


def test_a_test_part_is_mapped_by_names(tmp_path: Path) -> None:
    data = read(tmp_path, x=X, y=WORDS[Y], x_test=X[:4], y_test=np.array(["cow", "bee", "cow", "cow"]))
    assert data.y_test.tolist() == [2, 1, 2, 2]


BAD_LABELS: dict[str, tuple[Any, str]] = {
    "two ones": (np.eye(3)[Y] + np.eye(3)[(Y + 1) % 3] * (np.arange(N) == 7)[:, None], "row 7 is not one-hot"),
    "soft labels": (np.full((N, 3), 1 / 3), "row 0 is not one-hot"),
    "nan": (np.where(np.arange(N) == 5, np.nan, Y), "nan at position 5; accepted are integer classes"),
    "fractions": (np.where(np.arange(N) == 5, 0.25, Y), "0.25 at position 5"),
    "beyond whole numbers": (Y * 1e17, "1e\\+17 at position 1"),
    "complex": (Y + 0j, "complex128"),
    "three dimensions": (Y[:, None, None], r"shape \(60, 1, 1\)"),
    "not UTF-8": (np.array([b"\xff", b"a"])[Y % 2], "not UTF-8"),
    "no text": (np.array(["", "a"])[Y % 2], "'' at position 0, which is no class but a missing one"),
    "pandas' nan": (np.array(["a", "nan"])[Y % 2], "'nan' at position 1, which is no class but a missing one"),
    "one name": (np.array(["a"] * N), "has 1 class"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_bad_labels(tmp_path: Path, name: str) -> None:
    labels, message = BAD_LABELS[name]
    with pytest.raises(rd.ArtifactError, match=rf"a\.npz: y .*{message}"):
        read(tmp_path, x=X, y=labels)


def test_unknown_names_of_classes_are_listed(tmp_path: Path) -> None:
    with pytest.raises(rd.ArtifactError, match=r"y_test has classes \['dog'\] that y does not have; it has \['ant'"):
        read(tmp_path, x=X, y=WORDS[Y], x_test=X[:2], y_test=np.array(["dog", "bee"]))
    with pytest.raises(rd.ArtifactError, match=r"y_test has classes \[0, 1, 2\] that y does not have"):
        read(tmp_path, x=X, y=WORDS[Y], x_test=X[:9], y_test=Y_TEST)
