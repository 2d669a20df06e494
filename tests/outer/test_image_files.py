"""Standard files, whole and damaged, made here; and the real ones where REVDISTILL_DATA_DIR says that they are."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import revdistill as rd
from revdistill.outer.data import load
from revdistill.outer.image_files import read_cifar10, read_idx

RNG = np.random.default_rng(0)
COUNTS = {"train": 200, "t10k": 40}
IMAGES = {part: RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, n in COUNTS.items()}
LABELS = {part: (np.arange(n) % 10).astype(np.uint8) for part, n in COUNTS.items()}


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_mnist(folder: Path, *, packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in COUNTS:
        for name, values in ((f"{part}-images-idx3-ubyte", IMAGES[part]), (f"{part}-labels-idx1-ubyte", LABELS[part])):
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
            else:
                (folder / name).write_bytes(idx(values))
    return folder


def cifar_rows(count: int, seed: int) -> bytes:
    rows = np.random.default_rng(seed).integers(0, 256, (count, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(count) % 10
    return rows.tobytes()


def write_cifar10(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(cifar_rows(40, i))
    (folder / "test_batch.bin").write_bytes(cifar_rows(30, 6))
    return folder


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("name", "below"),
    [("mnist", "."), ("mnist", "mnist"), ("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")],
)
def test_idx_files(tmp_path: Path, name: str, below: str, packed: bool) -> None:
    write_mnist(tmp_path / below, packed=packed)
    data = load(name, tmp_path)
    assert data.name == name  # no path: the artifact goes to other machines
    assert (data.input_shape, data.classes) == ((1, 28, 28), 10)
    assert len(data.x) + len(data.x_validation) == COUNTS["train"]
    assert data.y_test.tolist() == LABELS["t10k"].tolist()
    pixels = (data.x_test * data.normalization["std"][0] + data.normalization["mean"][0]) * 255
    assert float((pixels[:, 0] - torch.from_numpy(IMAGES["t10k"])).abs().max()) < 1e-3
    assert abs(float(data.x.mean())) < 1e-4
    assert abs(float(data.x.std()) - 1) < 1e-3


@pytest.mark.parametrize("below", [".", "cifar10", "cifar-10-batches-bin"])
def test_cifar10_files(tmp_path: Path, below: str) -> None:
    write_cifar10(tmp_path / below)
    data = load("cifar10", tmp_path)
    assert (data.name, data.input_shape, data.classes) == ("cifar10", (3, 32, 32), 10)
    assert len(data.x) + len(data.x_validation) == 200
    rows = np.frombuffer(cifar_rows(30, 6), np.uint8).reshape(-1, 3073)
    assert data.y_test.tolist() == rows[:, 0].tolist()
    mean, std = (np.array(data.normalization[key])[:, None, None] for key in ("mean", "std"))
    pixels = (data.x_test.numpy() * std + mean) * 255
    assert np.abs(pixels - rows[:, 1:].reshape(-1, 3, 32, 32)).max() < 1e-3
    assert float(data.x.mean((0, 2, 3)).abs().max()) < 1e-4  # per channel


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _replace(values: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(gzip.compress(values)) and None


LARGE = b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 2**31, 2**31)
DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "cut short": ("train-images-idx3-ubyte", _truncate, "cannot be read|ends after"),
    "not gzip": ("train-images-idx3-ubyte", lambda p: p.write_bytes(b"no") and None, "cannot be read"),
    "damaged inside": (
        "t10k-images-idx3-ubyte",
        lambda p: p.write_bytes(p.read_bytes()[:900] + b"\xff" * 900) and None,
        "cannot be read",
    ),
    "empty": ("train-labels-idx1-ubyte", _replace(b""), "ends after 0 of the 8 bytes of its header"),
    "labels for images": (
        "train-images-idx3-ubyte",
        _replace(idx(LABELS["train"]) + b"\0" * 99),
        "magic number is 2049.* has 2051",
    ),
    "another type": (
        "train-labels-idx1-ubyte",
        _replace(b"\0\0\x0d\x01" + b"\0" * 99),
        "magic number is 3329.* has 2049",
    ),
    "values missing": (
        "train-images-idx3-ubyte",
        _replace(idx(IMAGES["train"])[:-1]),
        "ends after 156799 of the 156800 bytes",
    ),
    "values to spare": ("train-images-idx3-ubyte", _replace(idx(IMAGES["train"]) + b"!"), "goes on after its array"),
    "a huge shape": ("train-images-idx3-ubyte", _replace(LARGE), "accepted are 1 to"),
    "no images": ("train-images-idx3-ubyte", _replace(idx(IMAGES["train"][:0])), "accepted are 1 to"),
    "another size": ("t10k-images-idx3-ubyte", _replace(idx(IMAGES["t10k"][:, 1:])), "27 x 28; accepted is 28 x 28"),
    "a label too high": (
        "t10k-labels-idx1-ubyte",
        _replace(idx(LABELS["t10k"] + 3)),
        "the label 12 at position 9; accepted are 0 to 9",
    ),
    "too few labels": ("t10k-labels-idx1-ubyte", _replace(idx(LABELS["t10k"][1:])), "39 labels for the 40 images"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_idx_file_is_named(tmp_path: Path, damage: str) -> None:
    name, break_it, message = DAMAGES[damage]
    path = write_mnist(tmp_path) / f"{name}.gz"
    break_it(path)
    with pytest.raises(rd.ArtifactError, match=f"{name}.*({message})") as caught:
        load("mnist", tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named_with_where_they_were_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        rd.ArtifactError, match=r"no train-images-idx3-ubyte\.gz or .* in .*/mnist, .*/MNIST/raw.*--data-dir"
    ):
        load("mnist", tmp_path)
    (write_mnist(tmp_path / "mnist") / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(rd.ArtifactError, match=r"mnist: has 3 of the 4 files of mnist, but no t10k-labels-idx1-ubyte"):
        load("mnist", tmp_path)
    with pytest.raises(rd.ArtifactError, match=r"cifar10: no data_batch_1\.bin in .*cifar-10-batches-bin"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (b"", "has 0 bytes"),
        (b"\0" * 3072, "3072 bytes; .* 3073 for each"),
        (b"\x0b" + b"\0" * 3072, "label 11 at position 0"),
    ],
)
def test_a_damaged_cifar_file_is_named(tmp_path: Path, values: bytes, message: str) -> None:
    path = write_cifar10(tmp_path) / "data_batch_3.bin"
    path.write_bytes(values)
    with pytest.raises(rd.ArtifactError, match=f"data_batch_3.bin.*{message}"):
        load("cifar10", tmp_path)
    with pytest.raises(rd.ArtifactError, match=message):
        read_cifar10(path)


def test_an_unreadable_file_is_an_error_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(rd.ArtifactError, match="cannot be read"):
        read_idx(tmp_path / "absent", 1)


@pytest.mark.skipif(
    "REVDISTILL_DATA_DIR" not in os.environ, reason="REVDISTILL_DATA_DIR does not say where MNIST's files are"
)
def test_the_real_mnist() -> None:
    data = load("mnist", os.environ["REVDISTILL_DATA_DIR"])
    assert len(data.x) + len(data.x_validation) == 60_000
    assert data.y_test.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.normalization["mean"] == pytest.approx([0.1307], abs=1e-3)
