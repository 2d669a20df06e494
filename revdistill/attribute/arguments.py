"""The checks of what an attribution is asked for: each error names the argument, what came and what is accepted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from revdistill.engine.scalars import as_float, is_integer, is_real
from revdistill.engine.tensors import check_tensor

Tensors = tuple[Tensor, ...]
NOT_REDUCED = "give the criterion reduction='none', and take no mean over the batch"


def examples(label: str, given: Any, device: torch.device) -> Tensors:
    """A data set as tensors without gradients, over the memory of what was given.

    Args:
        label: what the argument is called.
        given: by the user.
        device: of the parameters.

    Returns:
        Tensors [n, ...] of one n.

    Raises:
        TypeError, ValueError: it is no tuple of such tensors.
    """
    if isinstance(given, Tensor):
        raise TypeError(f"{label} must be a tuple of tensors [n, ...], got one tensor; give ({label},)")
    if not isinstance(given, (tuple, list)):
        raise TypeError(f"{label} must be a tuple of tensors [n, ...], got {type(given).__name__}")
    if not given:
        raise ValueError(f"{label} is empty; it must hold at least one tensor [n, ...]")
    for i, t in enumerate(given):
        check_tensor(f"{label}[{i}]", t)
        if not t.ndim or not len(t):
            raise ValueError(
                f"{label}[{i}] has shape {list(t.shape)}; its first dimension must be the number of examples, at least "
                "1"
            )
        if len(t) != len(given[0]):
            raise ValueError(f"{label}[{i}] holds {len(t)} examples, but {label}[0] holds {len(given[0])}")
        if t.device != device:
            raise ValueError(
                f"{label}[{i}] is on {t.device}, but params are on {device}; move it with .to({str(device)!r})"
            )
    return tuple(t.detach() for t in given)


def check_each(value: Any, count: int, what: str) -> Tensor:
    """What a loss or a measure gave, which must be one number for each example.

    Args:
        value: what it returned.
        count: of the examples.
        what: returned it.

    Raises:
        TypeError, ValueError: it is another thing.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{what} must return a tensor of one number for each example, [{count}], got {type(value).__name__}"
        )
    if value.shape != (count,) or not value.is_floating_point():
        remedy = NOT_REDUCED
        if value.ndim > 1 and len(value) == count:
            remedy = "take the mean over the other dimensions, as .flatten(1).mean(1) does"
        elif not value.ndim and count == 1:
            remedy = "with one example too: keep the first dimension (squeeze() drops it), and " + NOT_REDUCED
        raise ValueError(
            f"{what} must return one floating-point number for each of the {count} examples, shape [{count}], got "
            f"shape {list(value.shape)}, {value.dtype}; {remedy}"
        )
    return value


def integer(label: str, value: Any, least: int) -> int:
    """A whole number. Raises: TypeError, ValueError."""
    if not is_integer(value):
        raise TypeError(f"{label} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{label} must be at least {least}, got {value}")
    return int(value)


def flag(label: str, value: Any) -> bool:
    """A bool. Raises: TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{label} must be a bool, got {type(value).__name__}")
    return value


def dropped_at_once(drop: Any, n: int) -> int:
    """How many of n examples a share of them is: at least 1, and not all. Raises: TypeError, ValueError."""
    if not is_real(drop):
        raise TypeError(f"drop must be a float, got {type(drop).__name__}")
    if not 0 < as_float(drop) < 1:
        raise ValueError(f"drop must be a share of the examples between 0 and 1, got {drop}")
    if n < 2:
        raise ValueError("the training has one example only, and none is left without it; drop needs at least 2")
    return min(max(1, round(float(drop) * n)), n - 1)


def subsets(dropped: Any, n: int) -> tuple[Tensor, bool]:
    """Which examples are left out, as the user names them.

    Args:
        dropped: the numbers of examples (a list, range, array or tensor of integers); or a bool tensor or array [n], or
            [R, n] for R sets of them.
        n: how many examples there are.

    Returns:
        bool [R, n] on the CPU, and whether it is one set only, with R = 1.

    Raises:
        TypeError, ValueError: there is no such example, one is named twice, or the shape is another.
    """
    accepted = f"a list of examples' numbers from 0 to {n - 1}, or a bool tensor [{n}] or [R, {n}]"
    if isinstance(dropped, (list, tuple, range)) and not len(dropped):
        dropped = torch.empty(0, dtype=torch.int64)
    try:
        given = torch.as_tensor(np.asarray(dropped) if not isinstance(dropped, Tensor) else dropped.detach()).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"dropped must be {accepted}, got {type(dropped).__name__} ({error})") from None
    if given.dtype == torch.bool:
        if given.ndim not in (1, 2) or given.shape[-1] != n:
            raise ValueError(f"dropped has shape {list(given.shape)}; accepted is {accepted}")
        return given.reshape(-1, n), given.ndim == 1
    if given.is_floating_point() or given.is_complex() or given.ndim != 1:
        raise TypeError(f"dropped must be {accepted}, got shape {list(given.shape)}, {given.dtype}")
    given = given.long()
    outside = given[(given < 0) | (given >= n)]
    if len(outside):
        raise ValueError(f"dropped names example {int(outside[0])}; accepted is {accepted}")
    in_order = given.sort().values
    twice = in_order[1:][in_order[1:] == in_order[:-1]]
    if len(twice):
        raise ValueError(f"dropped names example {int(twice[0])} twice; name each once")
    mask = torch.zeros(1, n, dtype=torch.bool)
    mask[0, given] = True
    return mask, True


def checked_weights(given: Any, n: int) -> Tensor:
    """Weights of R trainings' examples, [R, n]. Raises: TypeError, ValueError."""
    if not isinstance(given, Tensor) or given.dtype not in (torch.bool, torch.float32, torch.float64):
        got = f"a tensor of {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"weights must be a bool or float tensor [R, {n}], got {got}")
    if given.ndim != 2 or given.shape[1] != n or not len(given):
        raise ValueError(
            f"weights has shape {list(given.shape)}; accepted is [R, {n}], a row for each training, at least 1"
        )
    if not bool(given.isfinite().all()):
        raise ValueError("weights has entries that are not finite")
    return given.detach()
