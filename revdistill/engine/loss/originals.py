"""Whether a loss reads the parameters as they were given to the unroll, beside the ones that it is given at each step.

A training loop of torch changes its parameters in place, so that whoever holds them sees them as they are. An unroll
leaves them as they are: a criterion that calls the network for a target, or a list that holds a weight, would see the
start at every step. With a gradient that is a tensor from nowhere, which is refused anyway (`Strangers`); detached,
nothing else would tell. To look is to make every operator's call in Python, so it is done at the steps whose number,
of all that a loss was ever evaluated at, is a power of two.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.evaluation import Modules
from revdistill.engine.loss.graph import memory_of
from revdistill.engine.loss.tree import leaves

_evaluations: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


class Originals:
    """Of one unroll.

    Args:
        loss: whose evaluations are looked at.
        params: as they were given, by name.
        hypers: may share the parameters' memory: what the loss is given it may read.
        modules: those that the loss calls.
        steps: of the unroll.
        taken: steps of the training before the first one here, for messages.

    Attributes:
        next: the next step to be looked at.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        params: Mapping[str, Tensor],
        hypers: Iterable[Tensor],
        modules: Modules,
        steps: int,
        taken: int = 0,
    ) -> None:
        self._params, self._modules, self._taken = params, modules, taken
        self._given = {memory_of(t)[0] for t in hypers}
        self._before = 0
        try:
            self._before = _evaluations.get(loss, 0)
            _evaluations[loss] = self._before + steps
        except TypeError:  # nothing can be remembered of it
            pass
        self.next = self._after(-1)

    def watch(self, k: int, evaluate: Callable[[], Tensor], batch: Any) -> Tensor:
        """Evaluate the loss of the step that is next.

        Args:
            k: the step.
            evaluate: returns the loss.
            batch: which the loss is given.

        Returns:
            What `evaluate` returned.

        Raises:
            UnsupportedError: the loss reads parameters as they were given.
        """
        self.next = self._after(k)
        with _Reading() as reading:
            value = evaluate()
        given = self._given | {memory_of(t)[0] for _, t in leaves(batch, "") if isinstance(t, Tensor)}
        for name, t in self._watched():
            memory = memory_of(t)[0]
            if memory in reading.memory and memory not in given:
                raise UnsupportedError(
                    f"the loss reads params[{name!r}] as it was given to unroll, at step {k + self._taken}: a "
                    "criterion that calls the network does so, or a list that holds a layer's weight. It would be the "
                    "start's at every step, and no derivative would flow to it. Compute everything from the params "
                    "that the loss is given: make the criterion a module that holds the network, or write "
                    "loss(params, batch) with torch.func.functional_call; of what is to stay as it is at the start "
                    "give a copy, .detach().clone()"
                )
        return value

    def _after(self, k: int) -> int:
        """The first step after k to be looked at."""
        return (1 << (self._before + k + 1).bit_length()) - self._before - 1

    def _watched(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._params.items()
        yield from self._modules.replaced


class _Reading(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the memory of whatever an operator reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _only_looks(func):
            self.memory.update(memory_of(t)[0] for _, t in leaves((args, kwargs), "") if isinstance(t, Tensor))
        return func(*args, **kwargs)


def _only_looks(func: Any) -> bool:
    """Whether an operator takes no number from its argument: a view, or a new tensor of its shape and dtype."""
    schema = func._schema
    if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return True
    name: str = schema.name.removeprefix("aten::")
    return name.startswith(("new_", "empty")) or name.endswith("_like")
