"""Determinism: torch's settings around every call of the loss, so that the way back repeats the way forward to the bit.

Random numbers (seeded from (seed, step)), autocast, the number of threads, deterministic kernels, TensorFloat-32 off,
the attention kernel that has second derivatives, and autograd on the calling thread. All of it is restored afterwards.

torch keeps most of this for the whole process, so the unrolls of several threads take turns (`turn`), and a setting
that one of them made stays until the last of them has left (`_ProcessSetting`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from revdistill.engine.loss.evaluation import Evaluation, Modules
from revdistill.engine.loss.operators import CUBLAS_SETTINGS, CUBLAS_VARIABLE
from revdistill.engine.loss.precision import without_tf32
from revdistill.engine.loss.randomness import generators_of
from revdistill.engine.loss.turn import turn

# torch reads it once, at the process's first matrix product on a GPU, and refuses deterministic ones for good where it
# was not set by then. So it is set as soon as this is imported, and stays.
os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_SETTINGS[0])


@dataclass
class _CallerState:
    """What the caller of a pass had set before it: the states of the generators, and whether autograd has threads."""

    generators: list[Tensor] = field(default_factory=list)
    multithreading: bool = True


@dataclass(frozen=True)
class Determinism:
    """torch's settings for one unroll, in both directions: `passage` around a pass, `step` around an evaluation.

    Attributes:
        device: of the parameters.
        seed: of the random numbers inside the loss.
        taken: steps that the training has behind it: steps count from 0 here, and random numbers from there.
        threads, autocast, autocast_dtype, grad: what the caller of the forward pass had set: torch's number of threads,
            whether autocast was on and its dtype, and whether gradients were on.
        modules: those that the loss calls, in the training modes of the way forward.
    """

    device: torch.device
    seed: int
    threads: int
    autocast: bool
    autocast_dtype: torch.dtype
    grad: bool
    taken: int = 0
    modules: Modules = field(default_factory=Modules, compare=False, repr=False)
    _caller: _CallerState = field(default_factory=_CallerState, compare=False, repr=False)

    @classmethod
    def capture(cls, device: torch.device, seed: int, taken: int = 0, steps: int = 0) -> Determinism:
        """The settings as they are now.

        Args:
            device: of the parameters.
            seed: of the random numbers inside the loss.
            taken: steps that the training has behind it.
            steps: of the unroll.
        """
        kind = device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return cls(device, seed, torch.get_num_threads(), *autocast, torch.is_grad_enabled(), taken, Modules(steps))

    @contextmanager
    def passage(self) -> Iterator[None]:
        """The context of a whole pass, forward or back. One thread at a time is in one; the others wait."""
        with ExitStack() as stack:
            stack.enter_context(turn())
            stack.enter_context(_threads(self.threads))
            # autograd runs backward on one thread per device. A thread whose turn it is must not wait for that one: it
            # may be in another unroll's way back, waiting for its turn.
            on_this_thread = torch.autograd.set_multithreading_enabled(False)
            stack.enter_context(on_this_thread)
            self._caller.multithreading = on_this_thread.prev
            for setting in _process_settings(self.device):
                stack.enter_context(setting.held())
            # Without its cache, which would keep casts of theta from one step to the next.
            stack.enter_context(
                torch.autocast(self.device.type, enabled=self.autocast, dtype=self.autocast_dtype, cache_enabled=False)
            )
            stack.enter_context(self._own_generators())
            yield

    def step(self, k: int) -> AbstractContextManager[None]:
        """The context of one evaluation of the loss and its derivatives, inside `passage`.

        The call itself seeds torch's generators, so that both directions draw the same random numbers; enter at once.

        Args:
            k: the step, from 0.

        Returns:
            See `Evaluation`.
        """
        self.seed_for(k)
        return self.evaluation(k)

    def seed_for(self, k: int) -> None:
        """Seed torch's generators for step k, inside `passage`."""
        # Weyl sequence: distinct for distinct steps, far apart for neighbouring ones.
        seed = (self.seed + (k + self.taken) * 0x1E3779B97F4A7C15) % 2**63
        for generator in generators_of(self.device):
            generator.manual_seed(seed)

    def evaluation(self, k: int) -> AbstractContextManager[None]:
        """`step` without the seeds: within a capture there is one seed, that of before it."""
        return Evaluation(self.modules, k)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """The context of a user's function that gives a batch, inside `passage`.

        It has the caller's random numbers and grad mode. (A pass is made without gradients: a batch computed from a
        tensor that requires grad would then not require it, and nobody would notice.) Other threads may take their
        turn meanwhile, so that the user's code may wait for them.
        """
        generators = generators_of(self.device)
        for generator, state in zip(generators, self._caller.generators, strict=True):
            generator.set_state(state)
        turn().release()
        try:
            with (
                torch.autograd.set_multithreading_enabled(self._caller.multithreading),
                torch.set_grad_enabled(self.grad),
            ):
                yield
        finally:
            turn().acquire()
            self._caller.generators = [generator.get_state() for generator in generators]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The context of a user's function that only looks on (on_step), inside `passage`.

        As `outside`, and torch's settings are the caller's too.
        """
        with ExitStack() as stack:
            for setting in _process_settings(self.device):
                stack.enter_context(setting.released())
            stack.enter_context(self.outside())
            yield

    @contextmanager
    def _own_generators(self) -> Iterator[None]:
        """The caller's generators are put back afterwards."""
        generators = generators_of(self.device)
        self._caller.generators = [generator.get_state() for generator in generators]
        try:
            yield
        finally:
            for generator, state in zip(generators, self._caller.generators, strict=True):
                generator.set_state(state)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """The context of what an outer loop does around its unrolls: deterministic kernels, no TensorFloat-32.

    Args:
        device: on which the outer loop computes.
    """
    with ExitStack() as stack:
        for setting in _process_settings(device):
            stack.enter_context(setting.held())
        yield


def _process_settings(device: torch.device) -> tuple[_ProcessSetting, ...]:
    return (_REPEATABLE, _REPEATABLE_CUDA) if device.type == "cuda" else (_REPEATABLE,)


class _ProcessSetting:
    """A setting of the whole process, in force while anyone holds it: threads may leave in any order."""

    def __init__(self, setting: Callable[[], AbstractContextManager[None]]) -> None:
        self._setting, self._holders, self._in_force = setting, 0, ExitStack()

    @contextmanager
    def held(self) -> Iterator[None]:
        self._hold()
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Not held by this one of its holders."""
        self._release()
        try:
            yield
        finally:
            self._hold()

    def _hold(self) -> None:
        with turn():
            if not self._holders:
                self._in_force.enter_context(self._setting())
            self._holders += 1

    def _release(self) -> None:
        with turn():
            self._holders -= 1
            if not self._holders:
                self._in_force.close()


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
    # torch takes another way through attention where nothing is differentiated, but not while it is watched.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _deterministic(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


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


@contextmanager
def _repeatable_cuda() -> Iterator[None]:
    """cuDNN's choice of kernel fixed, and no TensorFloat-32."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    with without_tf32():
        cudnn.benchmark, cudnn.deterministic = False, True
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before


_REPEATABLE, _REPEATABLE_CUDA = _ProcessSetting(_repeatable), _ProcessSetting(_repeatable_cuda)
