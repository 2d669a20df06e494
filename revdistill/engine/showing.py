"""How results and settings show themselves: one line, with shapes and ranges where a tensor's numbers would stand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

_MOST = 4  # entries of a mapping or sequence
_LONGEST = 60  # characters of what is shown as it is
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


class Shown:
    """For dataclasses with repr=False: their fields, tensors by shape and range; those of repr=False are left out."""

    def __repr__(self) -> str:
        if not hasattr(self, "__dataclass_fields__"):  # somebody's own optimizer
            return object.__repr__(self)
        named = [(f.name, getattr(self, f.name)) for f in fields(self) if f.repr]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={brief(value)}' for name, value in named)})"


def brief(value: Any) -> str:
    """The value in a few words: "float32 [90], 0.02 to 0.1" of a tensor or an array of numbers."""
    if isinstance(value, Tensor | np.ndarray):
        return _numbers(value)
    if isinstance(value, Mapping):
        shown = [f"{key!r}: {brief(of)}" for key, of in list(value.items())[:_MOST]]
        return "{" + ", ".join(shown + _more(len(value))) + "}"
    if type(value) in (tuple, list):
        found = ", ".join([brief(of) for of in value[:_MOST]] + _more(len(value)))
        return f"[{found}]" if isinstance(value, list) else f"({found}{',' * (len(value) == 1)})"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST or isinstance(value, Shown) else f"{text[: _LONGEST - 3]}..."


def shares(found: Mapping[str, Any], name: str) -> str:
    """Of each entry the share of this name: "MLP 93.1%, LinearNet 90.2%"; entries that have none are left out: they may
    come from somebody else's file.
    """
    numbers = {key: of.get(name) for key, of in found.items() if isinstance(of, Mapping)}
    return ", ".join(f"{key} {share:.1%}" for key, share in numbers.items() if isinstance(share, float))


def size(count: int) -> str:
    """A number of bytes in words: "1.3 MiB"."""
    power = 0 if count < 1024 else min(int(math.log(count, 1024)), len(_UNITS) - 1)
    return f"{count} {_UNITS[0]}" if not power else f"{count / 1024**power:.1f} {_UNITS[power]}"


def _more(count: int) -> list[str]:
    return [f"... ({count} in all)"] if count > _MOST else []


def _numbers(values: Tensor | np.ndarray) -> str:
    dtype = str(values.dtype).removeprefix("torch.")
    learned = ", requires grad" if isinstance(values, Tensor) and values.requires_grad else ""
    try:
        shape = list(values.shape)
    except RuntimeError:  # nested
        return f"{dtype}{learned}"
    numbers = values.detach() if isinstance(values, Tensor) else values
    try:
        least, most = numbers.min().item(), numbers.max().item()
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # no numbers, none at all, or in a transform
        return f"{dtype} {shape}{learned}"
    if math.prod(shape) == 1:
        return f"{brief(least)} ({dtype} {shape}{learned})" if shape or learned else brief(least)
    return f"{dtype} {shape}, {brief(least)} to {brief(most)}{learned}"
