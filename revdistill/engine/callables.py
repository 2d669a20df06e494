"""Whether what the user gave can be called as it will be."""

from __future__ import annotations

import inspect
from typing import Any


def check_callable(name: str, function: Any, form: str, count: int) -> None:
    """Check that a function takes the arguments that it will be given.

    Args:
        name: of the argument, for the message.
        function: what was given.
        form: how it will be called, for the message.
        count: how many positional arguments it will be given.

    Raises:
        TypeError: it is not callable, or not with so many.
    """
    if not callable(function):
        raise TypeError(f"{name} must be callable as {form}, got {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin without a signature: the call itself will tell
    try:
        signature.bind(*[None] * count)
    except TypeError:
        raise TypeError(f"{name} must be callable as {form}; its signature is {signature}") from None
