"""What surrounds every call of the loss, made the same on the way forward and on the way back.

Random numbers (seeded from (seed, step)), autocast, the number of threads, deterministic kernels, TensorFloat-32 off, and
the attention kernel that has second derivatives. All of it is restored afterwards.

torch keeps most of this for the whole process, so the unrolls of several threads take turns (`_TURN`), and a setting that one of
them made stays until the last of them has left (`_ProcessWide`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_CUBLAS_VARIABLE, _CUBLAS_SETTING = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
# Held by the thread that is in a passage. Re-entrant: a loss may hold an unroll of its own.
_TURN = threading.RLock()


def _forked() -> None:
    """A child process has none of the other threads, and must not wait for them."""
    global _TURN
    if _TURN.acquire(blocking=False):
        _TURN.release()  # nobody's, or that of the very thread that lives on here
    else:
        _TURN = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def draw_seed() -> int:
    """A seed from torch's default generator: two unrolls in a row differ, and torch.manual_seed repeats both."""
    return int(torch.randint(0, 2**62, ()).item())


@contextmanager
def _turn() -> Iterator[None]:
    _TURN.acquire()
    try:
        yield
    finally:
        _TURN.release()  # by its name: a child process may have another


@dataclass(frozen=True)
class Ambient:
    """seed: of this unroll; the rest is what the caller of the forward pass had set."""

    device: torch.device
    seed: int
    threads: int
    autocast: bool
    autocast_dtype: torch.dtype
    _callers: list[Tensor] = field(default_factory=list, compare=False, repr=False)  # its generators' states, during a passage

    @classmethod
    def capture(cls, device: torch.device, seed: int) -> Ambient:
        kind = device.type
        return cls(device, seed, torch.get_num_threads(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    @contextmanager
    def passage(self) -> Iterator[None]:
        """Around a whole pass, forward or back. One thread at a time; the others wait."""
        with ExitStack() as stack:
            stack.enter_context(_turn())
            stack.enter_context(_threads(self.threads))
            for setting in self._process_wide():
                stack.enter_context(setting.held())
            # Without its cache, which would keep casts of theta from one step to the next.
            stack.enter_context(
                torch.autocast(self.device.type, enabled=self.autocast, dtype=self.autocast_dtype, cache_enabled=False)
            )
            stack.enter_context(self._own_generators())
            yield

    @contextmanager
    def step(self, k: int) -> Iterator[None]:
        """Around one evaluation of the loss and its derivatives, in a passage: the same random numbers in both directions."""
        # Weyl sequence: distinct for distinct steps, far apart for neighbouring ones.
        seed = (self.seed + k * 0x1E3779B97F4A7C15) % 2**63
        for generator in self._generators():
            generator.manual_seed(seed)
        with torch.enable_grad():
            yield

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Around a call of the user's for a batch, in a passage: with the random numbers that it would have drawn outside.

        Other threads may take their turn meanwhile, so that the user's code may wait for them.
        """
        generators = self._generators()
        for generator, state in zip(generators, self._callers, strict=True):
            generator.set_state(state)
        _TURN.release()
        try:
            yield
        finally:
            _TURN.acquire()
            self._callers[:] = [generator.get_state() for generator in generators]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a call of the user's that gives nothing back, in a passage: as `outside`, with torch's settings as they were."""
        with ExitStack() as stack:
            for setting in self._process_wide():
                stack.enter_context(setting.let_go())
            stack.enter_context(self.outside())
            yield

    def _process_wide(self) -> tuple[_ProcessWide, ...]:
        return (_REPEATABLE, _REPEATABLE_CUDA) if self.device.type == "cuda" else (_REPEATABLE,)

    @contextmanager
    def _own_generators(self) -> Iterator[None]:
        """The caller's random numbers are put back afterwards."""
        generators = self._generators()
        self._callers[:] = [generator.get_state() for generator in generators]
        try:
            yield
        finally:
            for generator, state in zip(generators, self._callers, strict=True):
                generator.set_state(state)

    def _generators(self) -> list[torch.Generator]:
        generators = [torch.default_generator]
        if self.device.type == "cuda":
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            generators.append(torch.cuda.default_generators[index])
        return generators


class _ProcessWide:
    """A setting of the whole process, made while anyone holds it: threads may leave in any order."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make, self._holders, self._made = make, 0, ExitStack()

    @contextmanager
    def held(self) -> Iterator[None]:
        self._take()
        try:
            yield
        finally:
            self._give()

    @contextmanager
    def let_go(self) -> Iterator[None]:
        """Not held by this holder for a while."""
        self._give()
        try:
            yield
        finally:
            self._take()

    def _take(self) -> None:
        with _TURN:
            if not self._holders:
                self._made.enter_context(self._make())
            self._holders += 1

    def _give(self) -> None:
        with _TURN:
            self._holders -= 1
            if not self._holders:
                self._made.close()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sums are split by thread, so another number of threads rounds differently."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _repeatable() -> Iterator[None]:
    # The only attention kernel with second derivatives; the fused ones cannot give a Hessian product.
    with _deterministic(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    # Not use_deterministic_algorithms: the same switch, but it imports torch's compiler, two seconds on the first call.
    mode = torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    settings.fill_uninitialized_memory = False  # torch's aid for debugging; it costs a write per tensor
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill


def _cuda_settings() -> list[tuple[Any, str, Any]]:
    """(object, attribute, value): TensorFloat-32 off, and cuDNN's choice of kernel fixed."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    fixed: list[tuple[Any, str, Any]] = [(cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9; the two ways to say it must not be mixed
        return [*fixed, *((part, "fp32_precision", "ieee") for part in (matmul, cudnn.conv, cudnn.rnn))]
    return [*fixed, (matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]


@contextmanager
def _repeatable_cuda() -> Iterator[None]:
    """autograd runs backward on a thread with its own cuBLAS handle: without a fixed workspace the two may differ."""
    workspace = os.environ.get(_CUBLAS_VARIABLE)
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _cuda_settings()]
    try:
        if workspace not in (":4096:8", ":16:8"):
            os.environ[_CUBLAS_VARIABLE] = _CUBLAS_SETTING
        for owner, name, value in _cuda_settings():
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        if workspace is None:
            os.environ.pop(_CUBLAS_VARIABLE, None)
        else:
            os.environ[_CUBLAS_VARIABLE] = workspace


_REPEATABLE, _REPEATABLE_CUDA = _ProcessWide(_repeatable), _ProcessWide(_repeatable_cuda)
