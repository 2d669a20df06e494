"""All moves of a step in one kernel on a device, against the moves one after the other on the CPU: every bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import revdistill as rd
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.integers.fused import Fused
from revdistill.engine.integers.history import DeviceHistory
from revdistill.engine.integers.loops import LOOPS
from revdistill.engine.integers.select import fused_for
from revdistill.engine.integers.state import THETA
from revdistill.engine.layout import Layout
from revdistill.engine.static.fusing import FusedMoves
from revdistill.engine.static.rows import DeviceNumbers
from tests.cuda.cases import CPU, DEVICE
from tests.engine import interpreted
from tests.engine.test_fusing import assert_same, begun, contents, spill, unspill

pytestmark = pytest.mark.cuda

STEPS = 6
SHAPES = (torch.Size([33_331]), torch.Size([300, 200])) if DEVICE == "cuda" else (torch.Size([13]), torch.Size([4, 5]))
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: rd.SGD(0.1, 0.9),
    "sgd, decay": lambda: rd.SGD(lambda k: 0.1 / (k + 1), 0.5, dampening=0.3, weight_decay=0.05),
    "sgd, groups": lambda: rd.SGD({"a": 0.1, "b": 0.3}, {"a": 0.7, "b": 0.9}, weight_decay={"a": 0.0, "b": 0.1}),
    "adam": lambda: rd.Adam(0.01, (0.9, 0.99), weight_decay=0.01),
    "adamw": lambda: rd.AdamW(0.01, weight_decay=0.1),
    "amsgrad": lambda: rd.Adam(0.01, amsgrad=True),
    "rmsprop, centered": lambda: rd.RMSprop(0.01, 0.9, momentum=0.5, centered=True, weight_decay=0.01),
}


def fused(device: torch.device) -> Fused:
    if DEVICE == "cpu":
        return interpreted.fused()
    if DEVICE == "standin":
        pytest.skip("the stand-in has no kernels")
    pytest.importorskip("triton")
    found = fused_for(device)
    assert found is not None, "the first launch of a kernel failed; a warning says why"
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_in_one_kernel_are_the_cpus(device: torch.device, name: str, dtype: torch.dtype) -> None:
    backend, draw = fused(device), torch.Generator().manual_seed(0)
    here, there = (OPTIMIZERS[name]().resolve(Layout(("a", "b"), SHAPES, dtype, d), STEPS) for d in (CPU, device))
    numel = here.layout.numel
    g = [(torch.randn(numel, generator=draw, dtype=torch.float64) * 10.0 ** (2 - k)).to(dtype) for k in range(STEPS)]
    expected = begun(here, g[0])
    state = there.initial_state(expected.numbers[THETA].to(device), FixedPoint(), DeviceHistory(), backend)
    for slot, q in expected.numbers.items():
        state.numbers[slot] = q.to(device, copy=True)
    for mine, theirs in zip(state.all_stores(), expected.all_stores(), strict=True):
        mine.restore(theirs.snapshot())
    numbers = DeviceNumbers(there, STEPS, device)
    moves, past = numbers.update, [contents(expected)]
    forward = FusedMoves(moves.moves, state, back=False)
    theta, theirs = torch.empty(numel, dtype=dtype, device=device), torch.empty(numel, dtype=dtype)
    notes = (torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), dtype=torch.float64, device=device))
    for k in range(1, STEPS):
        for move in here.moves:
            move.forward(k, expected, g[k])
        past.append(contents(expected))
        numbers.go_to(k)
        numbers.begin()
        spill(there, k, state)
        forward.run(g[k].to(device), theta, notes)
        assert_same({name: t.cpu() for name, t in contents(state).items()}, past[-1])
        LOOPS.to_float(expected.numbers[THETA], theirs, FixedPoint())
        assert torch.equal(theta.cpu(), theirs)
        assert (int(notes[0]), float(notes[1])) == (LOOPS.fingerprint(g[k]), LOOPS.largest(g[k]))
    if any(move.irreversible for move in here.moves):
        return
    ways = [FusedMoves(part[::-1], state, back=True) for part in (moves.blind, moves.seeing)]
    for k in reversed(range(1, STEPS)):
        numbers.go_to(k)
        numbers.begin()
        for way in ways:
            way.run(g[k].to(device))
        unspill(there, k, state)
        assert_same({name: t.cpu() for name, t in contents(state).items()}, past[k - 1])
