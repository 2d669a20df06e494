"""Unrolls here and on the stand-in device, and what they left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import revdistill as rd
from revdistill.engine.integers.history import FileHistory, History, HostHistory
from tests import standin
from tests.engine.problems import Case
from tests.engine.small import CE, total

DTYPES = {"float32": torch.float32, "float64": torch.float64}
Problem = Callable[[torch.dtype, bool], Case]


def classifier(net: nn.Module, dtype: torch.dtype, on_device: bool, *shape: int) -> Case:
    """A network, and five batches of six, here or there."""
    net = net.to(dtype)
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(5, 6, *shape, dtype=dtype, generator=draw).requires_grad_()
    y = torch.arange(30).reshape(5, 6) % 3
    if on_device:
        net, x, y = standin.put_module(net), standin.put(x), standin.put(y)
    loss, params = rd.from_module(net, CE)
    return Case(loss, params, (x, y))


def mlp(dtype: torch.dtype, on_device: bool) -> Case:
    torch.manual_seed(2)
    return classifier(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), dtype, on_device, 4)


def stack(dtype: torch.dtype, on_device: bool) -> Case:
    """Three networks side by side."""
    torch.manual_seed(2)
    nets = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype) for _ in range(3)]
    if on_device:
        nets = [standin.put_module(net) for net in nets]
    loss, params = rd.stack_modules(nets, CE)
    return Case(loss, params, mlp(dtype, on_device).batches)


def least_quartics(dtype: torch.dtype, on_device: bool, numel: int = 3) -> Case:
    """Few operators, for many steps or many parameters."""
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(7, numel, dtype=dtype, generator=draw).requires_grad_()
    w = torch.randn(numel, dtype=dtype, generator=draw).requires_grad_()
    if on_device:
        x, w = standin.put(x), standin.put(w)

    def loss(params: dict[str, Tensor], batch: tuple[Tensor]) -> Tensor:
        return (params["w"] - batch[0]).square().square().sum()

    return Case(loss, {"w": w}, (x,))


@dataclass
class Outcome:
    """What an unroll left, on the CPU, wherever it ran. words: every bit that was spilled; None where nothing is walked
    back.
    """

    theta: list[Tensor]
    fingerprints: Tensor
    words: bytes | None
    gradients: dict[str, Tensor]


def words_of(history: History) -> bytes:
    if isinstance(history, FileHistory):
        history._file.seek(0)
        return history._file.read(history.nbytes)
    stack: list[Any] = history._stack  # type: ignore[attr-defined]
    kept = [words for words, *_ in stack] if isinstance(history, HostHistory) else stack
    return b"".join(standin.take(words).numpy().tobytes() for words in kept)


def outcome(case: Case, optimizer: Any, leaves: dict[str, Tensor], runs: list[Any], **kwargs: Any) -> Outcome:
    """Forward and back; runs: of the fixture of this name."""
    runs.clear()
    theta = rd.unroll(case.loss, case.params, case.batches, optimizer, seed=3, **kwargs)
    words, fingerprints = None, torch.zeros(0)
    if runs:  # not so with Backprop
        words = words_of(runs[0].recording.history) if hasattr(runs[0].recording, "history") else None
        fingerprints = standin.take(torch.as_tensor(runs[0].problem.gradient.fingerprints._kept))
    leaves = case.leaves | leaves
    found = torch.autograd.grad(total(theta), list(leaves.values()), allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), found, strict=True)]
    return Outcome(
        [standin.take(p) for p in theta.values()],
        fingerprints,
        words,
        dict(zip(leaves, map(standin.take, gradients), strict=True)),
    )


# Bars add up in another order where the CPU takes several numbers at once: the last bits of a hypergradient. Backprop
# trains in floats, whose own last bits a training makes more of.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}
IN_FLOATS = {torch.float64: 1e-11, torch.float32: 1e-3}


def assert_same(here: Outcome, there: Outcome, dtype: torch.dtype) -> None:
    """theta, fingerprints and spilled words bit for bit; hypergradients to the last bits."""
    in_floats = not len(here.fingerprints)
    tolerance = (IN_FLOATS if in_floats else TOLERANCE)[dtype]
    assert torch.equal(here.fingerprints, there.fingerprints)
    assert here.words == there.words
    for mine, theirs in zip(here.theta, there.theta, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance if in_floats else 0, atol=tolerance if in_floats else 0)
    for name, expected in here.gradients.items():
        error = float((there.gradients[name] - expected).norm())
        assert error <= tolerance * float(expected.norm()), (
            f"{name} differs by {error:.1e} of {float(expected.norm()):.1e}"
        )


def go_back(run: Any) -> None:
    """The way back of an unroll, by itself: torch ends the process where a Python device's own thread of autograd
    raises.
    """
    run.go_back((torch.ones_like(run.recording._trajectory.theta()),))
