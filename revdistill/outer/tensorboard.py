"""Event files for TensorBoard, of unrolls and of outer loops; needs the extra [log]."""

from __future__ import annotations

import io
import math
import os
import socket
import time
from collections import deque
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from revdistill.engine.scalars import is_integer

FOLDER = "tensorboard"  # in the directory of a job
_MISSING = "needs the package tensorboard, which is not installed: python -m pip install tensorboard"


def unusable() -> str | None:
    """Why event files cannot be written, as the end of a sentence that begins with what needs them; None: they can."""
    try:
        _parts()
    except Exception as error:  # a package that is installed but broken may raise anything (protobuf: a TypeError)
        if isinstance(error, ModuleNotFoundError) and error.name == "tensorboard":
            return _MISSING
        first = (str(error).splitlines() or [""])[0]
        return f"needs the package tensorboard, which cannot be imported ({type(error).__name__}: {first})"
    return None


def check_installed() -> None:
    """ImportError that says what to do, where event files cannot be written."""
    reason = unusable()
    if reason is not None:
        raise ImportError(f"TensorBoard {reason}", name="tensorboard")


def check_folder(directory: Path) -> None:
    """ImportError where event files cannot be written; ValueError where what would be their directory is a file."""
    check_installed()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file, and event files for TensorBoard need a directory there; move it away")


def numbers_of(entry: dict[str, Any]) -> dict[str, float]:
    """What an entry of the log has for curves: its numbers, save that of the step."""
    return {name: value for name, value in entry.items() if name != "step" and isinstance(value, int | float)}


class Events:
    """One run's event files: numbers by step. The first file is made with the first of them.

    They are written when they are added, without tensorboard's own writer: its thread ends for good at the first
    write that fails. Here what the disk does not take waits, and is tried again.

    Args:
        directory: of the run.
        first_step: points from this step on, which an earlier process has left, are hidden: they will be made again.
            By default the first step that is put.
    """

    def __init__(self, directory: Path, first_step: int | None = None) -> None:
        check_installed()
        self.directory, self._first_step = directory, first_step
        self._last: int | None = None  # the step that was put last
        self._path: Path | None = None  # of the file
        self._head = b""  # its first records
        self._size = 0  # bytes that it took
        self._waiting: deque[tuple[int, bytes]] = deque()  # records that it is to take, with their steps
        self._taken = 0  # bytes that it took of the first of them: the rest follows, so that no record is cut short

    @property
    def waiting(self) -> int | None:
        """The first step of which something is not in the file; None: everything is."""
        return min((step for step, _ in self._waiting), default=None)

    def put(self, step: int, numbers: Mapping[str, float]) -> None:
        """As `add`, for the next `flush` to write."""
        _, summary, _ = _parts()
        if numbers and self._path is None:
            self._begin(step)
        for name, number in numbers.items():
            value = summary.Summary.Value(tag=name, simple_value=float(number))
            self._waiting.append((step, _record(step=step, summary=summary.Summary(value=[value]))))
            self._last = step

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a point to each of these curves. Raises OSError as `flush` does."""
        self.put(step, numbers)
        self.flush()

    def flush(self) -> None:
        """Write what is not in the file.

        Raises:
            OSError: not all of it could be written. The rest is kept for the next time.
        """
        if not self._waiting or self._path is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        # Opened each time, as the directory may have been removed. Unbuffered: what was taken is known to the byte.
        with self._path.open("ab", buffering=0) as file:
            if os.fstat(file.fileno()).st_size < self._size:  # somebody removed it: the points in it are gone
                if self._waiting[0][1] is not self._head:
                    self._waiting.appendleft((self._waiting[0][0], self._head))
                self._size = self._taken = 0
            while self._waiting:
                written = file.write(self._waiting[0][1][self._taken :])
                self._size += written
                self._taken += written
                if self._taken == len(self._waiting[0][1]):
                    self._waiting.popleft()
                    self._taken = 0

    def close(self) -> None:
        """As `flush`; what is added later goes into another file."""
        self.flush()
        self._path = None

    def _begin(self, step: int) -> None:
        """Begin a file, with a point of this step."""
        event, *_ = _parts()
        first = self._first_step
        if self._last is not None:  # after `close`: only what is made again is hidden
            first = step if step < self._last else self._last + 1
        elif first is None:
            first = step
        seconds, rest = divmod(time.time_ns(), 10**9)  # TensorBoard reads files in the order of their names
        name = f"events.out.tfevents.{seconds:010d}.{rest:09d}.{socket.gethostname()}.{os.getpid()}"
        self._path, self._size = self.directory / name, 0
        start = event.SessionLog(status=event.SessionLog.START)
        # in this order: only of a file with this version TensorBoard heeds where it starts
        self._head = _record(step=first, file_version="brain.Event:2") + _record(step=first, session_log=start)
        self._waiting.append((step, self._head))


class TensorBoard:
    """Writes what `rd.unroll` tells of its steps where TensorBoard finds it.

        with rd.TensorBoard("runs/mine") as board:
            theta = rd.unroll(..., on_step=board.on_step, on_step_back=board.on_step_back)
            outer_loss(theta).backward()

    and then `tensorboard --logdir runs/mine`. The first unroll is the run unroll-1, with the curves `loss` and
    `hypergradient_norm` (|dL/dtheta_k|) over the step k, the next one unroll-2: one begins where k is not above what it
    was, and with a way back that no `on_step` came before. Go back through one unroll before the next begins, or give
    each its own TensorBoard: a way back belongs to the unroll that `on_step` saw last. Numbers of an outer loop go to
    `scalars`.

    Points are written at once, save the norms: as TensorBoard forgets the points of a curve whose step does not grow,
    those of a way back wait until it has reached the unroll's first step (with a `window`: until the next unroll, or
    `close`). What a disk did not take is kept, and written with the next points.

    Cost: a wait for a GPU and a write at each step that is written.

    Args:
        directory: of the event files; made where it does not exist.
        every: write steps whose k is a multiple of this.

    Raises:
        ImportError: the package tensorboard is not installed (the extra [log]), or cannot be imported.
        TypeError, ValueError: every is not an integer of at least 1.
        OSError: from each method, where the files cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], *, every: int = 1) -> None:
        if not is_integer(every):
            raise TypeError(f"every must be an integer, got {type(every).__name__}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.directory, self.every = Path(directory), int(every)
        self.unrolls = 0
        self._last: float = -1  # the step that `on_step` saw last
        self._own = Events(self.directory)
        self._unroll: Events | None = None
        self._first: int | None = None  # the first step that `on_step` saw since the last way back
        self._back: int | None = None  # where the way back is
        self._norms: list[tuple[int, float]] = []  # of the way back, from the last step to the first

    def __repr__(self) -> str:
        return f"TensorBoard({str(self.directory)!r}, every={self.every}, unrolls={self.unrolls})"

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_step(self, k: int, theta: Mapping[str, Tensor], loss: Tensor) -> None:
        """For `rd.unroll(on_step=)`: a point of `loss`."""
        self._end_way_back()
        if k <= self._last or self._unroll is None:
            self._begin()
        assert self._unroll is not None
        self._last = k
        if self._first is None:
            self._first = k
        if k % self.every == 0:
            self._unroll.add(k, {"loss": float(loss)})

    def on_step_back(self, k: int, norm: float) -> None:
        """For `rd.unroll(on_step_back=)`: a point of `hypergradient_norm`, of the unroll that `on_step` saw last."""
        if self._back is not None and k >= self._back:
            self._end_way_back()
        if self._unroll is None or (self._back is None and self._first is None):
            self._begin()
            self._last = math.inf  # the next step that `on_step` sees is of another unroll
        self._back = k
        if k % self.every == 0:
            self._norms.append((k, float(norm)))
        if k == (self._first or 0):
            self._end_way_back()

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Points of curves of your own, such as an outer loop's: name -> number at this step."""
        self._own.add(step, {name: float(number) for name, number in numbers.items()})

    def close(self) -> None:
        """Everything is in the files; a later unroll begins another run."""
        try:
            self._end_way_back()
            if self._unroll is not None:
                self._unroll.close()
                self._unroll, self._last = None, -1
        finally:
            self._own.close()

    def _begin(self) -> None:
        if self._unroll is not None:
            self._unroll.close()
        self.unrolls += 1
        self._unroll, self._first = Events(self.directory / f"unroll-{self.unrolls}"), None

    def _end_way_back(self) -> None:
        """Write its norms, in ascending order of the steps."""
        if self._back is None:
            return
        assert self._unroll is not None
        norms, self._norms = self._norms, []
        self._back = self._first = None
        for k, norm in reversed(norms):
            self._unroll.put(k, {"hypergradient_norm": norm})
        self._unroll.flush()


def _parts() -> tuple[Any, Any, Any]:
    """Of tensorboard: its events and summaries (protocol buffers), and what writes records."""
    import_module("tensorboard")  # first: whether it is there at all
    proto = "tensorboard.compat.proto."
    return (
        import_module(proto + "event_pb2"),
        import_module(proto + "summary_pb2"),
        import_module("tensorboard.summary.writer.record_writer").RecordWriter,
    )


def _record(**fields: Any) -> bytes:
    """An event, as event files hold it."""
    event, _, writer = _parts()
    buffer = io.BytesIO()
    writer(buffer).write(event.Event(wall_time=time.time(), **fields).SerializeToString())
    return buffer.getvalue()
