"""Inputs in the shapes that people keep them in, as [N, features] or [N, channels, H, W]."""

from __future__ import annotations

import numpy as np

from revdistill.engine import ArtifactError

FIRST, LAST = "NCHW", "NHWC"
_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
ROUNDED = 0.01  # of a feature's range: more must not be lost in float32
CONSTANT = 1e-12  # of a feature's size: a smaller range is none


def checked(where: str, x: np.ndarray) -> None:
    """Raises:
    ArtifactError: these are no inputs.
    """
    if x.dtype.kind not in "fiub":
        raise ArtifactError(f"{where} has dtype {x.dtype}; accepted are numbers")
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise ArtifactError(
            f"{where} has shape {x.shape}; accepted are (N, features), (N, H, W), (N, channels, H, W), "
            "(N, H, W, channels)"
        )


def layout(where: str, shape: tuple[int, ...]) -> str:
    """Whether images of this shape have their channels first ("NCHW") or last ("NHWC").

    Last, where the last dimension is 1, 3 or 4, and dimension 1 is larger and none of these.

    Args:
        where: file and array, for messages.
        shape: four dimensions.

    Raises:
        ArtifactError: both are plausible; says how to tell them apart.
    """
    _, one, two, last = shape
    if one == 1 or last == 1 == two:  # one channel, or pixels in a row
        return FIRST
    if last in _CHANNELS and one not in _CHANNELS:
        return LAST if one > last else FIRST
    both = (last in _CHANNELS and one >= last) or (one not in _CHANNELS and one == two != last)
    if both:
        raise ArtifactError(
            f"{where} has shape {shape}, which may be {one} channels of {two} x {last} or {last} channels of {one} x "
            f"{two}; add an array layout that says which: np.savez(..., layout='{FIRST}') or layout='{LAST}'"
        )
    return FIRST


def _check_told_apart(where: str, given: np.ndarray, x: np.ndarray) -> None:
    """ArtifactError where float32 makes steps of a feature's values: of times in seconds since 1970, say, minutes."""
    if given.dtype.itemsize < 4 or given.dtype == np.float32:
        return
    for i in range(x.shape[1]):
        values = given[:, i].astype(np.float64)
        least, most = float(values.min()), float(values.max())
        lost = float(np.abs(values - x[:, i]).max())
        # Of what differs by the rounding of float64 alone, nothing is lost: it is constant.
        if lost > ROUNDED * (most - least) > ROUNDED * CONSTANT * max(abs(least), abs(most)):
            raise ArtifactError(
                f"{where}: feature {i + 1} goes from {least!r} to {most!r}, but float32 rounds its values by up to "
                f"{lost:.3g}; subtract {least!r} from it, or leave it out"
            )


def arranged(where: str, x: np.ndarray, order: str) -> np.ndarray:
    """float32, images with a channel dimension after the first.

    Args:
        where: file and array, for messages.
        x: as `checked` accepts it.
        order: of the dimensions where there are four, FIRST or LAST.

    Raises:
        ArtifactError: there are values that float32 cannot hold.
    """
    given = x
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    fine = np.isfinite(x)
    if not fine.all():
        at = tuple(int(i) for i in np.unravel_index(int(np.argmin(fine)), x.shape))
        raise ArtifactError(
            f"{where} has entries that are not finite in float32: {x.size - int(fine.sum())} of them, the first "
            f"{given[at]} at {list(at)}; leave these samples out, or fill them in"
        )
    if x.ndim == 2:
        _check_told_apart(where, given, x)
    if x.ndim == 4 and order == LAST:
        return np.ascontiguousarray(np.moveaxis(x, 3, 1))
    return x[:, None] if x.ndim == 3 else x
