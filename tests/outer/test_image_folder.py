"""Folders of images: ImageFolder's layouts, modes, and what is refused."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import revdistill as rd
from revdistill.outer import image_folder
from revdistill.outer.data import Dataset, load

DRAW = np.random.default_rng(0)
EACH = 12


def pixels(*shape: int) -> np.ndarray:
    return DRAW.integers(0, 256, shape).astype(np.uint8)


def write(folder: Path, values: list[np.ndarray], **options: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(values):
        Image.fromarray(image).save(folder / f"{i:02}.png", **options)


def raw(data: Dataset, part: str) -> np.ndarray:
    mean, std = (np.array(data.normalization[key])[:, None, None] for key in ("mean", "std"))
    return np.round((getattr(data, part).numpy() * std + mean) * 255).astype(np.uint8)


@pytest.fixture
def split(tmp_path: Path) -> dict[str, np.ndarray]:
    """tmp_path/train, val and test, with two classes each; the pixels of each part, in order."""
    found = {}
    for part, count in (("train", EACH), ("val", 3), ("test", 2)):
        found[part] = pixels(2, count, 5, 4, 3)
        for name, values in zip(("cat", "dog"), found[part], strict=True):
            write(tmp_path / part / name, list(values))
    return found


def test_train_val_and_test(tmp_path: Path, split: dict[str, np.ndarray]) -> None:
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "extra/cat").mkdir(parents=True)
    (tmp_path / "test/dog/notes.txt").write_text("about")
    (tmp_path / "test/.DS_Store").write_text("")
    data = load(str(tmp_path))
    assert (data.name, data.input_shape, data.class_names) == (str(tmp_path), (3, 5, 4), ("cat", "dog"))
    for part, name in (("train", "x"), ("val", "x_validation"), ("test", "x_test")):
        expected = split[part].reshape(-1, 5, 4, 3).transpose(0, 3, 1, 2)
        assert np.array_equal(raw(data, name), expected)  # sorted: cat's, then dog's
    assert data.y_test.tolist() == [0, 0, 1, 1]
    assert data.origin.unread == ("extra", "README.md", "test/dog/notes.txt")
    assert data.origin.notes == data.origin.splits == ()
    assert torch.equal(load(str(tmp_path)).x, data.x)
    assert data.value_range == pytest.approx((split["train"].min() / 255, split["train"].max() / 255))


def test_classes_without_parts_are_split_here(tmp_path: Path) -> None:
    for name in ("10", "9", "test"):  # a class may be called test
        write(tmp_path / name, list(pixels(EACH, 6, 6)))
    data = load(str(tmp_path))
    assert data.input_shape == (1, 6, 6)
    assert len(data.x) + len(data.x_validation) + len(data.x_test) == 3 * EACH
    assert data.class_names == ("10", "9", "test")
    (tmp_path / "test").rename(tmp_path / "8")
    assert load(str(tmp_path)).class_names == (8, 9, 10)


def test_modes(tmp_path: Path) -> None:
    """One image with colours makes all RGB; what is converted is said."""
    grey, coloured = pixels(EACH, 4, 4), pixels(EACH, 4, 4, 3)
    write(tmp_path / "train/a", list(grey))
    write(tmp_path / "train/b", list(grey))
    write(tmp_path / "test/a", list(grey[:2]))
    Image.fromarray(grey[0] > 99).save(tmp_path / "test/a/bits.png")
    data = load(str(tmp_path))
    assert data.input_shape == (1, 4, 4)
    assert np.array_equal(raw(data, "x_test")[:, 0], [*grey[:2], np.where(grey[0] > 99, 255, 0)])
    assert data.origin.notes == ("images (1 black and white, 26 grey) are read as grey",)

    palette = Image.fromarray(coloured[1]).quantize(4)
    palette.save(tmp_path / "test/a/palette.png", transparency=bytes([0, 128, 255, 255]))
    Image.fromarray(np.dstack([coloured[2], grey[2]])).save(tmp_path / "test/a/rgba.png")
    data = load(str(tmp_path))
    assert data.input_shape == (3, 4, 4)
    found = raw(data, "x_test")
    assert np.array_equal(found[0], np.stack([grey[0]] * 3))
    assert np.array_equal(found[3], np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    assert np.array_equal(found[4], coloured[2].transpose(2, 0, 1))
    (note,) = data.origin.notes
    assert note == (
        "images (1 black and white, 26 grey, 1 palette, 1 RGB with transparency) are read as RGB; "
        "transparency is dropped"
    )


def test_a_camera_held_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    values = pixels(EACH, 4, 6)
    for name in ("a", "b"):
        write(tmp_path / "train" / name, list(values), exif=exif)
        write(tmp_path / "test" / name, [np.rot90(values[0], -1)])
    data = load(str(tmp_path))
    assert data.input_shape == (1, 6, 4)
    assert np.array_equal(raw(data, "x")[:2, 0].shape, (2, 6, 4))
    assert any(np.array_equal(image[0], np.rot90(values[0], -1)) for image in raw(data, "x"))


def test_images_of_several_sizes(tmp_path: Path) -> None:
    write(tmp_path / "a", list(pixels(EACH, 8, 8)))
    write(tmp_path / "b", [*pixels(EACH - 1, 8, 8), *pixels(1, 8, 12)])
    with pytest.raises(
        rd.ArtifactError, match=rf"b/11\.png: is 8 x 12, but .*a/00\.png is 8 x 8; .*--dataset {tmp_path}:32"
    ):
        load(str(tmp_path))
    data = load(f"{tmp_path}:4")
    assert data.name == f"{tmp_path}:4"
    assert data.input_shape == (1, 4, 4)
    assert data.origin.notes == ("images are cut to a square in the middle and scaled to 4 x 4",)
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 200  # its middle
    write(tmp_path / "a", [wide] * EACH)
    write(tmp_path / "b", list(pixels(EACH, 8, 8)))
    found = load(f"{tmp_path}:4")
    of_a = raw(found, "x")[(found.y == 0).numpy()]
    assert of_a.min() > 150
    for size in ("0", "big", "", "99999"):
        with pytest.raises(ValueError, match=f"asks for images of size '{size}'; accepted are 1 to 4096"):
            load(f"{tmp_path}:{size}")


def damaged(folder: Path) -> None:
    path = folder / "train/dog/05.png"
    path.write_bytes(path.read_bytes()[:-30])


def no_image(folder: Path) -> None:
    (folder / "train/dog/05.png").write_text("no image")


def another_decoder(folder: Path) -> None:
    """Few decoders see a file: Pillow's for PostScript, say, would run another program on it."""
    Image.new("RGB", (4, 5)).save(folder / "train/dog/05.png", "PCX")


def sixteen_bits(folder: Path) -> None:
    Image.fromarray(np.zeros((5, 4), np.uint16)).save(folder / "train/dog/05.png")


def moving(folder: Path) -> None:
    frames = [Image.fromarray(pixels(5, 4)) for _ in range(3)]
    frames[0].save(folder / "train/dog/05.gif", save_all=True, append_images=frames[1:])


def an_empty_class(folder: Path) -> None:
    (folder / "train/cow").mkdir()


def another_class(folder: Path) -> None:
    write(folder / "test/cow", [pixels(5, 4, 3)])


def another_shape(folder: Path) -> None:
    write(folder / "test/cat", list(pixels(2, 6, 6, 3)))
    write(folder / "test/dog", list(pixels(2, 6, 6, 3)))


def no_train(folder: Path) -> None:
    (folder / "train").rename(folder / "trian")


def train_twice(folder: Path) -> None:
    (folder / "val").rename(folder / "training")


BAD: dict[str, tuple[Any, str]] = {
    "cut short": (damaged, r"train/dog/05\.png: cannot be read as an image"),
    "no image": (no_image, r"train/dog/05\.png: cannot be read as an image"),
    "another decoder": (another_decoder, r"train/dog/05\.png: cannot be read as an image"),
    "16 bits": (sixteen_bits, r"train/dog/05\.png: has pixels of mode I;16; accepted are 8 bits"),
    "moving": (moving, r"train/dog/05\.gif: has 3 frames"),
    "an empty class": (an_empty_class, r"train/cow: has no image; accepted are \.png"),
    "another class": (another_class, r"test has classes \['cow'\] that train does not have"),
    "another shape": (another_shape, r"test has entries of shape \(3, 6, 6\), but train of \(3, 5, 4\)"),
    "no train": (no_train, r"has test, val with folders in it, but no train; it holds test, trian, val"),
    "train twice": (train_twice, "several folders for one part: test, train, training"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("split")
def test_what_is_refused_is_named(tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    change(tmp_path)
    with pytest.raises(rd.ArtifactError, match=message) as caught:
        load(str(tmp_path))
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.usefixtures("split")
def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "MAX_BYTES", 100)
    with pytest.raises(rd.ArtifactError, match=r"24 images of 5 x 4, 1440 bytes of pixels; at most 100 are read"):
        load(str(tmp_path))
    monkeypatch.undo()
    for limit in (19, 9):  # Pillow warns beyond its limit, and refuses beyond twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(rd.ArtifactError, match=r"00\.png: is refused: Image size \(20 pixels\) exceeds limit"):
                load(str(tmp_path))


@pytest.mark.parametrize(
    "names", [("train", "test"), ("seg_train/a", "seg_test/a"), ("Training_set", "valSet"), ("trainset", "testset")]
)
def test_parts_are_no_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    """Kaggle's archives: parts without classes, or parts of other names."""
    for name in names:
        write(tmp_path / name, list(pixels(EACH, 4, 4)))
    with pytest.raises(rd.ArtifactError, match=r"by their names are no classes but parts; accepted are .*/train/CLASS"):
        load(str(tmp_path))


def test_what_programs_leave_in_a_folder_is_no_sample(tmp_path: Path) -> None:
    for name in ("a", "b", "a/.ipynb_checkpoints", "b/@eaDir/1.png", "b/__MACOSX"):
        write(tmp_path / name, list(pixels(EACH, 4, 4)))
    data = load(str(tmp_path))
    assert len(data.x) + len(data.x_validation) + len(data.x_test) == 2 * EACH


def test_links(tmp_path: Path) -> None:
    """Links are followed, as torchvision does; one that leads nowhere, or round in a circle, is named."""
    write(tmp_path / "elsewhere", list(pixels(EACH, 4, 4)))
    write(tmp_path / "data/a", list(pixels(EACH, 4, 4)))
    (tmp_path / "data/a/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    data = load(str(tmp_path / "data"))
    assert len(data.x) + len(data.x_validation) + len(data.x_test) == 3 * EACH
    (tmp_path / "data/a/gone.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(rd.ArtifactError, match=r"data/a/gone\.png: is a link to .*/gone\.png, which is not there"):
        load(str(tmp_path / "data"))
    (tmp_path / "data/a/gone.png").unlink()
    (tmp_path / "data/a/more").unlink()
    (tmp_path / "data/a/round").symlink_to(tmp_path / "data/a")
    with pytest.raises(rd.ArtifactError, match=r"data/a/round: is a link to a folder that it is in"):
        load(str(tmp_path / "data"))


@pytest.mark.skipif(os.geteuid() != 0, reason="plays a user without permission, which only root can")
@pytest.mark.usefixtures("split")
def test_a_folder_that_may_not_be_read_is_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "train/dog/more").mkdir(mode=0)
    tmp_path.chmod(0o755)
    for folder in tmp_path.resolve().parents:  # of several processes' tests there is one more
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    os.seteuid(65534)
    try:
        with pytest.raises(rd.ArtifactError, match=r"train/dog/more: cannot be read \(Permission denied\)"):
            load(str(tmp_path))
    finally:
        os.seteuid(0)


def test_a_class_whose_name_is_no_text(tmp_path: Path) -> None:
    write(tmp_path / "a", list(pixels(EACH, 4, 4)))
    write(tmp_path / os.fsdecode(b"caf\xe9"), list(pixels(EACH, 4, 4)))
    with pytest.raises(rd.ArtifactError, match=r"caf\\udce9': the name is not UTF-8"):
        load(str(tmp_path))


def test_a_folder_without_classes(tmp_path: Path) -> None:
    with pytest.raises(rd.ArtifactError, match="has no folder of images for each class"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match=r"unknown dataset .*; accepted are digits, .*or a folder of images per class"):
        load(str(tmp_path / "none"))
