"""The moves of a step, made one after the other: what any device can do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revdistill.engine.integers.state import THETA, State
from revdistill.engine.optimizers.moves import Move
from revdistill.engine.static.rows import ANY

Notes = tuple[Tensor, Tensor]


class Moves:
    """Some moves of a step over static memory, forward or back.

    Args:
        moves: in the order in which they are made.
        state: which they change.
        back: whether each is undone.
    """

    def __init__(self, moves: Sequence[Move], state: State, *, back: bool) -> None:
        self._moves, self._state, self._back = tuple(moves), state, back

    def run(self, gradient: Tensor | None, theta_out: Tensor | None = None, notes: Notes | None = None) -> None:
        """Make them.

        Args:
            gradient: float32 or float64 [numel]; None where no move sees it and no notes are wanted.
            theta_out: float [numel], to be filled with theta after them.
            notes: (int64 [], float64 []), to be filled with the gradient's fingerprint and its largest magnitude.
        """
        if notes is not None:
            assert gradient is not None
            for note, find in zip(notes, (self._state.backend.fingerprint, self._state.backend.largest), strict=True):
                note.copy_(torch.as_tensor(find(gradient), device=note.device))
        for move in self._moves:
            if self._back:
                move.inverse(ANY, self._state, gradient)
            else:
                assert gradient is not None
                move.forward(ANY, self._state, gradient)
        self._state.backend.settle()
        if theta_out is not None:
            self._state.backend.to_float(self._state.numbers[THETA], theta_out, self._state.formats[THETA])
