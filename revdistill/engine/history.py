"""Where the words that leave a bit store are kept: a stack of tensors, last in, first out.

On the compute device, in host memory, or in a file on disk; or nowhere, for adjoints that never walk back.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor


class History(Protocol):
    """A stack of integer tensors of one fixed device and shape."""

    @property
    def nbytes(self) -> int:
        """Bytes held now."""

    def push(self, words: Tensor) -> None:
        """Take a tensor; the caller does not touch it again."""

    def pop(self) -> Tensor:
        """Return the tensor pushed last, on the device it came from."""

    def clear(self) -> None:
        """Let go of everything held."""


class DeviceHistory:
    """Words stay on the compute device."""

    def __init__(self) -> None:
        self._stack: list[Tensor] = []
        self.nbytes = 0

    def push(self, words: Tensor) -> None:
        self._stack.append(words)
        self.nbytes += words.nbytes

    def pop(self) -> Tensor:
        words = self._stack.pop()
        self.nbytes -= words.nbytes
        return words

    def clear(self) -> None:
        self._stack.clear()
        self.nbytes = 0


class HostHistory(DeviceHistory):
    """Words go to host memory, pinned when they come from a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def push(self, words: Tensor) -> None:
        if self._device.type == "cuda":
            pinned = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
            # Stream order makes this safe: pop copies back on the same stream, after this copy.
            words = pinned.copy_(words, non_blocking=True)
        super().push(words.to("cpu"))

    def pop(self) -> Tensor:
        return super().pop().to(self._device, non_blocking=True)


class FileHistory:
    """Words go to a temporary file that has no name once it is open: a killed process leaves nothing behind.

    path: a folder, or a file name whose folder exists (the file's space is taken there). Errors: OSError from the file
    system, a full disk included.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._device = device
        folder, prefix = (path, "revdistill-") if path.is_dir() else (path.parent, path.name)
        self._file: BinaryIO = tempfile.TemporaryFile(dir=folder, prefix=prefix, buffering=0)  # noqa: SIM115, it outlives this call
        weakref.finalize(self, self._file.close)  # closing it gives its space back
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []
        self.nbytes = 0

    def push(self, words: Tensor) -> None:
        data = words.cpu().contiguous().numpy().data.cast("B")
        self._file.seek(self.nbytes)
        while len(data):  # an unbuffered write may take a part only
            data = data[self._file.write(data) :]
        self._shapes.append((words.shape, words.dtype))
        self.nbytes += words.nbytes

    def pop(self) -> Tensor:
        shape, dtype = self._shapes.pop()
        words = torch.empty(shape, dtype=dtype)
        self.nbytes -= words.nbytes
        self._file.seek(self.nbytes)
        data = words.numpy().data.cast("B")
        while len(data):
            count = self._file.readinto(data)  # type: ignore[attr-defined]
            if not count:
                raise OSError("the history file is shorter than what was written to it")
            data = data[count:]
        self._file.truncate(self.nbytes)
        return words.to(self._device)

    def clear(self) -> None:
        self._file.truncate(0)
        self._shapes.clear()
        self.nbytes = 0


class NoHistory:
    """Words are dropped, and counted: for passes that never walk back. Nothing can be popped."""

    def __init__(self) -> None:
        self.nbytes = 0

    def push(self, words: Tensor) -> None:
        self.nbytes += words.nbytes

    def pop(self) -> Tensor:
        raise LookupError("this history keeps nothing")

    def clear(self) -> None:
        self.nbytes = 0


def check_place(place: str | os.PathLike[str]) -> None:
    """Raise where `history=` names no usable place (TypeError, ValueError)."""
    if not isinstance(place, (str, os.PathLike)):
        raise TypeError(f'history must be "device", "host" or a path, got {type(place).__name__}')
    if place in ("device", "host"):
        return
    path = Path(place)
    if not (path.is_dir() or path.parent.is_dir()):
        raise ValueError(f'history must be "device", "host" or a path in an existing folder, got {str(place)!r}')


def open_history(place: str | os.PathLike[str], device: torch.device) -> History:
    """The history that `history=` names."""
    if place == "device":
        return DeviceHistory()
    if place == "host":
        return HostHistory(device)
    return FileHistory(Path(place), device)
