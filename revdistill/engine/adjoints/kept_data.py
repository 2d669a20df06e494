"""What kept graphs refer to: whether it is on the way back what it was on the way forward.

A graph holds its batch, the frozen parameters of the loss's modules, and what else the loss refers to, by reference.
torch notices when they are changed in place, but not what is changed through `.data`, or by another library that shares
the memory (numpy's arrays do), and without a second evaluation nothing else would tell.

Memory that two steps' graphs hold was made in neither of the two evaluations: that is how a teacher is found, or class
weights, to which a loss refers without telling. Graphs are looked at for it at steps ever further apart, and at the
last two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revdistill.engine.errors import ReversalError
from revdistill.engine.integers.backend import Backend
from revdistill.engine.integers.fingerprint import fingerprint_of
from revdistill.engine.loss.data import Data
from revdistill.engine.loss.evaluation import Modules
from revdistill.engine.loss.graph import memory_of, parts_of
from revdistill.engine.loss.looks import is_due
from revdistill.engine.loss.tree import contents

_CHUNK = 2**22  # words of 8 bytes
_Noted = tuple[list[Tensor], list[int]]


class KeptData:
    """Fingerprints of batches, hyper and what the loss refers to beside them, on the CPU, where memory is shared; and
    of frozen parameters, everywhere.
    """

    def __init__(self, data: Data, modules: Modules, backend: Backend, taken: int) -> None:
        self._data, self._modules, self._backend, self._taken = data, modules, backend, taken
        self._rows: dict[int, _Noted] = {}  # of a table by its rows, of a function by the steps
        self._hypers: _Noted | None = None
        self._frozen: dict[int, tuple[str, Tensor, int]] = {}
        self._steps, self._seen = 0, set[int]()
        self._outside: dict[int, tuple[Tensor, int, list[int]]] = {}

    def note(self, k: int, batch: Any, saved: Callable[[], Iterable[Tensor]], rest: int) -> None:
        """Step k's graph is kept.

        Args:
            k: the step, each later than the one before.
            batch: what the graph refers to, where a function gave it.
            saved: gives the tensors that the graph holds.
            rest: how many steps come after it.
        """
        self._note_data(k, batch)
        n, self._steps = self._steps, self._steps + 1
        if self._backend.interval == 1 and (is_due(n) or rest < 2):
            self._look(saved())

    def _look(self, saved: Iterable[Tensor]) -> None:
        """At one step's graph: what the one before, which is kept too, holds as well."""
        parts = [part.detach() for t in saved for part in parts_of(t) if part.numel()]
        found = {memory_of(part)[0]: part for part in parts}
        common = found.keys() & self._seen - self._outside.keys()
        if common:
            known = [*self._data.tensors, *self._data.hypers]
            known += [t for tensors, _ in self._rows.values() for t in tensors]
            known += [p for _, p, _ in self._frozen.values()]
            for memory in common.difference(memory_of(t)[0] for t in known):
                t = found[memory]
                self._outside[memory] = t, t._version, _of_memory(t)
        self._seen = set(found)

    def _note_data(self, k: int, batch: Any) -> None:
        for name, p in self._modules.frozen:
            if id(p) not in self._frozen:
                self._frozen[id(p)] = name, p, fingerprint_of(p)
        if self._backend.interval > 1:
            return
        if self._hypers is None:
            self._hypers = _noted(self._data.hypers)
        if self._data.function is not None:
            self._rows[k] = _noted(list(_tensors(batch)))
        elif self._data.gives_views and self._data.row(k) not in self._rows:
            self._rows[self._data.row(k)] = _noted(self._data.rows(k))

    def check(self, k: int) -> None:
        """Step k's graph is used. Raises ReversalError where what it refers to has changed; all is looked at once."""
        frozen, self._frozen = self._frozen, {}
        for name, p, before in frozen.values():
            if fingerprint_of(p) != before:
                raise ReversalError(
                    f"the module's frozen parameter {name!r} is not what it was on the way forward: the loss changed "
                    "it, or something did between the forward and the backward pass, so the hypergradient would be "
                    "wrong and is not returned. Change it after backward() only; what changes from step to step goes "
                    "into params or hyper="
                )
        outside, self._outside = self._outside, {}
        for t, version, noted in outside.values():
            if t._version == version and _of_memory(t) != noted:  # of another version torch says it
                raise ReversalError(
                    f"a tensor of shape {list(t.shape)}, to which the loss refers beside params, batch and hyper (a "
                    "teacher, say, or class weights), is not what it was on the way forward: its memory was changed "
                    "through .data or by another library, so the hypergradient would be wrong and is not returned. "
                    "Change it after backward() only; what changes from step to step goes into batches or hyper=. "
                    "(BatchNorm under torch.func.functional_call changes its running statistics: call "
                    "rd.from_module's loss instead.)"
                )
        hypers, self._hypers = self._hypers, None
        row = k if self._data.function is not None else self._data.row(k) if self._data.gives_views else None
        batch = None if row is None else self._rows.pop(row, None)
        if any(noted is not None and _noted(noted[0])[1] != noted[1] for noted in (hypers, batch)):
            raise ReversalError(
                f"the data of step {k + self._taken} are not what they were on the way forward: something that shares "
                "their memory changed them, so the hypergradient would be wrong and is not returned. Give each batch "
                "memory of its own (a function that fills one array again and again does not), and change batches and "
                "hyper after backward() only"
            )


def _of_memory(t: Tensor) -> list[int]:
    """Fingerprints of all the memory that a tensor lies in, chunk by chunk: what they take beside it is small."""
    flat = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
    words = len(flat) // 8 * 8
    chunks = (*torch.split(flat[:words].view(torch.int64), _CHUNK), flat[words:])
    return [fingerprint_of(chunk) for chunk in chunks if len(chunk)]


def _noted(tensors: Sequence[Tensor]) -> _Noted:
    return list(tensors), [fingerprint_of(t) for t in tensors]


def _tensors(batch: Any) -> Iterator[Tensor]:
    """A batch's tensors, and its arrays as tensors over their memory."""
    for _, leaf in contents(batch, ""):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            yield leaf
        elif isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
            yield torch.as_tensor(leaf)
