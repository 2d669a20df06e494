"""The moves of a step, made one after the other: what any device can do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from revdistill.engine.integers.state import THETA, State
from revdistill.engine.optimizers.moves import Move
from revdistill.engine.static.rows import ANY


class Moves:
    """Some moves of a step over static memory, forward or back.

    Args:
        moves: in the order in which they are made.
        state: which they change.
        back: whether each is undone.
    """

    def __init__(self, moves: Sequence[Move], state: State, *, back: bool) -> None:
        self._moves, self._state, self._back = tuple(moves), state, back

    def run(self, gradient: Tensor | None, theta_out: Tensor | None = None) -> None:
        """Make them.

        Args:
            gradient: float [numel]; None where no move sees it.
            theta_out: float [numel], to be filled with theta after them.
        """
        for move in self._moves:
            if self._back:
                move.inverse(ANY, self._state, gradient)
            else:
                assert gradient is not None
                move.forward(ANY, self._state, gradient)
        self._state.backend.settle()
        if theta_out is not None:
            self._state.backend.to_float(self._state.numbers[THETA], theta_out, self._state.formats[THETA])
