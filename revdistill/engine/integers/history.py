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


class HostHistory:
    """Words go to host memory, pinned when they come from a CUDA device.

    It is taken in blocks with room for several pushes: to pin memory takes longer than to copy into it, and waits for
    the device.
    """

    PUSHES = 8  # that a block has room for
    LARGEST = 2**28  # bytes of a block, where one push fits
    _ALIGNED = 8  # bytes: of the widest words

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[Tensor] = []
        self._filled = 0  # bytes of the last block
        self._stack: list[tuple[Tensor, int, int]] = []  # the words, their block's number, and where in it they begin
        self.nbytes = 0

    def push(self, words: Tensor) -> None:
        size = -(-words.nbytes // self._ALIGNED) * self._ALIGNED
        if not self._blocks or self._filled + size > len(self._blocks[-1]):
            room = max(size, min(self.PUSHES * size, self.LARGEST))
            room = 1 << (room - 1).bit_length()  # as much as torch's allocator of pinned memory takes anyway
            self._blocks.append(torch.empty(room, dtype=torch.uint8, pin_memory=self._device.type == "cuda"))
            self._filled = 0
        kept = self._blocks[-1][self._filled : self._filled + words.nbytes].view(words.dtype).view(words.shape)
        # Stream order makes this safe: pop copies back on the same stream, after this copy.
        self._stack.append((kept.copy_(words, non_blocking=True), len(self._blocks) - 1, self._filled))
        self._filled += size
        self.nbytes += words.nbytes

    def pop(self) -> Tensor:
        words, block, self._filled = self._stack.pop()
        del self._blocks[block + 1 :]
        self.nbytes -= words.nbytes
        return words.to(self._device, non_blocking=True, copy=True)

    def clear(self) -> None:
        self._stack.clear()
        self._blocks.clear()
        self._filled = self.nbytes = 0


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
