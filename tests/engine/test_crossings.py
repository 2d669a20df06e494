"""How many files one step goes through: calls from one file of the engine into another, which a reader follows."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd

ENGINE = str(Path(rd.__file__).parent / "engine")
OPTIMIZERS: dict[str, Callable[[Tensor], Any]] = {"sgd": lambda lr: rd.SGD(lr, 0.9), "adamw": rd.AdamW}
# Per step forward and back, without kept graphs. These are to fall, and not to rise unseen. Three of each evaluation
# are what watches over activation checkpointing, training modes and missing gradients; three forward, over what the
# graph of the loss reaches.
CROSSINGS = {"sgd": (40, 56), "adamw": (68, 90)}


def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    return (params["w"] - batch[0]).square().sum()


def crossings(optimizer: Callable[[Tensor], Any], steps: int) -> Counter[str]:
    """Of one unroll and of its way back."""
    found: Counter[str] = Counter()
    way = "forward"

    def watch(frame: FrameType, event: str, _: Any) -> None:
        here, caller = frame.f_code.co_filename, frame.f_back
        if event == "call" and here.startswith(ENGINE) and caller and caller.f_code.co_filename != here:
            found[way] += 1

    def fresh(p: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:  # no loss that was looked at before
        return loss(p, batch)

    params = {"w": torch.ones(5, requires_grad=True)}
    x, lr = torch.randn(3, 5, requires_grad=True), torch.full((steps,), 0.01, requires_grad=True)
    with torch.autograd.set_multithreading_enabled(False):  # a profile is of one thread
        before = sys.getprofile()
        sys.setprofile(watch)
        try:
            theta = rd.unroll(fresh, params, (x,), optimizer(lr), steps=steps, adjoint=rd.Reversible(graph_bytes=0))
            way = "back"
            torch.autograd.grad(theta["w"].sum(), [x, lr])
        finally:
            sys.setprofile(before)
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_goes_through_few_files(name: str) -> None:
    crossings(OPTIMIZERS[name], 3)  # what is imported on first use
    # No power of two between them: at such a step more is looked at.
    few, many = (crossings(OPTIMIZERS[name], steps) for steps in (40, 50))
    found = tuple((many[way] - few[way]) / 10 for way in ("forward", "back"))
    print(f"{name}: {found[0]:g} crossings per step forward, {found[1]:g} back")
    assert found[0] <= CROSSINGS[name][0]
    assert found[1] <= CROSSINGS[name][1]
