"""What a rank keeps, by a formula, and what a model of GPT-2's size needs by it and by what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

WORD = 8  # bytes of a number of the state
# Numbers of the state for each parameter, which are not of the problem but of the optimizer: theta, running averages
# (Adam's second in two words), and a head for everything that decays.
STATE_WORDS = {"SGD": 3, "Adam": 7, "AdamW": 8, "RMSprop": 4}
SLOTS = {"SGD": 1, "Adam": 2, "AdamW": 2, "RMSprop": 1}
FLOAT = 4
GB = 1e9


def part(parameters: int, ranks: int) -> int:
    """How many parameters the rank with the most has."""
    return math.ceil(parameters / ranks)


def state_bytes(optimizer: str, parameters: int, ranks: int = 1) -> int:
    """Of `UnrollStats.state_bytes`, on the rank with the most; ranks: that share the state, 1 without shard=True."""
    return WORD * STATE_WORDS[optimizer] * part(parameters, ranks)


def history_bytes(bits: float, steps: int, parameters: int, ranks: int = 1) -> float:
    """bits: per parameter and step, those that decays put away."""
    return bits * steps / 8 * part(parameters, ranks)


def bars_bytes(optimizer: str, outputs: int, chunk: int, parameters: int, ranks: int = 1) -> int:
    """What is carried back, of float32: for each loss dL/d(theta) and dL/d(each running average), and for the losses
    that are gone back for at once dL/d(the gradient).
    """
    return FLOAT * (outputs * (1 + SLOTS[optimizer]) + min(outputs, chunk)) * part(parameters, ranks)


def split(one: float, some: float, ranks: int) -> tuple[float, float]:
    """(whole, in parts): the two of which whole + in parts / ranks are the bytes that one rank and that some have."""
    parts = (one - some) / (1 - 1 / ranks)
    return one - parts, parts


@dataclass(frozen=True)
class Model:
    """A model of GPT-2's size and its training, trained by AdamW.

    Args:
        parameters: how many.
        batch: examples of a step, all ranks' together.
        whole, parts: bytes per parameter that every rank has, and that ranks share, at the peak and without a history.
        activations: bytes of an example.
        bits: put away per parameter and step.
        steps: T.
    """

    parameters: int
    batch: int
    whole: float
    parts: float
    activations: float
    bits: float
    steps: int

    def ours(self, ranks: int, *, shard: bool = True) -> float:
        """Bytes at the peak of each rank, with group= and shard=True."""
        sharing = ranks if shard else 1
        fixed = self.parameters * self.whole + part(self.parameters, sharing) * self.parts
        return fixed + history_bytes(self.bits, self.steps, self.parameters, sharing) + self._activations(ranks)

    def autograd(self, ranks: int) -> float:
        """At least: every step's graph is kept, and AdamW's three tensors of it."""
        return self.steps * (self._floats + self._activations(ranks))

    def every_state(self, ranks: int) -> float:
        """Theta and AdamW's two averages, as floats, of every step, in parts; and what one step takes."""
        return self._states(self.steps, ranks)

    def some_states(self, ranks: int) -> float:
        """As many as it takes where training is made a second time: 2 sqrt(T)."""
        return self._states(math.ceil(2 * math.sqrt(self.steps)), ranks)

    def _states(self, count: int, ranks: int) -> float:
        return count * self._floats / ranks + 2 * FLOAT * self.parameters + self._activations(ranks)

    @property
    def _floats(self) -> int:
        return 3 * FLOAT * self.parameters

    def _activations(self, ranks: int) -> float:
        return self.activations * math.ceil(self.batch / ranks)


def on_paper(model: Model, ranks: tuple[int, ...], steps: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for each way; every figure is computed."""
    ways = {
        "ours, shard=True": Model.ours,
        "ours, group= without shard": lambda model, ranks: Model.ours(model, ranks, shard=False),
        "checkpoints, 2 sqrt(T) whole states": Model.some_states,
        "checkpoints, every whole state": Model.every_state,
        "plain autograd, at least": Model.autograd,
    }
    rows = []
    for t in steps:
        at = Model(**{**vars(model), "steps": t})
        for way, needs in ways.items():
            rows.append({"way": way, "steps": t, "computed": True, "bytes": {str(n): needs(at, n) for n in ranks}})
    return rows
