"""Files that are whole or not there: each is written under a temporary name, flushed to the disk, and renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SUFFIX = ".tmp"


def _prefix(path: Path) -> str:
    return f".{path.name}."


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`: it replaces `path` at the end of the block, or is deleted after an error.

    Raises:
        OSError: it cannot be written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=_SUFFIX)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private; a result is as open as any other new file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Delete the temporary files of `path` that killed processes have left behind.

    Only while no other process can be writing `path`: its temporary file would be deleted too.
    """
    for leftover in path.parent.glob(f"{_prefix(path)}*{_SUFFIX}"):
        leftover.unlink(missing_ok=True)
