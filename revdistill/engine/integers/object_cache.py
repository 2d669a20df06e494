"""Machine code that is kept for later processes of the same user, in files that nobody else can have written.

A file is a checksum and what it is of. One that is damaged, or that others could write, is as good as none; so is a
folder that cannot be made or written.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_DIGEST = 32  # bytes of SHA-256
_MOST = 2**24  # bytes; a loop has some thousand
_WRITTEN_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def read(name: str) -> bytes | None:
    """What `write` was given for this name in an earlier process, or None."""
    for folder in _folders():
        with suppress(OSError):
            found = _read(folder, name)
            if found is not None:
                return found
    return None


def write(name: str, content: bytes) -> bool:
    """Keep the content in the first folder that takes it; whether one did. Other processes see it whole or not."""
    for folder in _folders():
        with suppress(OSError):
            _made(folder)
            if not _is_ours(folder.stat(follow_symlinks=False)):
                continue
            handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
            try:
                with open(handle, "wb") as file:
                    file.write(_checksum(name, content) + content)
                os.replace(temporary, folder / name)
            except BaseException:
                os.unlink(temporary)
                raise
            return True
    return False


def _folders() -> Iterator[Path]:
    """The user's cache, then beside this package; none on a system whose files have no owner."""
    if not hasattr(os, "geteuid"):
        return
    given = os.environ.get("XDG_CACHE_HOME", "")
    with suppress(RuntimeError):  # there is no home
        yield (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "revdistill" / "loops"
    yield Path(__file__).with_name("__pycache__") / "loops"


def _made(folder: Path) -> None:
    """Make the folder in what is the user's own: nothing of root's in the home of a user who has called sudo."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if there != folder and there.stat().st_uid == os.geteuid():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _read(folder: Path, name: str) -> bytes | None:
    # By the folder that was looked at, and no link: what is read is what was looked at, whatever is renamed meanwhile.
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not _is_ours(os.fstat(at)):
            return None
        with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=at), "rb") as file:
            looked = os.fstat(file.fileno())
            if not (stat.S_ISREG(looked.st_mode) and _is_ours(looked)):
                return None
            text = file.read(_MOST)
    finally:
        os.close(at)
    digest, content = text[:_DIGEST], text[_DIGEST:]
    return content if digest == _checksum(name, content) else None


def _is_ours(looked: os.stat_result) -> bool:
    """Whether the user, or root, owns it and nobody else can write it."""
    return looked.st_uid in (os.geteuid(), 0) and not looked.st_mode & _WRITTEN_BY_OTHERS


def _checksum(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()
