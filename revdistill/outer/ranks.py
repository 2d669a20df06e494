"""The processes of one command, as torchrun starts them: work is shared out, with the same bits however many they are.

Work comes in units, whose number and sizes depend on the configuration alone. They go to the processes in turn, and
their results to all of them, in the order of units. What is exchanged goes through meetings (`Ranks.meet`), so that
what ends one process ends all of them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from revdistill.engine import NonFiniteError, RangeError, RankError
from revdistill.engine.ranks.group import KINDS, Ranks

# A process that ends closes its connections, which the others see at once. This is for one that is silent, and longer
# than any unit of work: the others wait as long as the longest one takes.
TIMEOUT = timedelta(hours=2)
_LOOK = 0.5  # seconds in which a process that closed its connections has ended
_FAILURES: dict[str, Any] = {kind.__name__: kind for kind in (RangeError, NonFiniteError)}
_SEPARATE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of the environment
_CPU = torch.device("cpu")
T = TypeVar("T")


class StoppedError(Exception):
    """All processes have stopped within a unit of work, as one of them was told to; nothing of it is kept."""


@dataclass(frozen=True)
class _Process:
    machine: str
    pid: int

    def has_ended(self) -> bool:
        """As far as this machine can tell."""
        if self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except ProcessLookupError:
            return True
        except OSError:  # no /proc here
            return False
        return state in "ZX"


class Processes:
    """This process and those that share its work; alone, if there are none.

    Args:
        ranks: the group, whose tensors are the CPU's; None alone.

    Attributes:
        rank, size: this process's number, and how many there are.
        started: whether torchrun has started them, were it only one.
        first: whether this is the one that writes files, prints, and shows progress.
        computing: whether this one is within a unit of work, which may take long and leaves nothing behind when it is
            interrupted.
        lost: whether another process is gone, so that nothing can be told any more.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._ranks = ranks
        self.rank, self.size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        self.started, self.first = ranks is not None, self.rank == 0
        self.computing = self.lost = False
        self._known: list[_Process] = []
        if ranks is not None:
            self._meet("the arguments")
            self._known = [_Process(**json.loads(text)) for text in ranks.texts(json.dumps(vars(_myself())))]

    def share(
        self,
        lengths: Sequence[int],
        make: Callable[[int], Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device = _CPU,
    ) -> list[Tensor]:
        """The results of some units of work, in their order.

        Args:
            lengths: of each unit's result.
            make: a unit's number -> its result [length]. It is called for this process's units, in their order.
            dtype: of the results.
            device: of the results.

        Returns:
            The results, the same on all processes.

        Raises:
            RangeError, NonFiniteError: that of the first unit, in their order, that has one: on all processes the same.
            StoppedError: a process was told to stop meanwhile.
            RankError: a process is gone.
        """
        if self._ranks is None:
            return [make(i) for i in range(len(lengths))]
        each = [lengths[r :: self.size] for r in range(self.size)]
        row = torch.zeros(max(map(sum, each)), dtype=dtype)
        failed: tuple[int, Exception] | None = None
        unit, done = self.rank, 0
        with self._computing() as interrupted:
            try:
                for unit in range(self.rank, len(lengths), self.size):
                    row[done : done + lengths[unit]] = make(unit)
                    done += lengths[unit]
            except tuple(_FAILURES.values()) as error:
                failed = unit, error
        verdicts = self._meet("a share of the work", float(interrupted()), -1.0 if failed is None else failed[0])
        if bool(verdicts[:, 0].any()):
            raise StoppedError
        if bool((verdicts[:, 1] >= 0).any()):
            self._raise_first(failed)
        with self._answered():
            rows = self._ranks.gather(row)
        pieces = [iter(torch.split(found[: sum(n)], list(n))) for found, n in zip(rows, each, strict=True)]
        return [next(pieces[i % self.size]).to(device) for i in range(len(lengths))]

    def alike(self, make: Callable[[], T]) -> T:
        """What each process makes for itself, and all of them the same.

        Raises:
            StoppedError: a process was told to stop meanwhile.
            RankError: a process is gone.
        """
        if self._ranks is None:
            return make()
        found: list[T] = []
        with self._computing() as interrupted:
            found.append(make())
        if bool(self._meet("a share of the work", float(interrupted()), -1.0)[:, 0].any()):
            raise StoppedError
        return found[0]

    def agree(self, signum: int | None, step: int, fingerprint: int) -> int | None:
        """Meet between two steps.

        Args:
            signum: of the signal that this process was told to stop by.
            step: how many steps are done.
            fingerprint: below 2^53, of what all processes must have alike.

        Returns:
            The signal that any of them was told to stop by.

        Raises:
            RankError: the processes have not the same; or one is gone.
        """
        if self._ranks is None:
            return signum
        told = self._meet("the outer loop", float(signum or 0), float(step), float(fingerprint))
        heard = [int(n) for n in told[:, 0] if n]
        if heard:
            return heard[0]
        other = (told[:, 1:] != told[0, 1:]).any(1).nonzero().flatten().tolist()
        if other:
            raise RankError(
                f"rank {other[0]} has not what rank 0 has after step {int(told[0, 1])}; all processes must start from "
                "the same files, and compute alike: the same release of torch, the same number of threads and the same "
                "kind of processor (or GPU)",
                rank=other[0],
            )
        return None

    def told(self, text: str) -> str:
        """The first one's text, on all of them."""
        return self.texts(text)[0]

    def texts(self, text: str) -> list[str]:
        """Every process's text."""
        if self._ranks is None:
            return [text]
        self._meet("the arguments")
        with self._answered():
            return self._ranks.texts(text)

    @contextmanager
    def together(self) -> Iterator[None]:
        """The context of all that they do together: what one of them fails with, all of them do, the process named.

        They leave it at the same time.

        Raises:
            As `Ranks.meet`.
        """
        if self._ranks is None:
            yield
            return
        with self._answered(), self._ranks.together():
            yield
            self._meet("the end of the command")

    def wait(self) -> None:
        """Until all are here, unless one is gone: torchrun ends the others as soon as one of them has failed."""
        if self._ranks is not None and not self.lost:
            with suppress(RankError):
                self._meet("the end of the command")

    @property
    def speaks(self) -> bool:
        """Whether this process tells the user how it ended: where the first one is gone, that is the next one."""
        if not self.lost:
            return self.first
        return all(other.has_ended() for other in self._known[: self.rank] if other.machine == _machine())

    def one_is_gone(self) -> bool:
        """Whether another process on this machine has ended."""
        return any(other.has_ended() for other in self._known)

    def _meet(self, point: str, *numbers: float) -> Tensor:
        assert self._ranks is not None
        with self._answered():
            return self._ranks.meet(point, -1, *numbers)

    @contextmanager
    def _computing(self) -> Iterator[Callable[[], bool]]:
        """Where signals interrupt; tells afterwards whether one did."""
        interrupted = False
        try:
            self.computing = True
            yield lambda: interrupted
        except KeyboardInterrupt:
            if self.one_is_gone():
                self._raise_lost(None)
            interrupted = True
        finally:
            self.computing = False

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RankError as error:
            if error.rank is None and not self.lost:
                self._raise_lost(error)
            raise

    def _raise_lost(self, error: RankError | None) -> NoReturn:
        self.lost = True
        until = time.monotonic() + _LOOK
        while not self.one_is_gone() and time.monotonic() < until:
            time.sleep(0.01)
        gone = [(r, other.pid) for r, other in enumerate(self._known) if other.has_ended()]
        if not gone and error is not None:
            raise error
        rank, pid = gone[0]
        raise RankError(
            f"rank {rank} of {self.size} is gone (its process, {pid}, has ended), and the others cannot go on without "
            "it",
            rank=rank,
        ) from error

    def _raise_first(self, failed: tuple[int, Exception] | None) -> NoReturn:
        """What the first unit that failed, in their order, failed with: no process is named, as any may have had it."""
        assert self._ranks is not None
        own = {} if failed is None else {"unit": failed[0], "kind": type(failed[1]).__name__, "text": str(failed[1])}
        with self._answered():
            texts = self._ranks.texts(json.dumps(own | {"values": vars(failed[1])}) if failed else "")
        first = min((json.loads(text) for text in texts if text), key=lambda told: told["unit"])
        raise _FAILURES[first["kind"]](first["text"], **first["values"]) from (failed[1] if failed else None)


ALONE = Processes()


def by_torchrun() -> bool:
    """Whether torchrun, or what sets the same environment, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def started(kinds: Sequence[type[Exception]] = ()) -> Iterator[Processes]:
    """The context of a command that torchrun may have started in several processes; without that it is alone.

    Args:
        kinds: of errors that all processes raise as what they are on one, beside those of `Ranks`.

    Raises:
        ValueError: the environment is not one of torchrun's.
        RankError: the other processes cannot be reached.
    """
    if not by_torchrun():
        yield ALONE
        return
    missing = [name for name in _SEPARATE if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"RANK and WORLD_SIZE are in the environment, as torchrun sets them, but not {' and '.join(missing)}; "
            "start the command by torchrun, or take them out of the environment"
        )
    try:
        # Gloo on GPUs too: a few megabytes a step are exchanged, and where a process is gone it says so at once; NCCL
        # waits, and then ends the process that waits.
        dist.init_process_group("gloo", timeout=TIMEOUT)
        assert dist.group.WORLD is not None
        processes = Processes(Ranks(dist.group.WORLD, _CPU, (*KINDS, StoppedError, *kinds)))
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise RankError(f"the other processes cannot be reached at {where} ({reason[:200]})", rank=None) from error
    _end_by_itself(processes)
    try:
        yield processes
    finally:
        with suppress(ValueError):  # an interpreter that ends takes back handlers, but not this
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not processes.lost:
        dist.destroy_process_group()


def _end_by_itself(processes: Processes) -> None:
    """Once a process has ended, torchrun sends SIGTERM to the others: these end by themselves, and say why."""

    def ended(signum: int, frame: Any) -> None:
        if not processes.one_is_gone():
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif processes.computing:
            raise KeyboardInterrupt

    with suppress(ValueError):  # not in the main thread: whoever runs us handles signals
        signal.signal(signal.SIGTERM, ended)


def _myself() -> _Process:
    return _Process(_machine(), os.getpid())


def _machine() -> str:
    """This machine, and what of it shares one agent of torchrun and so one list of processes."""
    return f"{socket.gethostname()} {os.environ.get('GROUP_RANK', '')}"
