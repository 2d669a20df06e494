"""A user's own dataset: a .npz file with x and y, and if there are any x_test and y_test."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from revdistill.engine import ArtifactError

Arrays = tuple[np.ndarray, np.ndarray]


def load_npz(path: Path) -> tuple[Arrays, Arrays | None]:
    """A user's own data.

    Args:
        path: of the .npz file.

    Returns:
        (x, y), and (x_test, y_test) or None: x is float32 [N, features] or [N, channels, H, W], y int64 [N] from 0 to
        classes - 1.

    Raises:
        ArtifactError: names the file and what is wrong with it.
    """
    arrays = read_npz(path)
    for key in ("x", "y"):
        if key not in arrays:
            raise ArtifactError(
                f"{path}: has no array {key!r}; it holds {sorted(arrays) or 'nothing'}, and x and y are needed"
            )
    x, classes, y = _checked(path, "x", arrays["x"], "y", arrays["y"])
    if "x_test" not in arrays or "y_test" not in arrays:
        return (x, y), None
    x_test, test_classes, y_test = _checked(path, "x_test", arrays["x_test"], "y_test", arrays["y_test"])
    if x_test.shape[1:] != x.shape[1:]:
        raise ArtifactError(f"{path}: x_test has entries of shape {x_test.shape[1:]}, but x of {x.shape[1:]}")
    if not set(test_classes) <= set(classes):
        raise ArtifactError(
            f"{path}: y_test has classes {sorted(set(test_classes) - set(classes))} that y does not have"
        )
    return (x, y), (x_test, np.searchsorted(classes, test_classes[y_test]))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name. No pickle is read, and no more memory is allocated than the file has contents.

    Raises:
        ArtifactError: names the file and what is wrong with it.
    """
    try:
        found = {}
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                with archive.open(info) as member:
                    version = np.lib.format.read_magic(member)
                    read_header: Any = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }.get(version)
                    if read_header is None:
                        raise ArtifactError(
                            f"{path}: array {key!r} is of .npy version {version}; accepted are 1.0 and 2.0"
                        )
                    shape, _, dtype = read_header(member)
                if dtype.hasobject:
                    raise ArtifactError(f"{path}: array {key!r} holds Python objects; only numbers are read")
                declared = dtype.itemsize * int(np.prod(shape, dtype=object))
                if declared > info.file_size:
                    raise ArtifactError(f"{path}: array {key!r} declares {declared} bytes, but holds {info.file_size}")
                found[key] = arrays[key]
        return found
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except ArtifactError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, MemoryError, NotImplementedError) as error:
        raise ArtifactError(f"{path}: is not a readable .npz file ({error})") from error
    except Exception as error:  # zlib and the header's parser raise what they like on a damaged file
        raise ArtifactError(f"{path}: is damaged ({type(error).__name__}: {error})") from error


def _checked(
    path: Path, x_name: str, x: np.ndarray, y_name: str, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x as float32 with a channel dimension, the classes, and y as indices into them."""
    if x.dtype.kind not in "fiub":
        raise ArtifactError(f"{path}: {x_name} has dtype {x.dtype}; accepted are numbers")
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise ArtifactError(
            f"{path}: {x_name} has shape {x.shape}; accepted are (N, features), (N, H, W), (N, channels, H, W)"
        )
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise ArtifactError(
            f"{path}: {y_name} is {y.dtype} of shape {y.shape}; accepted are integer classes of shape ({len(x)},)"
        )
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ArtifactError(f"{path}: {x_name} has entries that are not finite in float32")
    classes, indices = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ArtifactError(f"{path}: {y_name} has {len(classes)} class; at least two are needed")
    return (x[:, None] if x.ndim == 3 else x), classes, indices.astype(np.int64)
