"""Programs of losses, kept for as long as the loss lives, so that an outer loop captures once."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

_MOST = 4  # programs of one loss


class _OfLoss:
    """Of one loss, by what else they depend on; those that somebody has are not in it."""

    def __init__(self, loss: weakref.ref[Any]) -> None:
        self.loss = loss
        self.free: list[tuple[Hashable, Any]] = []
        self.refused: set[Hashable] = set()


_of: weakref.WeakKeyDictionary[Any, _OfLoss] = weakref.WeakKeyDictionary()


def take(loss: Any, key: Hashable) -> Any:
    """A program of this loss, which is nobody else's until it is given back; None where there is none."""
    known = _known(loss)
    for i, (other, program) in enumerate(known.free if known is not None else ()):
        if other == key:
            assert known is not None
            del known.free[i]
            return program
    return None


def give_back(loss: Any, key: Hashable, program: Any) -> None:
    """The next may have it. It must hold neither the loss nor an unroll. The one longest unused makes room."""
    known = _known(loss) or _new(loss)
    if known is not None:
        known.free.append((key, program))
        del known.free[:-_MOST]


def refuse(loss: Any, key: Hashable) -> None:
    """There is to be no such program of this loss any more."""
    known = _known(loss) or _new(loss)
    if known is not None:
        known.refused.add(key)


def is_refused(loss: Any, key: Hashable) -> bool:
    """Whether `refuse` was called."""
    known = _known(loss)
    return known is not None and key in known.refused


def _new(loss: Any) -> _OfLoss | None:
    try:
        found = _of[loss] = _OfLoss(weakref.ref(loss))
    except Exception:  # what cannot be referred to weakly lives who knows how long; or whatever its __hash__ raises
        return None
    return found


def _known(loss: Any) -> _OfLoss | None:
    """Of this very loss: bound methods are equal, and each dies by itself."""
    try:
        known = _of.get(loss)
    except Exception:
        return None
    return known if known is not None and known.loss() is loss else None
