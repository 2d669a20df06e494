"""A folder of images: a folder for each class, below DIR/train, DIR/val and DIR/test or below DIR itself.

torchvision calls it ImageFolder. Each image becomes grey or RGB: RGB where any of them has colours.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from revdistill.engine import ArtifactError
from revdistill.outer.roles import PARTS, TEST, TRAIN, VALIDATION, words
from revdistill.outer.source import Origin, Part, Read, Source, joined

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # no other decoder sees a file from elsewhere
MAX_BYTES = 2**31  # of the pixels of one part
_GREY = {"1": "black and white", "L": "grey", "LA": "grey with transparency"}
_COLOUR = {
    "P": "palette",
    "PA": "palette with transparency",
    "RGB": "RGB",
    "RGBA": "RGB with transparency",
    "CMYK": "CMYK",
    "YCbCr": "YCbCr",
}
_TRANSPARENT = ("LA", "PA", "RGBA")


def load_image_folder(folder: Path, size: int | None = None) -> Source:
    """The images of a folder, by the names of the folders of their classes, in the order of their names.

    Args:
        folder: DIR of DIR/train/CLASS/*.png, DIR/val/CLASS, DIR/test/CLASS; or of DIR/CLASS/*.png.
        size: scale each to size x size, cut to a square in the middle; None for images that have one size.

    Returns:
        Values from 0 to 1, one channel or three.

    Raises:
        ArtifactError: names the file or folder and what is wrong with it.
    """
    below = _folders(folder)
    split = {name: part for name, part in ((f.name, PARTS.get(f.name.lower())) for f in below) if part}
    split = {name: part for name, part in split.items() if _folders(folder / name)}  # else a class of this name
    if split and TRAIN not in split.values():
        held = ", ".join(f.name for f in below)
        raise ArtifactError(f"{folder}: has {', '.join(split)} with folders in it, but no train; it holds {held}")
    if not split:
        _check_no_parts(folder, below)
    parts = {part: folder / name for name, part in split.items()} or {TRAIN: folder}
    if len(parts) < len(split):
        raise ArtifactError(f"{folder}: has several folders for one part: {', '.join(split)}")
    unread = [f.name for f in below if f.name not in split] if split else []
    unread += [f.name for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")]
    found: dict[str, _Images] = {
        part: _Images(parts[part], size, folder) for part in (TRAIN, VALIDATION, TEST) if part in parts
    }
    modes = [mode for images in found.values() for mode in images.modes]
    channels = "RGB" if any(mode in _COLOUR for mode in modes) else "L"
    read, joining = [], {}
    for part, images in found.items():
        x = images.pixels(channels)
        name = images.folder.name if split else folder.name
        shape = (len(x), *x.shape[2:], x.shape[1])
        read.append(Read(name, f"{part} images", shape, "uint8"))
        unread += images.unread
        values = x.astype(np.float32) / np.float32(255)
        joining[part] = Part(values, np.array(images.labels), name, name)
    return joined(folder, joining, Origin(tuple(read), _shortened(unread), tuple(_notes(modes, channels, size))))


class _Images:
    """The files of one part, looked at but not yet decoded.

    Args:
        folder: with a folder for each class.
        size: as above.
        whole: DIR, which names of unread files are relative to.
    """

    def __init__(self, folder: Path, size: int | None, whole: Path) -> None:
        self.folder, self._size, self._whole = folder, size, whole
        self.files: list[Path] = []
        self.labels: list[str] = []
        self.unread: list[str] = []
        for of_class in _folders(folder):
            _checked_name(of_class)
            files = sorted(_files(of_class))
            own = [f for f in files if f.suffix.lower() in SUFFIXES]
            if not own:
                raise ArtifactError(f"{of_class}: has no image; accepted are {', '.join(SUFFIXES)}")
            self.files += own
            self.labels += [of_class.name] * len(own)
            self.unread += [str(f.relative_to(whole)) for f in files if f.suffix.lower() not in SUFFIXES]
        if not self.files:
            raise ArtifactError(f"{folder}: has no folder of images for each class")
        self.shape, self.modes = self._looked_at()

    def _looked_at(self) -> tuple[tuple[int, int], list[str]]:
        """The one size (height, width), and each image's mode."""
        shape, modes = None, []
        for path in self.files:
            with _opened(path) as image:
                mode = image.mode
                width, height = _upright_size(image)
            if mode not in _GREY and mode not in _COLOUR:
                raise ArtifactError(
                    f"{path}: has pixels of mode {mode}; accepted are 8 bits for each channel (images of 16 bits can "
                    "be given in a .npz file)"
                )
            modes.append(mode)
            if self._size is not None:
                continue
            if shape is None:
                shape = height, width
            if shape != (height, width):
                raise ArtifactError(
                    f"{path}: is {height} x {width}, but {self.files[0]} is {shape[0]} x {shape[1]}; resize them, or "
                    f"let it be done: --dataset {self._whole}:32 scales all to 32 x 32"
                )
        return shape or (self._size or 0, self._size or 0), modes

    def pixels(self, mode: str) -> np.ndarray:
        """uint8 [N, channels, H, W]

        Args:
            mode: "L" or "RGB".
        """
        channels = len(mode)
        count = len(self.files) * channels * self.shape[0] * self.shape[1]
        if count > MAX_BYTES:
            raise ArtifactError(
                f"{self.folder}: has {len(self.files)} images of {self.shape[0]} x {self.shape[1]}, {count} bytes of "
                f"pixels; at most {MAX_BYTES} are read: scale them down, as in --dataset {self._whole}:32"
            )
        found = np.empty((len(self.files), channels, *self.shape), np.uint8)
        for i, path in enumerate(self.files):
            with _opened(path) as image:
                upright = ImageOps.exif_transpose(image)
                if image.mode == "P":  # a palette may have transparency of its own, which RGB alone would warn of
                    upright = upright.convert("RGBA")
                upright = upright.convert(mode)
                if self._size is not None:
                    upright = ImageOps.fit(upright, (self._size, self._size), Image.Resampling.BILINEAR)
                values = np.asarray(upright)
            found[i] = values[None] if mode == "L" else values.transpose(2, 0, 1)
        return found


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image. Whatever Pillow raises on it becomes an ArtifactError that names it."""
    try:
        with warnings.catch_warnings():
            # Of more pixels than Pillow takes for honest: refused before they are decoded.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and image.format != "MPO":  # a camera's preview, after the picture itself
                    raise ArtifactError(f"{path}: has {frames} frames; accepted are files of one image")
                yield image
    except ArtifactError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ArtifactError(f"{path}: is refused: {error}") from error
    except Exception as error:  # each decoder raises what it likes on a damaged file
        raise ArtifactError(f"{path}: cannot be read as an image ({error})") from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the orientation: by a quarter
    return (image.height, image.width) if turned else (image.width, image.height)


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(f for f in folder.iterdir() if f.is_dir() and not _is_hidden(f.name))
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be read ({error.strerror})") from error


def _is_hidden(name: str) -> bool:
    """Of folders that programs make beside a user's own: .ipynb_checkpoints and @eaDir hold copies of images."""
    return name.startswith((".", "__")) or name == "@eaDir"


def _files(folder: Path) -> Iterator[Path]:
    """All files below, links to folders followed as torchvision does. What cannot be reached is no less a sample."""

    def fail(error: OSError) -> None:
        raise ArtifactError(f"{error.filename}: cannot be read ({error.strerror})") from error

    above: dict[str, tuple[str, ...]] = {str(folder): (os.path.realpath(folder),)}
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in folders:
            path = os.path.join(place, name)
            if os.path.realpath(path) in above[place]:
                raise ArtifactError(f"{path}: is a link to a folder that it is in")
            above[path] = (*above[place], os.path.realpath(path))
        for name in names:
            if name.startswith("."):
                continue
            path = os.path.join(place, name)
            if not os.path.exists(path):
                raise ArtifactError(f"{path}: is a link to {os.path.realpath(path)}, which is not there; remove it")
            if os.path.isfile(path):
                yield Path(path)


def _check_no_parts(folder: Path, below: list[Path]) -> None:
    """ArtifactError where what would be classes are parts by their names, as in Kaggle's seg_train and seg_test."""
    named: dict[str, str] = {}
    for f in below:
        found = {PARTS[word] for word in (w.removesuffix("set") for w in words(f.name)) if word in PARTS}
        if len(found) == 1:
            named.setdefault(found.pop(), f.name)
    if TRAIN in named and len(named) > 1:
        raise ArtifactError(
            f"{folder}: has folders {' and '.join(named.values())}, which by their names are no classes but parts; "
            f"accepted are {folder}/train/CLASS and {folder}/test/CLASS, with a folder for each class in each part"
        )


def _checked_name(of_class: Path) -> None:
    try:
        of_class.name.encode()
    except UnicodeEncodeError:
        raise ArtifactError(
            f"{str(of_class)!a}: the name is not UTF-8, which distilled.h5 keeps it in; rename the folder"
        ) from None


def _shortened(unread: list[str], most: int = 5) -> tuple[str, ...]:
    more = (f"and {len(unread) - most} more files",) if len(unread) > most else ()
    return (*unread[:most], *more)


def _notes(modes: list[str], channels: str, size: int | None) -> Iterator[str]:
    kinds = _GREY | _COLOUR
    counts = {mode: modes.count(mode) for mode in kinds if mode in modes}
    if set(counts) != {channels}:
        held = ", ".join(f"{count} {kinds[mode]}" for mode, count in counts.items())
        dropped = "; transparency is dropped" if any(mode in counts for mode in _TRANSPARENT) else ""
        yield f"images ({held}) are read as {'RGB' if channels == 'RGB' else 'grey'}{dropped}"
    if size is not None:
        yield f"images are cut to a square in the middle and scaled to {size} x {size}"
