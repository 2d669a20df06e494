"""Work that processes share out, in threads that stand in for them: results in the order of units, errors for all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from revdistill.cli import main as command
from revdistill.cli.errors import UserError
from revdistill.cli.processes import check_same
from torch import Tensor

import revdistill as rd
from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.engine.ranks.group import KINDS, Ranks
from revdistill.outer import ranks as ours
from revdistill.outer.data import load
from revdistill.outer.descent import ClipTo, Descent
from revdistill.outer.device import check_device
from revdistill.outer.networks import NetworkStack
from revdistill.outer.random_streams import part_seed
from revdistill.outer.ranks import ALONE, Processes, StoppedError
from revdistill.tune.config import TuneConfig
from revdistill.tune.tuner import Tuner

T = TypeVar("T")
MOONS = load("moons")
SMALL = Config(dataset="moons", architectures=("NonLinearNet", "LinearNet"), steps=2, epochs=2, inits=3, batch_size=32)
CPU = torch.device("cpu")


class Threads(Ranks):
    """Ranks that are threads of this process: tensors go through a list."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.sent = rank, barrier.parties, 0
        self._shared, self._barrier = shared, barrier
        self._device, self._known = CPU, None
        self._kinds = {kind.__name__: kind for kind in (*KINDS, StoppedError, rd.RangeError, rd.RankError)}

    def gather(self, x: Tensor) -> Tensor:
        try:
            self._shared[self.rank] = x.clone()
            self._barrier.wait(20)
            found = torch.stack(self._shared)
            self._barrier.wait(20)
        except threading.BrokenBarrierError:
            raise rd.RankError("another process is gone", rank=None) from None
        return found


def on(size: int, do: Callable[[Processes], T]) -> list[T | BaseException]:
    """What each of `size` processes has of it."""
    shared, barrier = [None] * size, threading.Barrier(size)
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = do(Processes(Threads(rank, shared, barrier)))
        except BaseException as error:
            found[rank] = error
            if isinstance(error, AssertionError):
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_results_come_in_the_order_of_units(size: int) -> None:
    lengths = [3, 1, 2, 4]
    asked: list[list[int]] = [[] for _ in range(size)]

    def share(processes: Processes) -> list[Tensor]:
        def make(unit: int) -> Tensor:
            asked[processes.rank].append(unit)
            return torch.arange(lengths[unit]) + 10.0 * unit

        return processes.share(lengths, make)

    expected = [[10.0 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    for found in on(size, share):
        assert not isinstance(found, BaseException)
        assert [t.tolist() for t in found] == expected
    assert asked == [list(range(rank, 4, size)) for rank in range(size)]
    assert [t.tolist() for t in ALONE.share(lengths, lambda i: torch.tensor(expected[i]))] == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_first_unit_that_leaves_the_range_is_named_whoever_has_it(size: int) -> None:
    def share(processes: Processes) -> Any:
        def make(unit: int) -> Tensor:
            if unit in (1, 2):
                raise rd.RangeError(f"unit {unit}", parameter=f"p{unit}", step=unit, value=0.1 * unit)
            return torch.zeros(1)

        with processes.together():
            return processes.share([1] * 4, make)

    for found in on(size, share):
        assert type(found) is rd.RangeError
        assert (str(found), found.parameter, found.step, found.value) == ("unit 1", "p1", 1, 0.1)


def test_any_other_error_is_all_processes_and_is_told_once() -> None:
    """One that is made of it on the way out is the same one."""

    def share(processes: Processes) -> None:
        def make(unit: int) -> Tensor:
            if unit == 1:
                raise OSError("no space")
            return torch.zeros(1)

        with processes.together():
            try:
                processes.share([1, 1, 1], make)
            except OSError as error:
                if processes.rank != 1:  # what it was told
                    raise ValueError(f"--out: {error}") from error
                raise

    first, own, last = on(3, share)
    assert (type(own), str(own)) == (OSError, "on rank 1: no space")
    assert str(first) == str(last) == "--out: on rank 1: no space"


def test_one_that_is_told_to_stop_stops_all() -> None:
    def stopping(unit: int) -> Tensor:
        if unit == 1:
            raise KeyboardInterrupt
        return torch.zeros(1)

    assert [type(found) for found in on(3, lambda p: p.share([1] * 3, stopping))] == [StoppedError] * 3

    def alike(processes: Processes) -> int:
        return processes.alike(lambda: stopping(processes.rank) is None)

    assert [type(found) for found in on(2, alike)] == [StoppedError] * 2
    assert on(2, lambda p: p.alike(lambda: 7)) == [7, 7]


def test_between_steps_a_signal_is_heard_by_all_and_a_drift_is_found() -> None:
    assert on(3, lambda p: p.agree(15 if p.rank == 1 else None, 4, 0)) == [15] * 3
    assert on(2, lambda p: p.agree(None, 4, 77)) == [None, None]
    for numbers in ((4, 1), (1, 4)):  # another fingerprint; another step
        for found in on(3, lambda p, n=numbers: p.agree(None, *(n if p.rank == 2 else (4, 4)))):  # type: ignore[misc]
            assert isinstance(found, rd.RankError)
            assert found.rank == 2
            assert "rank 2 has not what rank 0 has after step 4" in str(found)
    assert on(2, lambda p: p.told(f"of {p.rank}")) == ["of 0", "of 0"]


def descended(processes: Processes, bad: int | None = None) -> tuple[list[float], list[Tensor], int]:
    """Three steps over five units, one of which fails at step 1 where `bad` says."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(5, 40, generator=g)
    leaves = {"x": torch.linspace(-1, 1, 40).requires_grad_(), "y": torch.ones(1).requires_grad_()}
    leaves["unused"] = torch.ones(2).requires_grad_()
    made = Descent(
        leaves, lr=0.1, betas=(0.9, 0.99), decay=lambda k: 1.0, clip=ClipTo(1.0), average_from=1, processes=processes
    )

    def part(k: int, unit: int) -> Tensor:
        if (k, unit) == (1, bad):
            raise rd.NonFiniteError("loss is nan", parameter=None, step=3)
        loss = (leaves["x"] * a[unit] - k).square().mean()
        return loss * leaves["y"].sum() if unit == 3 else loss

    losses = [made.step_over(5, part).loss for _ in range(3)]
    return losses, [leaf.detach() for leaf in leaves.values()], made.fingerprint()


@pytest.mark.parametrize("bad", [None, 3])
def test_a_descent_is_the_same_on_any_number_of_processes(bad: int | None) -> None:
    """And beside a loop that adds the units' gradients in their order."""
    losses, expected, fingerprint = descended(ALONE, bad)
    for size in (1, 2, 3):
        for found in on(size, lambda p: descended(p, bad)):
            assert not isinstance(found, BaseException), found
            assert str(found[0]) == str(losses)
            assert all(torch.equal(a, b) for a, b in zip(found[1], expected, strict=True))
            assert found[2] == fingerprint
    a = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    x, y, unused = torch.linspace(-1, 1, 40).requires_grad_(), torch.ones(1).requires_grad_(), torch.ones(2)
    adam = torch.optim.Adam([{"params": [x]}, {"params": [y]}], lr=0.1, betas=(0.9, 0.99))
    for k in range(3):
        if k == 1 and bad is not None:
            continue
        adam.zero_grad()
        for unit in range(5):
            loss = (x * a[unit] - k).square().mean()
            (loss * y.sum() if unit == 3 else loss).backward()
        torch.nn.utils.clip_grad_norm_([x, y], 1.0)
        adam.step()
    assert all(torch.equal(t.detach(), u) for t, u in zip((x, y, unused), expected, strict=True))


def distilled(processes: Processes, **changes: Any) -> tuple[list[Tensor], float]:
    distiller = Distiller(replace(SMALL, outer_steps=3, **changes), MOONS, processes)
    for _ in range(2):
        assert distiller.step().diverged is None
    return [leaf.detach() for leaf in distiller.synthetic.leaves.values()], distiller.validation_accuracy()


def test_stacks_of_any_size_have_the_same_networks() -> None:
    """So the result differs by rounding, and not by processes."""
    whole, accuracy = distilled(ALONE)
    for size in (1, 2):
        found, validated = distilled(ALONE, side_by_side=size)
        for a, b in zip(found, whole, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
        assert validated == pytest.approx(accuracy, abs=0.02)
    stack = NetworkStack("NonLinearNet", 5, MOONS.input_shape, MOONS.classes, CPU)
    params = stack.sample(3)
    parts = stack.parts(2)
    assert [(part.first, part.stack.size) for part in parts] == [(0, 2), (2, 2), (4, 1)]
    assert sum(part.share for part in parts) == pytest.approx(1)
    for name, p in params.items():
        assert torch.equal(torch.cat([part.take(params)[name] for part in parts]), p)
    assert [part.stack for part in stack.parts(9)] == [stack]


def test_networks_that_draw_random_numbers_draw_their_own() -> None:
    assert part_seed(7, 0) == 7
    assert len({part_seed(seed, first) for seed in range(5) for first in range(5)}) == 25


def test_a_tuning_in_stacks_reports_the_norms_of_all() -> None:
    """The norm over all networks is that of their gradients side by side."""
    config = TuneConfig(dataset="moons", arch="NonLinearNet", inits=3, steps=5, outer_steps=2, outer_batch=50)
    whole, split = (Tuner(replace(config, side_by_side=size), MOONS).step() for size in (None, 2))
    assert split.longest == pytest.approx(whole.longest, rel=1e-3)
    assert split.norm == pytest.approx(whole.norm, rel=1e-3)
    assert split.loss == pytest.approx(whole.loss, rel=1e-4)


def test_configurations_of_earlier_releases_have_all_side_by_side() -> None:
    for config in (Config(), TuneConfig()):
        old = config.to_dict()
        del old["side_by_side"]
        assert type(config).from_dict(old) == config
        assert config.side_by_side is None
        for wrong in (0, -1, 1.5):
            with pytest.raises(ValueError, match=r"side_by_side is .*; accepted is an integer from 1"):
                replace(config, side_by_side=wrong)


def test_other_options_or_data_on_another_process_are_one_line() -> None:
    def checked(processes: Processes, mine: dict[str, Any], **changes: Any) -> None:
        own = processes.rank == 1
        check_same(processes, {"lr": 0.1} | (mine if own else {}), replace(MOONS, **changes) if own else MOONS)

    assert on(3, lambda p: checked(p, {})) == [None] * 3
    for mine, changes, said in (
        ({"lr": 0.2}, {}, "rank 0 has 0.1 as lr, but rank 1 has 0.2"),
        ({}, {"y": 1 - MOONS.y}, "as the data's training labels, but rank 1"),
    ):
        for found in on(3, lambda p, m=mine, c=changes: checked(p, m, **c)):  # type: ignore[misc]
            assert isinstance(found, UserError)
            assert said in str(found)


def test_half_an_environment_of_torchrun_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert command.run(["data", "moons"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "but not MASTER_ADDR and MASTER_PORT; start the command by torchrun, or take them out" in err


def test_cuda_is_each_process_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda") == torch.device("cuda")
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert check_device("cuda") == torch.device("cuda:1")
    assert (check_device("cuda:0"), check_device("cpu")) == (torch.device("cuda:0"), CPU)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"which is cuda:2 for this process .* has 2 CUDA devices; start as many"):
        check_device("cuda")


def test_a_process_that_has_ended_is_known_to(tmp_path: Path) -> None:
    import subprocess

    child = subprocess.Popen(["sleep", "60"])
    other = ours._Process(ours._machine(), child.pid)
    assert not other.has_ended()
    child.kill()
    child.communicate()
    assert other.has_ended()
    assert not ours._Process("another machine", child.pid).has_ended()
