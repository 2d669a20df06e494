"""What counts as a number where an argument is one: Python's and numpy's alike, and no bool."""

from __future__ import annotations

import math
import numbers
from typing import Any, TypeGuard


def is_real(value: Any) -> TypeGuard[float]:
    """Whether it is a real number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number by its type: 3.0 is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def as_float(value: float) -> float:
    """The nearest float; infinite where an int is beyond all of them."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
