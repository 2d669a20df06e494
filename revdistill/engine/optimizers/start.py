"""Where an optimizer begins: at rest, or where an earlier training left it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Start:
    """taken: steps that the training has behind it; slots: by name the running averages at the start, float [numel],
    maybe with a graph; none where all are 0.
    """

    taken: int = 0
    slots: Mapping[str, Tensor] = field(default_factory=dict)


AT_REST = Start()
