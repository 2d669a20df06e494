"""Processes of a group, as torchrun starts them; and a group of this process alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[1]


@contextmanager
def launched(processes: int, *command: str, cwd: Path = ROOT) -> Iterator[subprocess.Popen[str]]:
    """Some processes of one thread each that run a script, or a module after -m; ended in any case, with all that they
    have started.
    """
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command],
        cwd=cwd,
        env=os.environ | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in [*ranks_of(process).values(), process.pid]:  # torchrun gives each rank a session of its own
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        process.communicate()


def torchrun(
    processes: int, command: Sequence[str], *, cwd: Path, timeout: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """The same, once they have ended."""
    with launched(processes, *command, cwd=cwd) as process:
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """rank -> pid"""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                variables = (folder / "environ").read_bytes().split(b"\0") if parent == str(process.pid) else []
            except OSError:
                continue
            found |= {int(v[5:]): int(folder.name) for v in variables if v.startswith(b"RANK=")}
    return found


@contextmanager
def group_of_one(folder: Path) -> Iterator[dist.ProcessGroup]:
    """Within this process."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
