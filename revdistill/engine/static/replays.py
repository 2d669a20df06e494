"""Replaying work on static memory: on CUDA as one graph of kernels, anywhere else by calling the function again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

WARM_UP = 2  # calls before a capture: libraries make their handles and load their kernels then, which a capture forbids

Body = Callable[[], object]


class Replay(ABC):
    """Work on static memory that can be done again and again.

    captured: whether the functions of Python behind it are called no more; nbytes: memory that it keeps for what is
    made within.
    """

    captured: bool
    nbytes: int = 0

    @abstractmethod
    def __call__(self) -> None:
        """Do it once."""


class Called(Replay):
    """The function itself, called each time."""

    captured = False

    def __init__(self, body: Body) -> None:
        self._body = body

    def __call__(self) -> None:
        self._body()


class CudaGraph(Replay):
    """The kernels that one call launched, launched again at once.

    Args:
        body: waits for nothing, and reads and writes memory that stays where it is.
        warm_up: calls body, and puts everything back that it changed.
        device: on which it computes.
        pool: of the memory that is made within, shared with other graphs that are not replayed at the same time.

    Raises:
        RuntimeError: what torch says of work that cannot be captured.
    """

    captured = True

    def __init__(self, body: Body, warm_up: Callable[[Body], None], device: torch.device, pool: Any) -> None:
        cuda: Any = torch.cuda
        with cuda.device(device):  # a stream is one device's, and the current device's by default
            self._graph = cuda.CUDAGraph()
            self._capture(body, warm_up, pool)

    def _capture(self, body: Body, warm_up: Callable[[Body], None], pool: Any) -> None:
        cuda: Any = torch.cuda
        side = cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with cuda.stream(side):
            for _ in range(WARM_UP):
                warm_up(body)
        torch.cuda.current_stream().wait_stream(side)
        before = torch.cuda.current_stream()
        try:
            # Other threads of the process may do with the device what they like meanwhile.
            with cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                reserved = cuda.memory_reserved()
                body()
                self.nbytes = cuda.memory_reserved() - reserved
        except BaseException:
            _tidy_up(before, pool)
            raise

    def __call__(self) -> None:
        self._graph.replay()


def _tidy_up(stream: Any, pool: Any) -> None:
    """What torch leaves where a capture fails: its stream, its allocator and its generator still in the capture.

    Args:
        stream: the current one before it.
        pool: that the capture had.
    """
    cuda: Any = torch.cuda
    cuda.set_stream(stream)
    device = stream.device.index
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        with suppress(RuntimeError):  # it had ended
            end(device, pool)
    generator = cuda.default_generators[device]
    if hasattr(generator, "graphsafe_set_state"):
        generator.graphsafe_set_state(generator.clone_state())  # a copy is in no capture
    torch.cuda.synchronize()


def pool_of(device: torch.device) -> Any:
    """Memory that graphs can share; None where there are none."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return torch.cuda.graph_pool_handle()


def stream_of(device: torch.device) -> int:
    """The number of the stream on which a device's work is queued now; 0 where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def replay_of(body: Body, warm_up: Callable[[Body], None], device: torch.device, pool: Any) -> Replay:
    """body, to be done again and again; it is not done yet. See `CudaGraph`."""
    return CudaGraph(body, warm_up, device, pool) if device.type == "cuda" else Called(body)
