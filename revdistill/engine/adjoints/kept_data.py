"""Data behind kept graphs: whether they are on the way back what they were on the way forward.

A graph holds its batch by reference. torch notices when it is changed in place, but not what another library changes
that shares its memory (numpy's arrays do), and without a second evaluation nothing else would tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revdistill.engine.adjoints.repeated import NONDETERMINISTIC
from revdistill.engine.errors import ReversalError
from revdistill.engine.integers.backend import Backend
from revdistill.engine.loss.data import Data


class KeptData:
    """Fingerprints of the rows of a table, and of hyper; on the CPU, where memory is shared."""

    def __init__(self, data: Data, backend: Backend, taken: int) -> None:
        self._data, self._backend, self._taken = data, backend, taken
        self._rows: dict[int, list[int]] = {}
        self._hypers: list[int] | None = None

    def note(self, k: int) -> None:
        """Step k's graph is kept."""
        if self._backend.interval > 1:
            return
        if self._hypers is None:
            self._hypers = self._fingerprints(self._data.hypers)
        if self._data.tensors and self._data.row(k) not in self._rows:
            self._rows[self._data.row(k)] = self._fingerprints(self._data.rows(k))

    def check(self, k: int) -> None:
        """Step k's graph is used. Raises ReversalError where its data have changed; each row is looked at once."""
        if self._backend.interval > 1:
            return
        same = self._hypers is None or self._hypers == self._fingerprints(self._data.hypers)
        self._hypers = None
        before = self._rows.pop(self._data.row(k), None) if self._data.tensors else None
        if not same or (before is not None and before != self._fingerprints(self._data.rows(k))):
            raise ReversalError(
                f"the data of step {k + self._taken} are not what they were on the way forward: something that shares "
                "their memory changed them, so the hypergradient would be wrong and is not returned. "
                f"{NONDETERMINISTIC}"
            )

    def _fingerprints(self, tensors: Sequence[Tensor]) -> list[int]:
        return [int(self._backend.fingerprint(_as_floats(t.detach()))) for t in tensors]


def _as_floats(t: Tensor) -> Tensor:
    """[numel], of the same bits where there are as many, else of the same values."""
    flat = t.contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.dtype == torch.int64:
        return flat.view(torch.float64)
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.double()
