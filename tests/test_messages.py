"""Every error of the project through its public path: its text says what, where and what to do, and docs/guarantees.md
lists it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd
from revdistill.distill import checkpoint as checkpoints
from revdistill.distill.artifact import read
from revdistill.distill.config import Config
from revdistill.distill.distillation import Distillation
from revdistill.distill.distiller import Distiller
from revdistill.outer.data import load
from revdistill.outer.directory import DirectoryInUseError, DirectoryLock
from revdistill.outer.job import InterruptedRunError, NotSavedError
from tests.torchrun import group_of_one

GUARANTEES = (Path(__file__).parents[1] / "docs/guarantees.md").read_text()


def unrolled(factor: Callable[[], float], lr: float = 0.1, steps: int = 30, **kwargs: Any) -> Tensor:
    params = {"w": torch.ones(3, dtype=torch.float64, requires_grad=True)}

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        return p["w"].square().sum() * factor()

    sgd, again = rd.SGD(lr, kwargs.pop("momentum", 0.9), **kwargs), rd.Reversible(graph_bytes=0)
    theta = rd.unroll(loss, params, lambda k: (), sgd, steps=steps, adjoint=again)
    return theta["w"].sum()


def reversal(_: Path) -> None:
    calls = itertools.count()
    unrolled(lambda: 1 + 1e-9 * next(calls)).backward()


def out_of_range(_: Path) -> None:
    unrolled(lambda: -1.0, lr=1.0, steps=100)


def not_finite(_: Path) -> None:
    calls = itertools.count()
    unrolled(lambda: float("nan") if next(calls) == 17 else 1.0)


def unsupported(_: Path) -> None:
    outer = unrolled(lambda: 1.0)
    outer.backward(retain_graph=True)
    outer.backward()


def artifact(folder: Path) -> None:
    (folder / "distilled.h5").write_bytes(b"not HDF5")
    read(folder / "distilled.h5")


def compiled(_: Path) -> None:
    import warnings

    params = {"w": torch.ones(2, requires_grad=True)}

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        return p["w"].square().sum() * float(torch.tensor([1.0]).tolist()[0])

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error", rd.CompileWarning)
        patch.setattr(torch, "compile", _no_compiler)
        rd.unroll(loss, params, lambda k: (), rd.SGD(0.1), steps=2, compile=True)


def _no_compiler(*_: Any, **__: Any) -> Any:
    def call(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    return call


def run(folder: Path) -> Distillation:
    config = Config(dataset="moons", architectures=("LinearNet",), steps=2, epochs=1, outer_steps=4, batch_size=16)
    return Distillation(folder / "run", Distiller(config, load("moons")))


def lost(folder: Path) -> None:
    import torch.distributed as dist

    def closed(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")

    with group_of_one(folder) as group, pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_into_tensor", "all_gather_single"):
            patch.setattr(dist, name, closed, raising=False)
        params = {"w": torch.ones(2)}
        rd.unroll(lambda p, b: p["w"].sum(), params, lambda k: (), rd.SGD(0.1), steps=1, group=group)


def in_use(folder: Path) -> None:
    with DirectoryLock(folder / "run"):
        run(folder).run(progress=False)


def not_saved(folder: Path) -> None:
    (folder / "tmp").mkdir()
    made = run(folder)
    save, calls = checkpoints.save, itertools.count()

    def full(path: Path, distiller: Distiller) -> None:
        if path.parent == folder / "run" and next(calls):
            raise OSError(28, "No space left on device")
        save(path, distiller)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", full)
        patch.setattr("tempfile.tempdir", str(folder / "tmp"))
        made.run(progress=False)


def interrupted(folder: Path) -> None:
    import os
    import signal

    made, step = run(folder), Distiller.step

    def stopping(self: Distiller) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distiller, "step", stopping)
        made.run(progress=False)


# error -> how it comes about; what its text must say: what, where, what to do
CASES: dict[type[BaseException], tuple[Callable[[Path], None], tuple[str, ...]]] = {
    rd.ReversalError: (reversal, ("gradient", "step 29", "deterministic", "rd.Backprop()")),
    rd.RangeError: (
        out_of_range,
        ("fixed-point range", "params['w']", "at step", "a smaller lr or fewer fractional_bits"),
    ),
    rd.NonFiniteError: (not_finite, ("not finite", "params['w']", "step 17", "a smaller lr")),
    rd.UnsupportedError: (
        unsupported,
        ("already gone back through", "this unroll", "add the losses before one backward()"),
    ),
    rd.RankError: (
        lost,
        ("process of the group is gone", "rank 0 of 1", "start all of them again", "Connection closed"),
    ),
    rd.ArtifactError: (artifact, ("damaged or not an HDF5 file", "distilled.h5")),
    rd.CompileWarning: (compiled, ("compile=True", "no C++ compiler", "running it without torch.compile")),
    DirectoryInUseError: (in_use, ("in use by another run", "run", "process")),
    NotSavedError: (not_saved, ("took no checkpoint", "outer step 4", "put it there and resume")),
    InterruptedRunError: (interrupted, ("stopped", "outer step 1")),
}


@pytest.mark.usefixtures("heard_signals")
@pytest.mark.parametrize("error", CASES, ids=lambda error: error.__name__)
def test_the_text_says_what_where_and_what_to_do(error: type[BaseException], tmp_path: Path) -> None:
    trigger, words = CASES[error]
    with pytest.raises(error) as caught:
        trigger(tmp_path)
    assert type(caught.value) is error
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


def defined() -> Iterator[type[BaseException]]:
    """Every error and warning that the library defines for users: those whose names do not begin with an underscore."""
    import importlib
    import pkgutil

    for module in pkgutil.walk_packages(rd.__path__, "revdistill."):
        if module.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == module.name:
                yield value


def test_every_error_has_its_case_and_its_row_in_the_docs() -> None:
    inner = {
        "SuspicionError",
        "CannotFollowError",
        "UnusedParametersError",
        "OtherBitsError",
        "NoRowsError",
        "RevdistillError",
        "UserError",
        "StoppedError",
        "NotSmoothError",
    }  # caught inside; the base; the command's, whose lines are in test_cli
    names = {error.__name__ for error in defined()} - inner
    assert names == {error.__name__ for error in CASES}
    table = GUARANTEES.split("## What can go wrong")[1].split("\n## ")[0]
    rows = set(re.findall(r"^\| `(?:rd\.)?(\w+)` \|", table, flags=re.M))
    assert rows == names
