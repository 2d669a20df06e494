"""When something that costs is looked at again."""

from __future__ import annotations


def is_due(count: int) -> bool:
    """Whether what was seen `count` times is looked at: ever more rarely, at powers of two (and 0), so that the looks
    at n steps cost log2(n) of them, and a fault is found before the steps have doubled.
    """
    return count & (count - 1) == 0
