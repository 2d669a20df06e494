"""What every optimizer is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.update import Update


class Optimizer(ABC):
    """What rd.unroll takes: `SGD`, `Adam`, `AdamW` or `RMSprop`."""

    @abstractmethod
    def resolve(self, layout: Layout, steps: int) -> Update:
        """The moves for `steps` steps of parameters laid out like `layout`."""
