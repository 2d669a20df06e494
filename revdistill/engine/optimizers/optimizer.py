"""What every optimizer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import ClassVar

from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.hyperparameters import Hyperparameter
from revdistill.engine.optimizers.start import AT_REST, Start
from revdistill.engine.optimizers.update import Update
from revdistill.engine.showing import Shown


class Optimizer(Shown, ABC):
    """What rd.unroll takes: `SGD`, `Adam`, `AdamW` or `RMSprop`.

    slot_names: by the name of each running average, torch.optim's name for it.
    """

    slot_names: ClassVar[Mapping[str, str]]
    weight_decay: Hyperparameter

    @property
    def counts_steps(self) -> bool:
        """Whether the steps of a parameter that has had none before are other ones."""
        return False

    @abstractmethod
    def resolve(self, layout: Layout, steps: int, start: Start = AT_REST) -> Update:
        """The moves for `steps` steps, from `start`, of parameters laid out like `layout`."""

    def sparing(self, names: Collection[str], layout: Layout) -> Optimizer:
        """The same without weight decay for these parameters."""
        given = self.weight_decay
        each = {name: given[name] if isinstance(given, Mapping) else given for name in layout.names}
        return replace(self, weight_decay=each | dict.fromkeys(names, 0.0))  # type: ignore[type-var]
