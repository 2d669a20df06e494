"""The integers of a training state at one step, to go back to or to compare with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from revdistill.engine.integers.backend import Backend
from revdistill.engine.integers.state import THETA, State


class Snapshot:
    """theta, and with `with_slots` the running averages and the bit stores' heads too (not the words they spilled)."""

    def __init__(self, state: State, *, with_slots: bool) -> None:
        self.theta = state.numbers[THETA].clone()
        self._slots = {slot: q.clone() for slot, q in state.numbers.items() if slot != THETA} if with_slots else {}
        self._stores = [store.snapshot() for store in state.all_stores()] if with_slots else []
        self._formats = state.formats

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.theta, *self._slots.values(), *(head for head, _, _ in self._stores)))

    def fits(self, state: State) -> bool:
        """Whether the state has the same numbers, in the same formats and place, and bit stores of the same lengths."""
        numbers = {THETA: self.theta} | self._slots
        return (
            self._formats == state.formats
            and self.theta.device == state.numbers[THETA].device
            and {name: q.shape for name, q in numbers.items()} == {name: q.shape for name, q in state.numbers.items()}
            and [head.shape for head, _, _ in self._stores] == [store.head.shape for store in state.all_stores()]
        )

    def stands_for(self, floats: Mapping[str, Tensor], backend: Backend) -> bool:
        """Whether theta and the slots, as floats, are these [numel], to the bit."""
        numbers = {THETA: self.theta} | self._slots
        found = {
            name: backend.to_float(numbers[name], torch.empty_like(x), self._formats[name])
            for name, x in floats.items()
        }
        return all(torch.equal(found[name], x) for name, x in floats.items())

    def restore(self, state: State) -> None:
        """Put the state where the snapshot was taken."""
        state.numbers[THETA].copy_(self.theta)
        for slot, values in self._slots.items():
            state.numbers[slot].copy_(values)
        for store, snapshot in zip(state.all_stores(), self._stores, strict=False):
            store.restore(snapshot)

    def differs(self, state: State) -> Tensor:
        """0-dim bool on the device: any bit of theta, slots or heads is another one than when the snapshot was
        taken.
        """
        pairs = [(state.numbers[THETA], self.theta)]
        pairs += [(state.numbers[slot], values) for slot, values in self._slots.items()]
        pairs += [(store.head, head) for store, (head, _, _) in zip(state.all_stores(), self._stores, strict=False)]
        return torch.stack([(a != b).any() for a, b in pairs]).any()
