"""How near do the integers of a step come to the card's copy rate?  python -m gpu.kernels --device cuda

A step's moves forward (with theta as floats, and the gradient's fingerprint and largest entry) and back, for SGD with
momentum and for AdamW, at 10^5 and 10^7 parameters: as tensor operations, as one kernel per operation, and as one
kernel for all. GB/s counts what a step must read and write at least: each number that it reads once, and each that it
writes once. The copy moves as many bytes in the same run; at 10^7 parameters they do not fit any cache. Ten calls are
one CUDA graph, so that nothing waits for launches. Back must undo forward bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from tasks import MOMENTUM
from torch import Tensor

import revdistill as rd
from gpu.apart import apart
from gpu.capture import captured
from gpu.lines import attempt, options_of, write
from gpu.place import here, milliseconds
from revdistill.engine.integers.backend import Backend
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.integers.history import NoHistory
from revdistill.engine.integers.passes import Passes
from revdistill.engine.integers.select import backend_for
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.moves import Decay, Move
from revdistill.engine.optimizers.sources import GRADIENT, THETA
from revdistill.engine.static.rows import DeviceNumbers

SIZES, QUICK = (100_000, 10_000_000), (1_000,)
OPTIMIZERS: dict[str, Callable[[], Any]] = {"sgd": lambda: rd.SGD(0.01, MOMENTUM), "adamw": lambda: rd.AdamW(1e-3)}
CALLS, REPEATS = 10, 20
LIMIT = 40.0  # seconds, for one optimizer at one size


class Work:
    """The integers of one optimizer, and the gradient.

    Attributes:
        state: what the moves change.
        gradient: float32 [numel]; theta: float32 [numel], where theta is written as floats.
        k: the step that the moves are told.
    """

    def __init__(self, optimizer: Any, numel: int, device: torch.device, backend: Backend) -> None:
        draw = torch.Generator(device=device).manual_seed(0)
        start, self.gradient = (0.1 * torch.randn(numel, generator=draw, device=device) for _ in range(2))
        self.theta, self.fixed, self.backend = torch.empty_like(start), FixedPoint(), backend
        self.update, self.k = optimizer.resolve(Layout.of({"w": start}), 2), 1
        if backend.interval > 1:  # its numbers are to be on the device
            numbers = DeviceNumbers(self.update, 2, device)
            self.k, self.update = numbers.begin(), numbers.update
        self.state = self.update.initial_state(self.fixed.from_float(start), self.fixed, NoHistory(), backend)

    def forward(self) -> None:
        """A step's moves, and what is noted of it."""
        for move in self.update.moves:
            move.forward(self.k, self.state, self.gradient)
        self.backend.to_float(self.state.numbers[THETA], self.theta, self.fixed)
        self.backend.fingerprint(self.gradient)
        self.backend.largest(self.gradient)

    def back(self) -> None:
        """The moves undone, theta as floats in between."""
        for move in reversed(self.update.blind):
            move.inverse(self.k, self.state, None)
        self.backend.to_float(self.state.numbers[THETA], self.theta, self.fixed)
        for move in reversed(self.update.seeing):
            move.inverse(self.k, self.state, self.gradient)
        self.backend.fingerprint(self.gradient)

    def integers(self) -> list[Tensor]:
        """Everything that back must bring back."""
        return [*self.state.numbers.values(), *(store.head for store in self.state.all_stores())]

    def bytes_of(self, groups: list[tuple[Move, ...]]) -> int:
        """What these groups of moves, one after the other, must read and write at least; with theta as floats once."""
        total = self.theta.nbytes
        for moves in groups:
            changed = {move.target for move in moves}
            read = changed.union(*(move.reads for move in moves))
            heads = {move.target for move in moves if isinstance(move, Decay)}
            total += sum(2 * self.state.numbers[name].nbytes for name in changed)
            total += sum(self.state.numbers[name].nbytes for name in read - changed - {GRADIENT})
            total += sum(2 * store.head.nbytes for name in heads for store in self.state.stores[name])
            total += self.gradient.nbytes * (GRADIENT in read)
        return total


class FusedWork(Work):
    """The same with all moves between two evaluations in one kernel."""

    def __init__(self, optimizer: Any, numel: int, device: torch.device, backend: Backend) -> None:
        super().__init__(optimizer, numel, device, backend)
        from revdistill.engine.static.fusing import FusedMoves

        self.notes = tuple(torch.zeros((), dtype=dtype, device=device) for dtype in (torch.int64, torch.float64))
        self._forward = FusedMoves(self.update.moves, self.state, back=False)
        self._blind = FusedMoves(self.update.blind[::-1], self.state, back=True)
        self._seeing = FusedMoves(self.update.seeing[::-1], self.state, back=True)

    def forward(self) -> None:
        self._forward.run(self.gradient, self.theta, self.notes)

    def back(self) -> None:
        self._blind.run(None, self.theta)
        self._seeing.run(self.gradient, None, self.notes)


def fused_backend(device: torch.device) -> Backend:
    """The device's own, which must be the one of a kernel per operation. Raises: RuntimeError if it is not."""
    from revdistill.engine.integers.fused import Fused

    found = backend_for(device)
    if not isinstance(found, Fused):
        raise RuntimeError(f"the backend of {device} is {type(found).__name__}, not Fused: is Triton installed?")
    return found


Forms = dict[str, tuple[type[Work], Callable[[torch.device], Backend]]]
FORMS: Forms = {
    "tensor operations": (Work, lambda _: Passes()),
    "one kernel per operation": (Work, fused_backend),
    "one kernel for all": (FusedWork, fused_backend),
}
LOOPS: Forms = {"compiled loops": (Work, backend_for)}


def often(run: Callable[[], object]) -> Callable[[], tuple[Tensor, ...]]:
    """CALLS times, as what `captured` takes."""

    def calls() -> tuple[Tensor, ...]:
        for _ in range(CALLS):
            run()
        return ()

    return calls


def together(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """CALLS calls, replayed on CUDA."""
    calls = often(run)
    return captured(calls)[0].replay if device.type == "cuda" else calls


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one of its CALLS calls."""
    return milliseconds(run, device) / 1e3 / CALLS


def copy_rate(nbytes: int, device: torch.device) -> float:
    """Bytes per second, read and written, of a copy that moves so many."""
    source = torch.ones(nbytes // 16, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    run = together(lambda: target.copy_(source), device)
    return 2 * source.nbytes / median(seconds(run, device) for _ in range(REPEATS))


def measure(name: str, numel: int, form: str, forms: Forms, device: torch.device) -> None:
    """Two lines: forward and back. Raises: RuntimeError where other kernels ran than the form says."""
    kind, backend = forms[form]
    work = kind(OPTIMIZERS[name](), numel, device, backend(device))
    before = [t.clone() for t in work.integers()]
    forward, back = together(work.forward, device), together(work.back, device)
    times: dict[str, list[float]] = {"forward": [], "back": []}
    for _ in range(REPEATS + 1):
        times["forward"].append(seconds(forward, device))
        changed = not torch.equal(work.integers()[0], before[0])
        times["back"].append(seconds(back, device))
    given_up = sorted(getattr(work.backend, "given_up", ()))
    if given_up:
        raise RuntimeError(f"tensor operations stood in for the kernels {', '.join(given_up)}")
    exact = changed and all(map(torch.equal, work.integers(), before))
    for way, groups in (("forward", [work.update.moves]), ("back", [work.update.blind, work.update.seeing])):
        nbytes, taken = work.bytes_of(groups), median(times[way][1:])
        rate = copy_rate(nbytes, device)
        write(
            "kernels",
            optimizer=name,
            parameters=numel,
            form=form,
            way=way,
            microseconds=1e6 * taken,
            bytes_per_parameter=nbytes / numel,
            gigabytes_per_second=nbytes / taken / 1e9,
            share_of_copy=nbytes / taken / rate,
            copy_gigabytes_per_second=rate / 1e9,
            exact=exact,
        )


def all_forms(name: str, numel: int, device_name: str) -> None:
    """The lines of one optimizer at one size."""
    with here(device_name) as device:
        forms = LOOPS if device.type == "cpu" else FORMS
        for form in forms:
            with attempt("kernels", optimizer=name, parameters=numel, form=form), warnings.catch_warnings():
                warnings.simplefilter("error", rd.CompileWarning)  # that something else stands in
                measure(name, numel, form, forms, device)


def main() -> None:
    """The command."""
    options = options_of(__doc__).parse_args()
    if options.device == "standin":
        write("kernels", skipped="the stand-in runs on the CPU, in Python: its times say nothing")
        return
    for numel in QUICK if options.quick else SIZES:
        for name in OPTIMIZERS:
            what = {"optimizer": name, "parameters": numel}
            apart("kernels", all_forms, name, numel, options.device, limit=LIMIT, **what)


if __name__ == "__main__":
    main()
