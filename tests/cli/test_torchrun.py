"""torchrun starts the command: the same files byte for byte for any number of processes; what ends one ends all."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from revdistill.cli import main as command

from revdistill.outer.directory import read_metrics
from tests.torchrun import launched, ranks_of

MOONS = ["--dataset", "moons", "--device", "cpu"]
TRAIN = ["train", *MOONS, "--arch", "nonlinearnet", "--arch", "linearnet", "--inits", "3", "--steps", "3", "--epochs"]
TRAIN += ["2", "--outer-steps", "5", "--batch-size", "32"]
TUNE = ["tune", *MOONS, "--arch", "nonlinearnet", "--inits", "3", "--steps", "6", "--outer-steps", "4", "--per-layer"]
TUNE += ["--learn", "lr,momentum"]
ATTRIBUTE = ["attribute", *MOONS, "--arch", "nonlinearnet", "--examples", "60", "--epochs", "1", "--queries", "4"]
ATTRIBUTE += ["--check", "--retrainings", "11", "--flip", "0.1"]
DIVERGING = [*TRAIN, "--lr", "9000", "--outer-steps", "20"]
FILES = ["run/distilled.h5", "run/checkpoint.h5", "tuning/schedule.h5", "tuning/schedule.json", "tuning/tuning.h5"]
FILES += ["attribution/attribution.h5", "attribution/attributing.h5", "attribution/flipped.json"]
FILES += ["attribution/harmful.csv"]
ONE = ["--side-by-side", "1"]
SECONDS = 15  # in which processes end once one is gone


def commands(directory: Path, *options: str) -> list[list[str]]:
    """That make FILES in the directory, and print an evaluation."""
    return [
        [*TRAIN, *options, "--out", str(directory / "run")],
        [*TUNE, *options, "--out", str(directory / "tuning")],
        [*ATTRIBUTE, "--out", str(directory / "attribution")],
        ["evaluate", str(directory / "run"), "--arch", "MLP", "--restarts", "3", "--json", "--device", "cpu"],
    ]


def free_ports(count: int) -> list[int]:
    """Below those that systems give to whoever asks for any, as the processes do meanwhile."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10000, 30000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
    return found


def driven(processes: int, directory: Path, jobs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Of each job what each rank has of it."""
    directory.mkdir(exist_ok=True)
    ports = free_ports(len(jobs))
    (directory / "jobs.json").write_text(
        json.dumps([job | {"port": port} for job, port in zip(jobs, ports, strict=True)])
    )
    script = str(Path(__file__).with_name("driven.py"))
    with launched(processes, script, str(directory / "jobs.json"), str(directory)) as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    each = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(processes)]
    return [list(results) for results in zip(*each, strict=True)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Without torchrun: FILES in the directory, and the evaluation."""
    directory = tmp_path_factory.mktemp("one")
    *jobs, evaluation = commands(directory, *ONE)
    for arguments in jobs:
        assert command.run(arguments) == 0
    found = run_quietly(evaluation)
    return directory, json.loads(found)


def run_quietly(arguments: list[str]) -> str:
    import io
    from contextlib import redirect_stdout

    out = io.StringIO()
    with redirect_stdout(out):
        assert command.run(arguments) == 0
    return out.getvalue()


def differing(a: Path, b: Path) -> list[str]:
    return [name for name in FILES if (a / name).read_bytes() != (b / name).read_bytes()]


SIGNAL = "a signal to one"
EVENTS: dict[str, dict[str, Any]] = {
    SIGNAL: {"rank": 1, "step": 2, "event": "sigterm"},
    "no memory on one": {"rank": 1, "step": 2, "event": "memory"},
    "a bug on one": {"rank": 1, "step": 2, "event": "bug"},
    "no data on one": {"rank": 1, "step": 0, "event": "no data"},
    "a full disk": {"rank": 0, "step": 3, "event": "full disk"},
    "a drift": {"rank": 1, "step": 4, "event": "drift"},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """On 2 processes: FILES, and what became of each command; one is told to stop."""
    directory = tmp_path_factory.mktemp("two")
    jobs: dict[str, dict[str, Any]] = {
        name: {"arguments": arguments}
        for name, arguments in zip(("train", "tune", "attribute", "evaluate"), commands(directory), strict=True)
    }
    jobs |= {SIGNAL: event_of(SIGNAL, directory), "a bad option": {"arguments": [*TRAIN, "--steps", "-1"]}}
    found = driven(2, directory, list(jobs.values()))
    return directory, dict(zip(jobs, found, strict=True))


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """On 2 processes: what became of commands with which something went wrong on one."""
    directory = tmp_path_factory.mktemp("troubled")
    jobs = {name: event_of(name, directory) for name in EVENTS}
    jobs["a directory that is taken"] = {"arguments": [*TRAIN, "--out", str(directory / SIGNAL)]}
    jobs["diverging"] = {"arguments": [*DIVERGING, "--out", str(directory / "diverging")]}
    found = driven(2, directory, list(jobs.values()))
    return directory, dict(zip(jobs, found, strict=True))


def event_of(name: str, directory: Path) -> dict[str, Any]:
    return {"arguments": [*TRAIN, "--out", str(directory / name)], **EVENTS[name]}


def test_two_processes_make_the_files_of_one(one_process: Any, two: Any) -> None:
    (one, evaluation), (directory, found) = one_process, two
    for name in ("train", "tune", "attribute", "evaluate"):
        assert [rank["code"] for rank in found[name]] == [0] * 2, found[name]
        assert not any(rank["out"] for rank in found[name][1:])
    assert differing(one, directory) == []
    assert json.loads(found["evaluate"][0]["out"]) == evaluation
    assert "3 networks of each architecture in stacks of 1, on 2 processes" in found["train"][0]["out"]
    for job in ("run", "tuning"):
        lines = [[line | {"seconds": 0} for line in read_metrics(d / job / "metrics.jsonl")] for d in (one, directory)]
        assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        (SIGNAL, 143, r"stopped after outer step 3 of 5; go on with:\n  revdistill train --resume .*"),
        ("a bad option", 2, r"revdistill: Invalid value for '--steps': -1 .*"),
    ],
)
def test_what_one_process_has_all_have(two: Any, name: str, code: int, said: str) -> None:
    check_told(two[1][name], name, code, said)


@pytest.mark.slow  # quickly, with threads as ranks: tests/outer/test_ranks.py
@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("no memory on one", 1, r"revdistill: not enough memory; .*"),
        ("a bug on one", 1, r"revdistill: rank 1 failed: KeyError: 'nobody thought of this'"),
        ("no data on one", 2, r"revdistill: on rank 1: --dataset: no such file"),
        ("a full disk", 1, r"(?s).*took nothing.*revdistill: .* took no checkpoint of outer step 5, nor did .*"),
        ("a drift", 1, r"revdistill: rank 1 has not what rank 0 has after step 5; .* the same number of threads .*"),
        ("a directory that is taken", 2, r"revdistill: --out: .* already holds a run; .*"),
        ("diverging", 1, r"revdistill: 10 outer steps in a row diverged; .*"),
    ],
)
def test_what_goes_wrong_on_one_does_on_all(troubled: Any, name: str, code: int, said: str) -> None:
    check_told(troubled[1][name], name, code, said)


def check_told(ranks: list[dict[str, Any]], name: str, code: int, said: str) -> None:
    """The same exit code, and one of them says why."""
    codes = [rank["code"] for rank in ranks]
    assert codes == [code] * len(codes)
    assert re.fullmatch(said, ranks[0]["err"].rstrip("\n")), ranks[0]["err"]
    if name == "a bug on one":  # shown where it is
        assert re.fullmatch(r"(?s)Traceback .*\nKeyError: 'nobody thought of this'\n", ranks[1]["err"])
    else:
        assert ranks[1]["err"] == ""
    assert all(rank["seconds"] < SECONDS for rank in ranks)


@pytest.mark.slow
def test_steps_that_diverge_say_the_same(troubled: Any, tmp_path: Path) -> None:
    """The first network that leaves the range is named, whichever process it is on."""
    assert command.run([*DIVERGING, *ONE, "--out", str(tmp_path / "run")]) == 1
    one, several = (
        [line["diverged"] for line in read_metrics(d / "metrics.jsonl")]
        for d in (tmp_path / "run", troubled[0] / "diverging")
    )
    assert len(one) == 9
    assert one == several


def test_what_a_signal_stopped_goes_on_without_torchrun(one_process: Any, two: Any) -> None:
    directory = two[0] / "a signal to one"
    assert command.run(["train", "--resume", "--out", str(directory)]) == 0
    expected = one_process[0] / "run" / "distilled.h5"
    assert (directory / "distilled.h5").read_bytes() == expected.read_bytes()


LONG = [
    "train",
    *MOONS,
    "--arch",
    "nonlinearnet",
    "--inits",
    "2",
    "--steps",
    "3",
    "--epochs",
    "4",
    "--outer-steps",
    "40",
]
LONG += ["--batch-size", "32"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("long") / "run"
    assert command.run([*LONG, *ONE, "--out", str(directory)]) == 0
    return directory


def killed(directory: Path, processes: int, victim: int, after: int) -> None:
    """Start LONG, kill -9 a rank once a step is logged, and check how the others end."""
    arguments = [*LONG, "--out", str(directory), "--save-every", "0.3"]
    with launched(processes, "-m", "revdistill", *arguments) as process:
        wait_for(process, directory / "metrics.jsonl", after)
        os.kill(ranks_of(process)[victim], signal.SIGKILL)
        started = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - started < SECONDS
    lines = [line for line in err.splitlines() if line.startswith("revdistill: ")]
    assert len(lines) == 1, err
    assert re.match(rf"revdistill: rank {victim} of {processes} is gone \(its process, \d+, has ended\)", lines[0])
    assert sorted(map(int, re.findall(r"exitcode  : (-?\d+)", err))) == [-9, *[1] * (processes - 1)]


def wait_for(process: subprocess.Popen[str], log: Path, step: int) -> None:
    until = time.monotonic() + 60
    while not log.exists() or not any(line["step"] >= step for line in read_metrics(log)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def resumed_is(directory: Path, processes: int, uninterrupted: Path) -> None:
    with launched(processes, "-m", "revdistill", "train", "--resume", "--out", str(directory)) as process:
        _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    same(directory, uninterrupted)


def same(directory: Path, uninterrupted: Path) -> None:
    for name in ("distilled.h5", "checkpoint.h5"):
        assert (directory / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    lines = [[line | {"seconds": 0} for line in read_metrics(d / "metrics.jsonl")] for d in (directory, uninterrupted)]
    assert lines[0] == lines[1]


def test_a_killed_process_ends_all_and_the_run_goes_on_in_one(tmp_path: Path, uninterrupted: Path) -> None:
    killed(tmp_path / "run", 2, 1, after=3)
    assert command.run(["train", "--resume", "--out", str(tmp_path / "run")]) == 0
    same(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_process_killed_at_a_random_step(tmp_path: Path, uninterrupted: Path, seed: int) -> None:
    draw = random.Random(seed)
    processes = draw.choice([2, 3, 4])
    killed(tmp_path / "run", processes, draw.randrange(processes), after=draw.randrange(25))
    resumed_is(tmp_path / "run", draw.choice([1, 2, 3]), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3, 4])
def test_any_number_of_processes_makes_the_files_of_one(tmp_path: Path, one_process: Any, processes: int) -> None:
    directory = tmp_path / "run"
    found = driven(processes, directory, [{"arguments": arguments} for arguments in commands(directory)])
    assert [rank["code"] for ranks in found for rank in ranks] == [0] * 4 * processes
    assert differing(one_process[0], directory) == []
    assert json.loads(found[3][0]["out"]) == one_process[1]


@pytest.mark.slow
@pytest.mark.usefixtures("heard_signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_torchrun_is_told_to_stop(tmp_path: Path, uninterrupted: Path, name: str) -> None:
    directory = tmp_path / "run"
    with launched(2, "-m", "revdistill", *LONG, "--out", str(directory)) as process:
        wait_for(process, directory / "metrics.jsonl", 2)
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=60)
    assert err.count("stopped after outer step") == 1
    resumed_is(directory, 3, uninterrupted)
