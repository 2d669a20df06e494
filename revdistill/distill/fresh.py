"""The fresh networks of an outer step, which units of work take their parts of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from revdistill.outer.networks import NetworkStack, Params, Part

Units = list[tuple[int, Part]]  # the units of work, each with the number of its architecture


class FreshNetworks:
    """All networks of an architecture are drawn at once, when the first unit of it is asked for, so that they are the
    same whatever the units are.

    Args:
        stacks: of the architectures; they draw.
        units: of these, or of other stacks of as many networks.
        seed: number of an architecture -> seed of its networks.
    """

    def __init__(self, stacks: Sequence[NetworkStack], units: Units, seed: Callable[[int], int]) -> None:
        self._stacks, self._units, self._seed = stacks, units, seed
        self._drawn: tuple[int, Params] | None = None

    def of(self, unit: int) -> tuple[Part, Params]:
        """The unit's part of its stack, and the parameters of that."""
        architecture, part = self._units[unit]
        if self._drawn is None or self._drawn[0] != architecture:
            self._drawn = architecture, self._stacks[architecture].sample(self._seed(architecture))
        return part, part.take(self._drawn[1])
