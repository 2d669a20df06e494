"""The parts of benchmarks/cuda.sh, each in this process on the CPU."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import apart, gpt2, kernels, lines, long, speed, verify

from revdistill.engine import selfcheck

pytestmark = pytest.mark.imitated

copied = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # what the copies do needs no threads


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that lines are written to."""
    path = tmp_path / "cuda.jsonl"
    monkeypatch.setenv(lines.RESULTS, str(path))
    return path


def found_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_check_of_verify_is_a_line_whatever_its_name(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leaves one space before the figure, as the command prints it, was no line."""
    names = ["momentum 0.9", "ConvNet, GroupNorm, many outputs", "a name that is longer than the command's column"]
    done = [selfcheck.Check("gradients", name, "relative error 7.4e-13", name != names[1], 1.0) for name in names]
    monkeypatch.setattr(selfcheck, "checks", lambda _: iter(done))
    assert verify.measure("cpu", quick=False) == 1
    found = [(line["name"], line["found"], line["passed"]) for line in found_in(written)]
    assert found == [(name, "relative error 7.4e-13", name != names[1]) for name in names]


def _ends(how: str) -> None:
    if how == "raises":
        raise RuntimeError("out of cards")
    if how == "dies":
        os._exit(9)
    if how == "hangs":
        time.sleep(60)
    lines.write("x", done=how)


def _sets(numbers: Any, _: str) -> None:
    numbers[:] = [1.0, 2.0]


@copied
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("returns", {"part": "x", "done": "returns"}),
        ("raises", {"part": "x", "task": "t", "error": "RuntimeError: out of cards"}),
        ("dies", {"part": "x", "task": "t", "error": "ChildProcessError: the process ended with exit code 9"}),
        ("hangs", {"part": "x", "task": "t", "error": "TimeoutError: not done within 1 s"}),
    ],
)
def test_a_process_apart_ends_alone_and_says_how(written: Path, how: str, told: dict[str, Any]) -> None:
    assert apart.apart("x", _ends, how, limit=1.0 if how == "hangs" else 30.0, task="t") == (how == "returns")
    assert found_in(written) == [told]


@copied
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA starts here")
def test_where_cuda_does_not_start_in_a_copy_it_is_a_fresh_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here it starts in neither, so that the second must not look."""
    monkeypatch.setattr(apart, "_ways", ["fork", "spawn"])
    numbers = apart.shared(2)
    assert apart.apart("x", _sets, numbers, "cuda")
    assert list(numbers) == [1.0, 2.0]
    assert apart._ways == ["spawn"]


def test_a_process_apart_is_not_begun_without_time(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(apart.UNTIL, str(time.time() + 1))
    assert not apart.apart("x", _ends, "returns")
    assert found_in(written) == [{"part": "x", "error": "TimeoutError: no time was left"}]


@pytest.mark.parametrize("form", ["compiled loops", "tensor operations"])
@pytest.mark.parametrize("name", list(kernels.OPTIMIZERS))
def test_kernels_count_what_a_step_reads_and_writes(written: Path, name: str, form: str) -> None:
    """By hand, in 8-byte words and in floats of 4: theta, v, head; theta, m and s in two words each, two heads."""
    kernels.measure(name, 10, form, kernels.FORMS | kernels.LOOPS, torch.device("cpu"))
    forward, back = found_in(written)
    words = {"sgd": (6, 7), "adamw": (16, 20)}[name]
    assert [line["bytes_per_parameter"] for line in (forward, back)] == [8 * n + 8 for n in words]
    assert forward["exact"]
    assert back["exact"]


def test_what_is_planned_of_a_long_training_fits_the_time(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    monkeypatch.setattr(long, "measure", lambda steps, _: ran.append(steps) or 0.001)
    for seconds, expected in ((1_000.0, [10_000, 100_000]), (50.0, [10_000, 40_000]), (5.0, [10_000])):
        ran.clear()
        monkeypatch.setattr(long, "left", lambda seconds=seconds: seconds)
        long.both(10_000, 100_000, "cpu")
        assert ran == expected
    assert "no time was left" in found_in(written)[-1]["skipped"]


def test_a_long_training_is_measured(written: Path) -> None:
    long.measure(3, "cpu")
    (line,) = found_in(written)
    assert line["steps"] == 3
    assert line["finite"]


def test_the_network_of_gpt2s_size_has_its_size_and_a_small_one_trains() -> None:
    with torch.device("meta"):
        net = gpt2.gpt.GPT(gpt2.SIZE, gpt2.VOCABULARY)
    assert 124.0e6 < sum(p.numel() for p in net.parameters()) < 124.5e6
    found = gpt2.Trial(gpt2.QUICK, gpt2.QUICK_VOCABULARY, 2, 2).run("cpu")
    assert found["finite"]
    assert found["parameters"] == 7_360


def test_speed_tells_a_methods_failure_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such card")

    broken = speed.METHODS["reversible"]
    monkeypatch.setitem(speed.METHODS, "reversible", type(broken)(broken.title, fails))
    found = speed.compare("tiny", 2, 1, ("autograd", "reversible", "reversible-default"), torch.device("cpu"))
    rows = {row["method"]: row for row in found["methods"]}
    assert rows["reversible"] == {"method": "reversible", "error": "RuntimeError: no such card"}
    assert rows["reversible-default"]["disagreement"] < 1e-9


def test_replayed_steps_have_eagers_bits() -> None:
    found = speed.same_bits("tiny", 12, torch.device("cpu"))
    assert (found["theta_equal"], found["hypergradient_equal"]) == (True, True), found
