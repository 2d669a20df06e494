"""benchmarks/cuda.sh, which has minutes of a lent GPU and no second try: nothing that fails may cost what comes after
it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import report_cuda
import tasks
import torch
from gpu import launches

from tests import standin

SCRIPT = Path(__file__).parents[2] / "benchmarks/cuda.sh"
TESTS = [path.stem.removeprefix("test_") for path in sorted((SCRIPT.parents[1] / "tests/cuda").glob("test_*.py"))]
TIMED = ["speed", "kernels", "long", "gpt2", "capture", "compile"]
PARTS = ["machine", *TESTS, "verify", "memory", "launches", *TIMED]
ONLY_ON_A_GPU = {"fused_moves", "group"}  # Triton's kernels, and a group's exchanges
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(
    BASH is None or not sys.platform.startswith("linux"), reason="a script for bash on Linux"
)


def run(out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    assert BASH is not None
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # it is no worker's
    return subprocess.run(
        [BASH, str(SCRIPT), *options],
        env=own | {"OUT": str(out)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "cuda.jsonl").read_text().splitlines()]


def interpreter(folder: Path, body: str) -> str:
    """A program in the interpreter's place."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_its_syntax_is_right() -> None:
    assert BASH is not None
    subprocess.run([BASH, "-n", str(SCRIPT)], check=True)


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    fails = interpreter(
        tmp_path, 'case "$*" in *gpu.verify*|*gpu.speed*) echo broken >&2; exit 3;; esac; echo "ran $*"'
    )
    done = run(tmp_path / "out", "--device", "cpu", "--quick", PYTHON=fails)
    assert done.returncode == 0
    codes = {line["part"]: line["exit"] for line in lines_of(tmp_path / "out")}
    assert codes == {name: 3 if name in ("verify", "speed") else 0 for name in PARTS}
    log = (tmp_path / "out/log.txt").read_text()
    assert sorted(log.splitlines()) == sorted(
        done.stdout.splitlines()
    )  # parts that run at once may be shown in another order
    assert "[speed] broken" in log
    assert "[memory] ran -m gpu.memory --device cpu --quick" in log


def test_a_part_that_hangs_is_ended_and_the_rest_are_told_to_have_no_time(tmp_path: Path) -> None:
    hangs = interpreter(tmp_path, 'case "$*" in *gpu.machine*) exec sleep 60;; esac')
    run(tmp_path / "out", "--device", "cpu", PYTHON=hangs, DEADLINE="6")
    first, *rest = lines_of(tmp_path / "out")
    assert (first["part"], first["exit"]) == ("machine", 124)
    assert {line["part"]: line.get("skipped") for line in rest} == dict.fromkeys(PARTS[1:], "no time was left")


def test_some_parts_only_in_the_scripts_order_and_told_when_they_end(tmp_path: Path) -> None:
    says = interpreter(tmp_path, 'echo "$* until $REVDISTILL_UNTIL commit $REVDISTILL_COMMIT"')
    run(tmp_path / "out", "--only", "gpt2=9,speed", PYTHON=says, DEADLINE="50", COMMIT="abc")
    assert [line["part"] for line in lines_of(tmp_path / "out")] == ["machine", "speed", "gpt2"]
    told = (tmp_path / "out/log.txt").read_text().splitlines()
    assert all(line.endswith("commit abc") for line in told[:3])
    until = [float(line.split(" until ")[1].split()[0]) for line in told[:3]]
    assert all(0 < moment - time.time() < 51 for moment in until)
    assert 30 < until[1] - until[2] < 50  # gpt2 has its own


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--fast"], "--fast"),
        (["--only", "speed,fast"], "--only fast: there is no such part; there are machine"),
        (["--only", "speed=soon"], "--only speed=soon: after = there must be a number of seconds"),
    ],
)
def test_an_unknown_option_is_refused(tmp_path: Path, options: list[str], named: str) -> None:
    done = run(tmp_path / "out", *options)
    assert done.returncode == 2
    assert named in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_way_back_can_be_called_outside_autograd() -> None:
    """As `launches` does to learn the lines at which the host waits; it uses up the unroll."""
    torch.manual_seed(0)
    for optimizer in launches.OPTIMIZERS:
        forward, back = launches.passes(tasks.make("tiny"), optimizer, 4)
        value = forward()
        launches.sweep_alone(value)
        with pytest.raises(RuntimeError):
            back(value)


LINES: list[dict[str, Any]] = [
    {"part": "machine", "quick": False, "machine": {"cores": 16, "processor": "a CPU"},
     "versions": {"python": "3", "torch": "2"}},
    {"part": "machine", "card": {"name": "A CARD", "bytes": 80e9, "cuda": "13"}, "driver": "580"},
    {"part": "tests", "test": "tests/cuda/a", "outcome": "passed", "seconds": 1.0},
    {"part": "tests", "test": "tests/cuda/b", "outcome": "failed", "seconds": 1.0, "error": "x\nassert 1 == 2 | 3"},
    {"part": "tests", "test": "tests/cuda/c", "outcome": "skipped", "seconds": 1.0, "reason": "no"},
    {"part": "verify", "kind": "bits", "name": "momentum 0.9", "found": "0.2", "passed": False, "seconds": 1.0},
    {"part": "speed", "task": "mlp", "title": "AN MLP", "steps": 100, "rounds": 5, "methods": [
        {"method": "autograd", "ms_per_step": 2.0, "ratio_to_autograd": 1.0, "disagreement": 0.0},
        {"method": "reversible", "ms_per_step": 3.0, "ratio_to_autograd": 1.51, "disagreement": 1e-12},
    ]},
    {"part": "speed", "task": "mlp", "title": "AN MLP", "steps": 100, "rounds": 3, "methods": [
        {"method": "autograd", "ms_per_step": 9.0, "ratio_to_autograd": 1.0, "disagreement": 0.0},
        {"method": "autograd-compiled", "ms_per_step": 1.2, "ratio_to_autograd": 0.63, "disagreement": 2e-7,
         "disagreement_dtype": "float32", "first_call_seconds": 33.3, "compile_warnings": []},
        {"method": "reversible-replayed", "error": "RuntimeError: no capture"},
    ]},
    {"part": "speed", "task": "tiny", "title": "TINY", "steps": 100, "rounds": 3, "methods": [
        {"method": "autograd", "ms_per_step": 2.0, "ratio_to_autograd": 1.0, "disagreement": 0.0},
        {"method": "reversible-replayed", "ms_per_step": 0.5, "ratio_to_autograd": 0.25, "disagreement": 1e-12,
         "disagreement_dtype": "float64", "first_call_seconds": 1.5, "compile_warnings": ["it was dropped"]},
    ]},
    {"part": "speed", "task": "tiny", "title": "TINY", "steps": 100, "theta_equal": True,
     "hypergradient_equal": False, "theta_differs_by": 0.0, "hypergradient_differs_by": 3e-8},
    {"part": "speed", "task": "lenet", "method": "autograd-compiled", "error": "TimeoutError: not done within 60 s"},
    {"part": "kernels", "optimizer": "sgd", "parameters": 10_000_000, "form": "one kernel for all", "way": "back",
     "microseconds": 250.0, "bytes_per_parameter": 64.0, "gigabytes_per_second": 2560.0,
     "share_of_copy": 0.948, "copy_gigabytes_per_second": 2700.0, "exact": True},
    {"part": "kernels", "optimizer": "sgd", "parameters": 100_000, "form": "one kernel for all",
     "error": "ImportError: no fusing"},
    {"part": "long", "task": "mlp", "title": "AN MLP", "steps": 100_000, "parameters": 89_610,
     "seconds_forward": 20.0, "seconds_back": 60.0, "peak_bytes": 12 * 2**20, "state_bytes": 1,
     "history_bytes": 160 * 2**20, "bits_per_parameter_step": 0.1499, "amplification": 1.5, "finite": True,
     "compile_warnings": []},
    {"part": "gpt2", "batch": 1, "length": 512, "steps": 1, "compile": False, "probe": True, "peak_bytes": 1},
    {"part": "gpt2", "needed_for_the_whole_batch": 250 * 2**30, "whole_batch": 64, "memory": 8e10, "fits": 16},
    {"part": "gpt2", "batch": 16, "length": 512, "steps": 72, "compile": False,
     "error": "OutOfMemoryError: CUDA out of memory"},
    {"part": "gpt2", "batch": 8, "length": 512, "steps": 30, "compile": False, "parameters": 124_046_592,
     "seconds_forward": 0.25, "seconds_back": 0.75, "peak_bytes": 40 * 2**30, "state_bytes": 1,
     "history_bytes": 0, "finite": True, "compile_warnings": []},
    {"part": "memory", "task": "mlp", "method": "reversible", "steps": 100, "bytes": 3 * 2**20, "seconds": 1.0},
    {"part": "memory", "task": "mlp", "method": "autograd", "steps": 100,
     "error": "OutOfMemoryError: CUDA out of memory"},
    {"part": "launches", "task": "mlp", "optimizer": "sgd", "way": "back",
     "per_step": {"kernel": 150.5, "Memset": 0.0}},
    {"part": "launches", "task": "mlp", "optimizer": "sgd", "way": "forward", "waits": 2, "steps": 32,
     "where": {"guard.py:9": 2}},
    {"part": "capture", "task": "mlp", "title": "AN MLP", "what": "gradient", "eager_ms": 1.0,
     "captured": True, "bit_equal": True,
     "replay_ms": 0.1},
    {"part": "capture", "task": "mlp", "title": "AN MLP", "what": "product", "eager_ms": 1.0,
     "captured": False, "reason": "E: no"},
    {"part": "compile", "task": "mlp", "title": "AN MLP", "steps": 100,
     "first_call_seconds": 40.4, "way_back_exact": True,
     "reversal_error": None, "warnings": ["dropped"], "other_warnings": []},
    {"part": "compile", "task": "mlp", "steps": 100, "theta_equal": False, "theta_differs_by": 1e-7},
    {"part": "compile", "task": "mlp", "steps": 100, "rounds": 5,
     "ms_per_step": {"autograd": 2.0, "reversible-compiled": 0.77}},
    {"part": "unrolls", "exit": 124, "seconds": 150.0},
]  # fmt: skip


def test_the_report_tells_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "cuda.jsonl"
    assert report_cuda.load(path) == []
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    text = report_cuda.section(report_cuda.load(path))
    for told in (
        "A CARD (80 GB, driver 580, CUDA 13)",
        "1 of 2 passed, not `tests/cuda/b`.",
        "0 of 1 passed, not `momentum 0.9`.",
        "| tests/cuda/b | assert 1 == 2 \\| 3 |",
        "| verify: momentum 0.9 | 0.2 |",
        "| Reversible, no graphs | 3.00 | 1.51 | - | 1e-12 |",
        "| plain autograd, torch.compile'd steps | 1.20 | 0.63 | 33.3 | 2e-07 (float32) |",
        "| Reversible, replayed | 0.50 | 0.25 | 1.5 | 1e-12 |",
        "replayed steps differ from eager's: the hypergradient by 3e-08 of its norm.",
        "Reversible, replayed: warned that it was dropped",
        "- speed mlp 100 reversible-replayed: RuntimeError: no capture",
        "- speed lenet autograd-compiled: TimeoutError: not done within 60 s",
        "| sgd | 10,000,000 | one kernel for all | back | 250.0 | 64 | 2,560 | 2,700 | 0.95 | yes |",
        "- kernels sgd 100000 one kernel for all: ImportError: no fusing",
        "T = 100,000 | 20.0 | 60.0 | 0.80 | 12.0 MiB | 160.0 MiB | 0.150 |",
        "a network of GPT-2's size (124.0 M parameters), float32",
        "| ours | 16 x 512 | 72 | OutOfMemoryError | - | - |",
        "| ours | 8 x 512 | 30 | 40.0 GiB | 0.25 | 0.75 |",
        "| 64 x 512 | 72 | 26.4 GiB | - | 11.10 |",
        "one of 64 needs 250 GiB at once",
        "| plain autograd | OutOfMemoryError |",
        "| sgd | back | 150.5 kernel |",
        "2 x guard.py:9",
        "| yes | 1.000 | 0.100 | 10.0 |",
        "not captured: E: no",
        "the first call took 40 s and came back bit for bit",
        "other bits than eager's, by 1e-07",
        "| Reversible, compiled | 0.77 |",
        "- unrolls: out of time",
    ):
        assert told in text
    assert text.count("| plain autograd | 2.00 | 1.00 |") == 2  # the MLP's as it was measured beside ours
    assert "| plain autograd | 9.00" not in text
    summary = report_cuda.summary(LINES)
    assert "| - | 1.51 |" in summary or "| 0.63 | 1.51 |" in summary
    assert "3.0 MiB" in summary
    assert "Step by step, a hypergradient takes 1.5 to 1.5 times as long as plain autograd." in summary
    assert "With replayed steps, a hypergradient takes 0.25 to 0.25 times" in summary


@pytest.mark.parametrize("kept", range(1, len(LINES)))
def test_a_report_of_what_there_was_time_for(kept: int) -> None:
    """Cut off anywhere after the first line, there is still a page."""
    for text in (report_cuda.section(LINES[:kept]), report_cuda.summary(LINES[:kept])):
        assert "torch 2" in text


@pytest.mark.slow
@pytest.mark.skipif(not standin.available(), reason="the stand-in device needs torch 2.9 or newer")
def test_a_dry_run_on_the_stand_in(tmp_path: Path) -> None:
    """Minutes on two cores: everything but what only a GPU has."""
    patient = ",".join(f"{name}=500" for name in PARTS)  # at once on few cores
    done = run(tmp_path, "--device", "standin", "--quick", "--only", patient, PYTHON=sys.executable)
    lines = lines_of(tmp_path)
    assert [line for line in lines if "error" in line] == [], done.stdout[-5000:]
    assert {line["part"]: line["exit"] for line in lines if "exit" in line} == dict.fromkeys(PARTS, 0), done.stdout[
        -5000:
    ]
    measured = {line["part"] for line in lines if "exit" not in line}
    assert measured == {"tests", *PARTS} - set(TESTS)
    for name in TESTS:
        of = [line for line in lines if line.get("test", "").startswith(f"tests/cuda/test_{name}.py")]
        assert {line["outcome"] for line in of} - {"skipped"} == ({"passed"} if name not in ONLY_ON_A_GPU else set())
    assert {line["way"] for line in lines if "way" in line} == {"forward", "back"}
    assert "## " in report_cuda.section(report_cuda.load(tmp_path / "cuda.jsonl"))
