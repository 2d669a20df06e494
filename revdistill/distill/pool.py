"""A pool of networks at different ages, each of which goes on training where it is, instead of a new one at every outer
step (Zhou, Nezhadarya & Ba, NeurIPS 2022, who call it a model pool; here with momentum and back through each piece).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from revdistill.engine import OptimizerState
from revdistill.outer.networks import Params
from revdistill.outer.random_streams import POOL, POOL_AGE, generator

AGES = "pool.ages"


@dataclass(frozen=True)
class Member:
    """Networks, one stack for each architecture, and how far their training is.

    Attributes:
        age: steps that they were trained for.
        params: of each stack, detached.
        slots: the optimizer's running averages of each stack: slot -> name -> tensor.
    """

    age: int
    params: tuple[Params, ...]
    slots: tuple[dict[str, Params], ...]

    def state(self, i: int) -> OptimizerState:
        """To go on with stack i. It counts as floats, so that a resumed run goes on to the same bits."""
        return OptimizerState(self.age, self.slots[i] if self.age else {})


class Pool:
    """Members by number; one is drawn at each outer step.

    Args:
        size: how many there are.
        window: steps that a member makes at an outer step.
        steps: T, the longest that a member is trained; then a new one takes its place.
        seed: of the draws.
        fresh: (k, age) -> a new member, drawn for outer step k and trained for `age` steps.
    """

    def __init__(self, size: int, window: int, steps: int, seed: int, fresh: Callable[[int, int], Member]) -> None:
        self._window, self._steps, self._seed, self._fresh = window, steps, seed, fresh
        self.members: list[Member | None] = [None] * size

    def draw(self, k: int) -> tuple[int, Member]:
        """The number of the member whose turn it is at outer step k, and the member, with `window` steps to go at
        least.
        """
        random = generator(self._seed, POOL, k)
        number = int(torch.randint(len(self.members), (), generator=random))
        member = self.members[number]
        if member is None or member.age + self._window > self._steps:
            # The first ones are of any age, later ones begin anew, at any place of the windows that follow.
            oldest = self._steps - self._window if member is None else min(self._window - 1, self._steps - self._window)
            age = int(torch.randint(oldest + 1, (), generator=generator(self._seed, POOL_AGE, k)))
            member = self._fresh(k, age)
        return number, member

    def tensors(self) -> dict[str, Tensor]:
        """Everything, to be kept: AGES (-1: none yet) and each tensor by a name."""
        ages = torch.tensor([-1 if member is None else member.age for member in self.members])
        found = {AGES: ages}
        for number, member in enumerate(self.members):
            if member is not None:
                found |= _named(number, member)
        return found

    def read(self, ages: list[int], like: Member, read: Callable[[str, Tensor], Tensor]) -> list[Member | None]:
        """The members that `tensors` was called with.

        Args:
            ages: of the members.
            like: a member with a step behind it, for names and shapes.
            read: (name, tensor of that shape and device) -> the tensor that was kept.
        """
        members: list[Member | None] = []
        for number, age in enumerate(ages):
            if age < 0:
                members.append(None)
                continue
            kept = {name: read(name, t) for name, t in _named(number, like, slots=age > 0).items()}
            params = tuple(_part(kept, number, i, "params", p) for i, p in enumerate(like.params))
            slots = tuple(
                {slot: _part(kept, number, i, slot, of) for slot, of in each.items()} if age else {}
                for i, each in enumerate(like.slots)
            )
            members.append(Member(age, params, slots))
        return members

    def put(self, members: list[Member | None]) -> None:
        """Go on with these."""
        self.members = members


def _named(number: int, member: Member, slots: bool = True) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for i, (params, each) in enumerate(zip(member.params, member.slots, strict=True)):
        parts: dict[str, Params] = {"params": params} | (each if slots else {})
        found |= {_name(number, i, part, j): t for part, of in parts.items() for j, t in enumerate(of.values())}
    return found


def _name(number: int, i: int, part: str, j: int) -> str:
    """Parameters go by their positions: what a module calls them may be no name for HDF5, such as "a/b"."""
    return f"pool.{number}.{i}.{part}.{j}"


def _part(kept: dict[str, Tensor], number: int, i: int, part: str, like: Params) -> Params:
    return {name: kept[_name(number, i, part, j)] for j, name in enumerate(like)}
