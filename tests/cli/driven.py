"""Started by torchrun: several commands one after another in the same processes, as a start takes seconds.

driven.py JOBS RESULTS: JOBS is JSON, a list of {"arguments", "port", "rank", "step", "event"}: at that outer step that
rank has the event. RESULTS/RANK.json has of each command its exit code, what was printed, and how long it took.
"""

from __future__ import annotations

import errno
import faulthandler
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from revdistill.cli import main as command
from revdistill.cli import train as train_command

from revdistill.distill import checkpoint
from revdistill.distill.distiller import Distiller

RANK = int(os.environ["RANK"])


def fail(error: BaseException) -> Callable[..., None]:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    return failing


EVENTS: dict[str, Callable[..., None]] = {
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "memory": fail(MemoryError("no memory")),
    "bug": fail(KeyError("nobody thought of this")),
    "drift": lambda: None,
}


@contextmanager
def happening(job: dict[str, Any]) -> Any:
    """What happens on this rank during the command."""
    event = job.get("event")
    if event is None or job["rank"] != RANK:
        yield
    elif event == "no data":
        with mock.patch.object(train_command, "load", fail(ValueError("no such file"))):
            yield
    elif event == "full disk":
        with mock.patch.object(checkpoint, "save", saving(job["step"])), mock.patch("tempfile.mkdtemp", full):
            yield
    else:
        with mock.patch.object(Distiller, "step", stepping(job["step"], event)):
            yield


def stepping(at: int, event: str) -> Any:
    step = Distiller.step

    def made(self: Distiller) -> Any:
        if self.outer_step == at:
            EVENTS[event]()
        found = step(self)
        if event == "drift" and self.outer_step == at:
            self.synthetic.x.data += 1e-6
        return found

    return made


def saving(at: int) -> Any:
    save = checkpoint.save

    def saved(path: Path, distiller: Distiller) -> None:
        if distiller.outer_step >= at:
            full()
        save(path, distiller)

    return saved


def full(**_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def main() -> None:
    faulthandler.dump_traceback_later(150, exit=True)  # who hangs says where
    jobs, results = json.loads(Path(sys.argv[1]).read_text()), []
    for job in jobs:
        # each command's group has a store of its own
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(job["port"])}
        out, err, started = io.StringIO(), io.StringIO(), time.monotonic()
        with happening(job), redirect_stdout(out), redirect_stderr(err):
            try:
                code: Any = command.run(job["arguments"])
            except Exception as error:  # a traceback, for the user
                code = repr(error)
        seconds = time.monotonic() - started
        results.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": seconds})
    (Path(sys.argv[2]) / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
