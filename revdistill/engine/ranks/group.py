"""The processes of a torch.distributed group: meetings, sums of the same bits whatever the order, errors for all.

One rank's error must not leave the others waiting. So before every exchange of tensors the ranks meet: each gives the
point where it is and a few numbers, always as many. A rank that fails comes to the next meeting all the same, says so,
and all of them raise its error. Ranks that meet at different points say so too, instead of adding what does not belong
together.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from revdistill.engine import errors
from revdistill.engine.errors import RankError, RevdistillError, UnsupportedError
from revdistill.engine.ranks.borrowed import Borrowed

# Where ranks meet, in words for messages.
POINTS = (
    "the seed",
    "the arguments",
    "a comparison of theta",
    "theta in parts",
    "a gradient",
    "a norm",
    "the end of the forward pass",
    "the start of the backward pass",
    "a vector in parts",
    "a product of second derivatives",
    "the sums at the start of the training",
    "the end of the backward pass",
    "on_step",
    "an exchange inside the loss",
    "a number that all agree on",
    "the outer loop",
    "a share of the work",
    "the end of the command",
)
WIDTH = 6  # numbers that each rank gives at a meeting
_FINE, _FAILED = 0.0, 1.0
AT_ONCE = 2**18  # numbers of what is exchanged at once: larger pieces stay with the process when they are freed
_FEW = 2**12  # numbers up to which sending all to all costs less than another exchange
KINDS = (ValueError, TypeError, RuntimeError, OSError, MemoryError)  # of errors that are told as what they are
_shared: weakref.WeakValueDictionary[tuple[int, torch.device], Ranks] = weakref.WeakValueDictionary()
OWN = tuple(kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RevdistillError))


class Ranks:
    """The processes of a group, as one of them sees them.

    Args:
        group: of torch.distributed.
        device: of the tensors that are exchanged.
        kinds: of errors that are raised on all ranks as what they were on one; their first argument is the message, and
            the others, by name, are in what vars() finds. Of other kinds a RankError is raised.

    Attributes:
        rank, size: this process's number in the group, and how many there are.
        sent: bytes of tensors that this rank has sent to others, as far as a ring or a direct exchange needs them.

    Raises:
        ValueError: this process is not in the group, or the group cannot exchange tensors of this device.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, kinds: Sequence[type[Exception]] = KINDS
    ) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                "group does not have this process in it; call rd.unroll on the processes of the group only"
            )
        try:
            group._get_backend(device)
        except RuntimeError as error:
            raise ValueError(
                f"group has no backend for tensors on {device.type}; give init_process_group the backend "
                f"{'nccl' if device.type == 'cuda' else 'gloo'}, or put params where the group's backend is"
            ) from error
        self._borrowed, self._device = Borrowed(group), device
        self._kinds: dict[str, Any] = {kind.__name__: kind for kind in (*OWN, *kinds)}
        self._known: BaseException | None = None  # an error that all ranks have
        self.sent = 0

    @classmethod
    def of(cls, group: Any, device: torch.device) -> Ranks:
        """One object for all that goes on at a time: what fails within a loss fails within its unroll.

        Raises:
            TypeError: group is no group.
            ValueError: see above.
        """
        if not hasattr(group, "_get_backend"):
            raise TypeError(
                f"group must be a torch.distributed ProcessGroup or None, got {type(group).__name__}; "
                "torch.distributed.group.WORLD is that of all processes, once init_process_group was called"
            )
        found = _shared.get((id(group), device))
        if found is None or not found._borrowed.is_of(group):  # ids are given again
            found = _shared[id(group), device] = cls(group, device)
        return found

    def meet(self, point: str, k: int = -1, *numbers: float) -> Tensor:
        """Wait for all ranks.

        Args:
            point: where this one is, one of POINTS.
            k: the step that it is at, -1 for none.
            numbers: to be given to the others, at most WIDTH; what is left is 0.

        Returns:
            float64 [ranks, WIDTH] on the CPU: the numbers of each.

        Raises:
            RankError: another rank failed, or is gone.
            RevdistillError, ValueError, TypeError: that another rank failed with.
            UnsupportedError: the ranks are not at the same point.
        """
        return self._meet(_FINE, float(POINTS.index(point)), float(k), numbers)

    def agree(self, point: str, k: int, value: float, of: Callable[[list[float]], float]) -> float:
        """What `of` (min, max) makes of the ranks' values."""
        return of(self.meet(point, k, value)[:, 0].tolist())

    def texts(self, text: str) -> list[str]:
        """Every rank's text, in their order. All ranks call this at the same point, which they have met at."""
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.zeros(0).byte()
        lengths = [int(n) for n in self.gather(torch.tensor([len(data)], device=self._device))[:, 0]]
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8, device=self._device)
        padded[: len(data)] = data.to(self._device)
        rows = self.gather(padded).cpu().numpy()
        return [row[:n].tobytes().decode() for row, n in zip(rows, lengths, strict=True)]

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x [n], of one shape and dtype: [ranks, n]."""
        out = torch.empty(self.size * x.numel(), dtype=x.dtype, device=x.device)
        with self._answered():
            _all_gather(out, x.contiguous().detach(), self._borrowed.get())
        self.sent += (self.size - 1) * x.nbytes
        return out.view(self.size, *x.shape)

    def sum_of_integers(self, q: Tensor) -> None:
        """Of int64 tensors [n], in place: the same whatever the order, and on all ranks."""
        with self._answered():
            dist.all_reduce(q, group=self._borrowed.get())
        self.sent += 2 * (self.size - 1) * q.nbytes // self.size

    def sum_in_order(self, x: Tensor) -> Tensor:
        """The sum over ranks, from the first to the last: the same bits on all of them. x: floats of any shape."""
        flat = x.contiguous().view(-1)
        if flat.numel() <= _FEW:
            return summed(self.gather(flat)).view(x.shape)
        out = torch.empty_like(flat)
        for piece, found in zip(torch.split(flat, AT_ONCE), torch.split(out, AT_ONCE), strict=True):
            each = -(-piece.numel() // self.size)
            padded = piece.new_zeros(self.size * each)
            padded[: piece.numel()] = piece
            found.copy_(self.gather(summed(self.to_each(padded.view(self.size, each)))).view(-1)[: piece.numel()])
        return out.view(x.shape)

    def to_each(self, x: Tensor) -> Tensor:
        """x [ranks, n], a row for each rank: [ranks, n] from each rank what was for this one."""
        out = torch.empty_like(x)
        with self._answered():
            dist.all_to_all_single(out, x.contiguous(), group=self._borrowed.get())
        self.sent += (self.size - 1) * x.nbytes // self.size
        return out

    def first(self, x: Tensor) -> Tensor:
        """Rank 0's x, of one shape and dtype on all ranks, in a new tensor."""
        out = x.contiguous().clone()
        with self._answered():
            dist.broadcast(out, group=self._borrowed.get(), group_src=0)
        self.sent += x.nbytes if self.rank == 0 else 0
        return out

    def for_all(self, error: Exception) -> Exception:
        """The error, which all ranks raise here by themselves."""
        self._known = error
        return error

    @contextmanager
    def together(self) -> Iterator[None]:
        """The context of code in which all ranks go the same way: where one of them fails, all raise its error.

        Raises:
            As `meet`.
        """
        self._known = None  # an error of before, in whose handling this may be, is not this one's
        try:
            yield
        except Exception as error:
            if self._is_known(error):
                raise
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        """Tell all ranks, and raise what they raise."""
        try:
            self._meet(_FAILED, -1.0, -1.0, (), error)
        except Exception as found:
            if found is error:
                raise
            raise found from error
        raise AssertionError("unreachable")

    def _meet(
        self, status: float, point: float, k: float, numbers: Sequence[float], error: Exception | None = None
    ) -> Tensor:
        row = [status, point, k, *numbers] + [0.0] * (WIDTH - len(numbers))
        rows = self.gather(torch.tensor(row, dtype=torch.float64, device=self._device)).cpu()
        if bool(rows[:, 0].any()):
            self._raise_for_all(error)
        if bool((rows[:, 1:3] != rows[0, 1:3]).any()):
            raise self.for_all(UnsupportedError(_apart(rows[:, 1].tolist(), rows[:, 2].tolist())))
        return rows[:, 3:]

    def _raise_for_all(self, own: Exception | None) -> NoReturn:
        told = [json.loads(text) if text else None for text in self.texts("" if own is None else _told(own))]
        if own is not None and all(other == json.loads(_told(own)) for other in told):
            raise self.for_all(own)  # everywhere the same: no rank is to be named
        raise self.for_all(next(self._error_of(r, other) for r, other in enumerate(told) if other is not None))

    def _error_of(self, rank: int, told: dict[str, Any]) -> Exception:
        """The error of another rank, which it names."""
        kind = self._kinds.get(told["kind"])
        if kind is not None:
            with suppress(TypeError):
                found: Exception = kind(f"on rank {rank}: {told['message']}", **told["values"])
                return found
        return RankError(f"rank {rank} failed: {told['kind']}: {told['message']}", rank=rank)

    def _is_known(self, error: BaseException | None) -> bool:
        """Whether all ranks have the error, or the one that it was made of."""
        while error is not None and error is not self._known:
            error = error.__cause__ or error.__context__
        return error is not None

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # DistBackendError and its kind among them
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            lost = RankError(
                f"another process of the group is gone, or did not answer in time; rank {self.rank} of {self.size} "
                f"cannot go on without it: start all of them again ({reason[:200]})",
                rank=None,
            )
            raise self.for_all(lost) from error  # there is nobody to be told


def together(ranks: Ranks | None) -> AbstractContextManager[None]:
    """What `Ranks.together` is; nothing where there is one process."""
    return nullcontext() if ranks is None else ranks.together()


def _all_gather(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    """Under the name that this torch has for it."""
    call: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(out, x, group=group)


def summed(rows: Tensor) -> Tensor:
    """[ranks, n] -> [n], in order."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def _told(error: Exception) -> str:
    """An error as JSON."""
    plain = {name: v for name, v in vars(error).items() if v is None or isinstance(v, (bool, int, float, str))}
    return json.dumps({"kind": type(error).__name__, "message": str(error), "values": plain})


def _apart(points: list[float], steps: list[float]) -> str:
    words = [
        POINTS[int(point)] + (f" at step {int(k)}" if k >= 0 else "") for point, k in zip(points, steps, strict=True)
    ]
    other = next(r for r, word in enumerate(words) if word != words[0])
    return (
        f"the ranks of the group are not at the same point: rank 0 is at {words[0]}, rank {other} at {words[other]}. "
        "Every rank must call rd.unroll, and go back through it, as often and in the same order, with the same steps, "
        "adjoint, window, save_at and callbacks"
    )
