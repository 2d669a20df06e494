"""Event files for TensorBoard, of unrolls and of outer loops; needs the extra [log]."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from revdistill.engine.scalars import is_integer

FOLDER = "tensorboard"  # in the directory of a job
MISSING = "needs the package tensorboard, which is not installed: pip install 'revdistill[log]'"


def check_installed() -> None:
    """ImportError that says what to install, where TensorBoard's writer cannot be imported."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError(f"TensorBoard {MISSING} ({error})", name="tensorboard") from error


def numbers_of(entry: dict[str, Any]) -> dict[str, float]:
    """What an entry of the log has for curves: its numbers, save that of the step."""
    return {name: value for name, value in entry.items() if name != "step" and isinstance(value, int | float)}


class Events:
    """One run's event file: numbers by step. The file is made with the first of them.

    Args:
        directory: of the run.
        first_step: points from this step on, which an earlier process has left, are hidden: they will be made again.
    """

    def __init__(self, directory: Path, first_step: int = 0) -> None:
        check_installed()
        self._directory, self._first_step = directory, first_step
        self._writer: Any = None

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a point to each of these curves. Raises OSError where an earlier one could not be written."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            writer: Any = SummaryWriter
            self._writer = writer(str(self._directory), purge_step=self._first_step)
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def flush(self) -> None:
        """Everything added is in the file."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """As `flush`; what is added later goes into another file."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()


class TensorBoard:
    """Writes what `rd.unroll` tells of its steps where TensorBoard finds it.

        with rd.TensorBoard("runs/mine") as board:
            theta = rd.unroll(..., on_step=board.on_step, on_step_back=board.on_step_back)
            outer_loss(theta).backward()

    and then `tensorboard --logdir runs/mine`. The first unroll is the run unroll-1, with the curves `loss` and
    `hypergradient_norm` (|dL/dtheta_k|) over the step k, the next one unroll-2: one begins where k is not above what it
    was. Numbers of an outer loop go to `scalars`.

    Cost: a wait for a GPU at each step that is written.

    Args:
        directory: of the event files; made where it does not exist.
        every: write steps whose k is a multiple of this.

    Raises:
        ImportError: the package tensorboard is not installed (the extra [log]).
        TypeError, ValueError: every is not an integer of at least 1.
    """

    def __init__(self, directory: str | os.PathLike[str], *, every: int = 1) -> None:
        if not is_integer(every):
            raise TypeError(f"every must be an integer, got {type(every).__name__}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.directory, self.every = Path(directory), int(every)
        self.unrolls, self._last = 0, -1
        self._own = Events(self.directory)
        self._unroll: Events | None = None

    def __repr__(self) -> str:
        return f"TensorBoard({str(self.directory)!r}, every={self.every}, unrolls={self.unrolls})"

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_step(self, k: int, theta: Mapping[str, Tensor], loss: Tensor) -> None:
        """For `rd.unroll(on_step=)`: a point of `loss`."""
        if k <= self._last or self._unroll is None:
            self._begin()
        self._last = k
        self._add(k, "loss", loss)

    def on_step_back(self, k: int, norm: float) -> None:
        """For `rd.unroll(on_step_back=)`: a point of `hypergradient_norm`, of the unroll that `on_step` saw last."""
        if self._unroll is None:
            self._begin()
        self._add(k, "hypergradient_norm", norm)

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Points of curves of your own, such as an outer loop's: name -> number at this step."""
        self._own.add(step, {name: float(number) for name, number in numbers.items()})

    def close(self) -> None:
        """Everything is in the files; a later unroll begins another run."""
        self._own.close()
        if self._unroll is not None:
            self._unroll.close()
        self._unroll, self._last = None, -1

    def _begin(self) -> None:
        if self._unroll is not None:
            self._unroll.close()
        self.unrolls += 1
        self._unroll = Events(self.directory / f"unroll-{self.unrolls}")

    def _add(self, k: int, name: str, number: Tensor | float) -> None:
        if k % self.every == 0:
            assert self._unroll is not None
            self._unroll.add(k, {name: float(number)})
