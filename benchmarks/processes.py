"""Processes of a group, each with some threads, that answer requests: started here, and ended in any case.

They are what torchrun would start, without its agent, so that several groups can wait for their turn.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

WORKER = Path(__file__).with_name("scale_worker.py")
_START = 120.0  # seconds in which processes have started


class FailedError(Exception):
    """A process failed, is gone, or did not answer in time; says what."""


class Group:
    """`with Group(2, threads=1) as group: group.ask(60, do="train", ...)`

    Args:
        size: how many processes; one alone has no group.
        threads: of each.
        environment: variables beside the usual ones.
    """

    def __init__(self, size: int, threads: int, **environment: str) -> None:
        self.size, self.threads = size, threads
        self._folder = tempfile.TemporaryDirectory()
        self._processes: list[subprocess.Popen[str]] = []
        self._lines: list[queue.Queue[str]] = []
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **environment}
        for rank in range(size):
            command = [sys.executable, str(WORKER), str(rank), str(size), str(threads), f"{self._folder.name}/store"]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            lines: queue.Queue[str] = queue.Queue()
            assert process.stdout is not None
            threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
            self._processes.append(process)
            self._lines.append(lines)

    def __enter__(self) -> Group:
        try:
            self._answers(_START)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, seconds: float, **request: Any) -> list[dict[str, Any]]:
        """Each rank's answer.

        Raises:
            FailedError: one has none, or there was none in so many seconds; the processes are ended then.
        """
        if not self._processes:
            raise FailedError("the processes were ended after an earlier failure")
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            return self._answers(seconds)
        except (FailedError, OSError) as error:
            self.close()
            raise FailedError(str(error)) from error

    def _answers(self, seconds: float) -> list[dict[str, Any]]:
        until, found = time.monotonic() + seconds, []
        for rank, lines in enumerate(self._lines):
            try:
                line = lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise FailedError(f"rank {rank} of {self.size} did not answer within {seconds:.0f} s") from None
            answer = json.loads(line) if line else {"error": "the process ended"}
            if "error" in answer:
                raise FailedError(f"rank {rank} of {self.size}: {answer['error']}")
            found.append(answer)
        return found

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    _shut(stream)
        self._processes.clear()
        self._folder.cleanup()


def _shut(stream: IO[str]) -> None:
    try:
        stream.close()
    except OSError:  # a request was never read
        return


def _read(stream: IO[str], lines: queue.Queue[str]) -> None:
    """Every line, and an empty one at the end."""
    try:
        for line in stream:
            lines.put(line)
    except ValueError:  # closed meanwhile
        pass
    lines.put("")
