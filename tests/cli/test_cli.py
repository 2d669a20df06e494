"""The command: every error of the user's is one line and exit code 2; a killed run goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from revdistill.cli import main as command
from revdistill.cli import train as train_command
from revdistill.cli.main import cli

import revdistill
from revdistill.attribute import plots as attribute_plots
from revdistill.distill import plots as distill_plots
from revdistill.distill.artifact import read
from revdistill.distill.checkpoint import read_config
from revdistill.distill.presets import settings
from revdistill.outer.directory import read_metrics
from tests.outer.test_image_files import write_mnist

QUICK = [
    "train",
    "--dataset",
    "moons",
    "--arch",
    "nonlinearnet",
    "--steps",
    "4",
    "--epochs",
    "2",
    "--outer-steps",
    "6",
    "--batch-size",
    "64",
]


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


def invoke(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = command.run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "moons"
    assert command.run([*QUICK, "--out", str(directory)]) == 0
    return directory


def test_a_whole_session_as_a_user_types_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = python("-m", "revdistill.cli", *QUICK, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "test accuracy" in done.stdout
    assert (tmp_path / "runs/moons/distilled.h5").exists()
    monkeypatch.chdir(tmp_path)
    code, shown, err = invoke("show", "runs/moons", capsys=capsys)
    assert (code, err) == (0, "")
    assert "4 batches of 2" in shown
    evaluation = ("evaluate", "runs/moons", "--json", "--restarts", "2", "--arch", "LinearNet")
    code, evaluated, err = invoke(*evaluation, capsys=capsys)
    assert (code, err) == (0, "")
    assert len(json.loads(evaluated)["LinearNet"]["accuracies"]) == 2
    assert invoke(*QUICK, capsys=capsys)[0] == 0  # never over a finished run
    assert (tmp_path / "runs/moons-2/distilled.h5").exists()
    with h5py.File(tmp_path / "runs/moons/distilled.h5") as a, h5py.File(tmp_path / "runs/moons-2/distilled.h5") as b:
        assert np.array_equal(a["x"][()], b["x"][()])  # the same seed, the same bits, in another process


_NOT_INSTALLED = """
import os, runpy, sys
import click, h5py, numba, torch  # once for all, as they take a second
folder, *modules = sys.argv[1:]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
sys.path[:] = [folder, *(p for p in sys.path if "editable" not in p)]
assert not [name for name in sys.modules if name.split(".")[0] in ("revdistill", "cli")]
for module in modules:
    child = os.fork()
    if child == 0:
        sys.argv = [module, "--version"]
        runpy.run_module(module, run_name="__main__")
        raise SystemExit("the command came back")
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_checkout_that_is_not_installed_runs(tmp_path: Path) -> None:
    """Regression: revdistill.cli was found where it is installed only, and so was the version."""
    modules = ["revdistill", "revdistill.cli", "cli"]
    root = Path(__file__).parents[2]
    for name in ("revdistill", "cli"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "setup.cfg", tmp_path)
    command = [sys.executable, "-c", _NOT_INSTALLED, str(tmp_path), *modules]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # a process that has more is not to be forked
    found = subprocess.run(command, cwd=tmp_path, env=one_thread, capture_output=True, text=True, timeout=300)
    assert (found.returncode, found.stderr) == (0, "")
    line = f"revdistill, version {revdistill.__version__} (torch "
    assert [text.startswith(line) for text in found.stdout.splitlines()] == [True, False] * len(modules)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--help"],
        ["train", "--help"],
        ["evaluate", "-h"],
        ["show", "--help"],
        ["verify", "--help"],
        ["attribute", "--help"],
        ["--version"],
    ):
        code, out, err = invoke(*arguments, capsys=capsys)
        assert (code, err) == (0, "")
        assert out
    assert revdistill.__version__ in out
    assert CliRunner().invoke(cli, ["train", "--help"]).exit_code == 0


BAD = {
    "no command": (["distill"], "No such command 'distill'"),
    "no option": (["train", "--step", "3"], "--step"),
    "not a number": (["train", "--steps", "many"], "--steps"),
    "zero": (["train", "--steps", "0"], "--steps"),
    "momentum": (["train", "--momentum", "1.5"], "--momentum"),
    "weight decay": (["train", "--weight-decay", "-1"], "--weight-decay"),
    "rate": (["train", "--lr", "-1"], "--lr"),
    "choice": (["train", "--init", "sometimes"], "'random', 'fixed'"),
    "architecture": (["train", "--arch", "VGG"], "--arch"),
    "own architecture": (["train", "--arch", "no.such:thing"], "cannot import 'no.such'"),
    "misfit": (["train", "--dataset", "moons", "--arch", "LeNet"], "at least 12 x 12"),
    "dataset": (["train", "--dataset", "digitz"], "--dataset: unknown dataset 'digitz'; accepted are digits"),
    "no file": (["train", "--dataset", "none.npz"], "--dataset: none.npz: no such file"),
    "device": (["train", "--device", "tpu"], "--device"),
    "seed": (["train", "--seed", "-1"], "--seed"),
    "resume nothing": (["train", "--resume", "--out", "nothing"], "--resume"),
    "no files": (
        ["train", "--dataset", "mnist", "--data-dir", "here"],
        "--dataset: mnist: no train-images-idx3-ubyte.gz or",
    ),
    "preset": (["train", "--preset", "worst"], "--preset"),
    "preset and resume": (["train", "--preset", "best", "--resume"], "--preset and --resume"),
    "window": (["train", "--window", "0"], "--window"),
    "augmented points": (
        ["train", "--dataset", "moons", "--augment", "flip"],
        "augment is ('flip',), but moons has no images",
    ),
    "learn momentum": (["train", "--momentum", "0", "--learn-momentum"], "momentum is 0.0"),
    "budget": (["train", "--budget", "1"], "--budget is 1, which is for --preset best; leave it out"),
    "budget of another": (["train", "--preset", "wang2018", "--budget", "10"], "--budget is 10, which is for --preset"),
    "another budget": (["train", "--preset", "best", "--budget", "5"], "'5' is not one of '1', '10'"),
    "smooth": (["train", "--smooth", "0.5"], "smooth is 0.5; accepted is 0 (ReLU) or a number from 1 to 10,000"),
    "smooth text": (["train", "--smooth", "very"], "'--smooth': 'very' is not a valid float"),
    "smooth negative": (["train", "--smooth=-1"], "No such option"),
    "smooth nan": (["train", "--smooth", "nan"], "smooth is nan; accepted is 0 (ReLU) or"),
    "pack": (["train", "--pack", "0"], "'--pack': 0 is not in the range 1<=x<=64"),
    "packed points": (["train", "--dataset", "moons", "--pack", "2"], "pack is 2, but the inputs have shape [2]"),
    "no tiles": (
        ["train", "--pack", "3"],
        "pack is 3, but images are 8 x 8, which 3 does not divide; accepted is 1, 2",
    ),
    "two forms": (["train", "--pack", "2", "--bases", "4"], "bases is 4; accepted is none with pack"),
    "bases": (
        ["train", "--bases", "17", "--steps", "2"],
        "bases is 17, but 20 synthetic images, of 16 numbers at half",
    ),
    "pool": (["train", "--pool", "4"], "pool is 4; accepted is 0 without a window: give window as well"),
    "window every": (["train", "--window-every", "0"], "--window-every"),
    "clip mean": (["train", "--clip-mean", "1"], "clip_mean is 1.0; accepted is 0 (none) or a number above 1"),
    "width": (["train", "--arch", "ConvNet-3:width=0"], "width is '0'; accepted is an integer from 1 to 1,024"),
    "evaluate nothing": (["evaluate"], "Missing argument 'RUN'"),
    "evaluate none": (["evaluate", "nowhere"], "RUN is 'nowhere'"),
    "evaluate empty": (["evaluate", "."], "holds no distilled.h5"),
    "schedule": (["evaluate", ".", "--schedule", "fast"], "--schedule"),
    "restarts": (["evaluate", ".", "--restarts", "0"], "--restarts"),
    "show none": (["show", "nowhere"], "RUN is 'nowhere'"),
    "another kind of file": (["train", "--dataset", __file__], "test_cli.py is a file of another kind; accepted are"),
    "no dataset": (["train", "--dataset", ""], "--dataset: unknown dataset ''"),
    "no text": (["train", "--dataset", os.fsdecode(b"caf\xe9.npz")], "caf\\udce9.npz': the path is not UTF-8"),
    "nowhere": (["train", "--out", ""], "'--out': is empty; accepted is a path"),
    "no time": (["train", "--save-every", "nan"], "--save-every"),
    "many steps": (
        ["train", "--steps", "1" + "0" * 12],
        "steps is 1000000000000; accepted is an integer from 1 to 1,000",
    ),
    "many epochs": (["train", "--epochs", "1" + "0" * 20], "accepted is an integer from 1 to 1,000,000"),
    "many restarts": (["evaluate", ".", "--restarts", "1" + "0" * 12], "--restarts"),
    "many outer steps": (["tune", "--outer-steps", "1" + "0" * 20], "outer_steps is 1"),
    "a rate of 0": (["train", "--lr", "1e-300"], "lr is 1e-300; accepted is a number of at least 1e-30"),
    "networks of one": (["train", "--init", "fixed", "--inits", "7"], "--inits is 7, but --init fixed has one network"),
    "one of one device": (["train", "--device", "cpu:3"], "device is 'cpu:3'; accepted are cpu, cuda and cuda:N"),
    "verify device": (["verify", "--device", "cuda:99"], "--device"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke(*arguments, capsys=capsys)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("revdistill: ")
    assert not list(tmp_path.iterdir())  # nothing left behind


OWN_CODE = {
    "own_syntax": ("def make(:", "importing 'own_syntax' failed (SyntaxError: "),
    "own_module": ("raise RuntimeError('boom')", "importing 'own_module' failed (RuntimeError: boom)"),
    "own_factory": (
        "def make(shape, classes):\n    raise KeyError('k')",
        "failed for inputs [2] and 2 classes: KeyError",
    ),
    "own_forward": (
        "import torch\nclass make(torch.nn.Linear):\n    def __init__(self, *_):\n        super().__init__(2, 2)\n"
        "    def forward(self, x):\n        return {}[0]",
        "does not take inputs [2]: KeyError: 0",
    ),
}


@pytest.mark.parametrize("name", [*OWN_CODE, ".own"])
def test_own_code_that_fails_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = OWN_CODE.get(name, ("", "importing '.own' failed (TypeError"))
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, err = invoke("train", "--dataset", "moons", "--arch", f"{name}:make", "--out", "run", capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_home_that_the_shell_has_not_put_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--out=~/run reaches the command as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    x, y = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 2
    np.savez(tmp_path / "a.npz", x=x, y=y)
    made = ["--steps", "1", "--epochs", "1", "--outer-steps", "1", "--arch", "LinearNet", "--out=~/run"]
    code, _, err = invoke("train", "--dataset=~/a.npz", *made, capsys=capsys)
    assert (code, err) == (0, "")
    assert (tmp_path / "run/distilled.h5").exists()
    assert invoke("show", "~/run", "--dataset", "~/a.npz", capsys=capsys)[0] == 0


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none(*_: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(train_command, "load", none)
    code, out, err = invoke("train", "--out", "nowhere", capsys=capsys)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "not enough memory; fewer of --steps" in err


def test_what_a_terminal_and_matplotlib_cannot_do_ends_no_run(tmp_path: Path) -> None:
    """A terminal of one script, a reader who goes away after a line, and a backend that is none."""
    names = np.array(["\u0436", "a"])
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=(40, 2)), y=names[np.arange(40) % 2])
    made = ["--steps", "1", "--epochs", "1", "--outer-steps", "1", "--arch", "LinearNet", "--out", "run"]
    command = [sys.executable, "-m", "revdistill.cli", "train", "--dataset", "a.npz", *made]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "MPLBACKEND": "nonsense"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"a.npz: ")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert (tmp_path / "run/plots/rates.png").exists()


def test_a_taken_directory_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "distilled.h5").read_bytes()
    code, _, err = invoke(*QUICK, "--out", str(finished), capsys=capsys)
    assert code == 2
    assert "--out" in err
    assert (finished / "distilled.h5").read_bytes() == before


@pytest.mark.parametrize("name", ["train", "tune"])
def test_data_that_changed_meanwhile_are_not_gone_on_with(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result would be of no data at all. Checkpoints of earlier releases do not tell, and are gone on with."""
    monkeypatch.chdir(tmp_path)
    x, y = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 2
    np.savez("a.npz", x=x, y=y)
    made = ["--steps", "2", "--outer-steps", "1", "--arch", "LinearNet", "--dataset", "a.npz", "--out", "run"]
    assert invoke(name, *made, capsys=capsys)[0] == 0
    resume = [name, "--resume", "--out", "run"]
    np.savez("a.npz", x=x.astype(np.float64), y=y, about="the same data in another file")
    assert invoke(*resume, capsys=capsys)[0] == 0
    for changed in ({"x": x, "y": 1 - y}, {"x": x * 1.001, "y": y}, {"x": np.c_[x, x], "y": y}):
        np.savez("a.npz", **changed)
        code, _, err = invoke(*resume, capsys=capsys)
        assert (code, err.count("\n")) == (2, 1)
        assert f"run with other data: {tmp_path}/a.npz was changed, or is another file, " in err
    np.savez("a.npz", x=x * 1.001, y=y)
    with h5py.File("run/checkpoint.h5" if name == "train" else "run/tuning.h5", "a") as file:
        del file.attrs["data"]
    assert invoke(*resume, capsys=capsys)[0] == 0


def test_a_training_and_a_tuning_do_not_share_a_directory(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each would overwrite the other's log."""
    before = (finished / "metrics.jsonl").read_bytes()
    assert before
    code, _, err = invoke("tune", "--dataset", "moons", "--arch", "LinearNet", "--out", str(finished), capsys=capsys)
    assert code == 2
    assert f"--out: {finished} already holds the metrics.jsonl of another job; give another directory" in err
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_data_that_are_normalised_in_another_way_are_said(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 2
    np.savez(tmp_path / "a.npz", x=x, y=y)
    evaluate = ["evaluate", str(finished), "--restarts", "1"]
    assert invoke(*evaluate, capsys=capsys)[2] == ""
    code, _, err = invoke(*evaluate, "--dataset", str(tmp_path / "a.npz"), capsys=capsys)
    assert code == 0
    assert "normalised by their own training part: mean 0." in err
    assert "the data that were distilled by mean 0, 0, standard deviation 1, 1" in err


def test_resume_with_another_option_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = invoke("train", "--resume", "--out", str(finished), "--lr", "0.5", capsys=capsys)
    assert code == 2
    assert "--lr is 0.5, but the run in" in err
    assert "has 0.05" in err


def test_resuming_a_finished_run_changes_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(finished / "distilled.h5") as f:
        before = f["x"][()]
    assert invoke("train", "--resume", "--out", str(finished), capsys=capsys)[0] == 0
    with h5py.File(finished / "distilled.h5") as f:
        assert np.array_equal(f["x"][()], before)


def test_evaluate_with_every_schedule(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for schedule in ("raw", "strategy1", "strategy2", "strategy3"):
        code, out, _ = invoke("evaluate", str(finished), "--schedule", schedule, "--restarts", "2", capsys=capsys)
        assert code == 0
        assert schedule in out


def test_a_file_does_not_choose_what_is_imported(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "distilled.h5").write_bytes((finished / "distilled.h5").read_bytes())
    with h5py.File(tmp_path / "distilled.h5", "a") as f:
        f.attrs["architectures"] = json.dumps(["antigravity:fly"])
    code, _, err = invoke("evaluate", str(tmp_path), capsys=capsys)
    assert code == 2
    assert "--arch antigravity:fly" in err
    assert "antigravity" not in sys.modules
    assert invoke("show", str(tmp_path), capsys=capsys)[0] == 0
    with h5py.File(tmp_path / "distilled.h5", "a") as f:
        f.attrs["architectures"] = json.dumps(["antigravity"])
    for name in ("show", "evaluate"):  # regression: without a colon it was imported
        code, _, err = invoke(name, str(tmp_path), capsys=capsys)
        assert (code, err.count("\n")) == (2, 1)
        assert "unknown architecture 'antigravity'" in err
    assert "antigravity" not in sys.modules


def test_a_preset_gives_way_to_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "run"
    quick = ["--preset", "wang2018", "--outer-steps", "1", "--epochs", "1", "--dataset", "digits", "--inits", "1"]
    assert invoke("train", *quick, "--out", str(directory), capsys=capsys)[0] == 0
    config = read(directory / "distilled.h5").config
    asked = {"outer_steps": 1, "epochs": 1, "inits": 1}
    assert {name: config[name] for name in settings("wang2018", "digits", ())} == settings(
        "wang2018", "digits", ()
    ) | asked
    assert config["architectures"] == ["MLP"]


def test_images_are_trained_shown_and_evaluated_from_their_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, run = ["--data-dir", str(write_mnist(tmp_path / "files"))], tmp_path / "run"
    quick = [
        "--preset",
        "best",
        "--dataset",
        "mnist",
        "--epochs",
        "3",
        "--outer-steps",
        "2",
        "--per-class",
        "1",
        "--batch-size",
        "20",
    ]
    code, out, _ = invoke("train", *quick, *files, "--out", str(run), capsys=capsys)
    assert code == 0
    assert "LeNet" in out
    assert str(tmp_path) not in read(run / "distilled.h5").config.values()  # goes to other machines
    assert invoke("evaluate", str(run), *files, "--restarts", "2", capsys=capsys)[0] == 0
    code, _, err = invoke("evaluate", str(run), "--data-dir", str(tmp_path / "none"), capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "mnist: no train-images" in err
    assert invoke("show", str(run), capsys=capsys)[0] == 0  # needs no data
    assert (run / "plots/images.png").exists()
    resumed = ["train", "--resume", "--out", str(run)]
    assert invoke(*resumed, *files, capsys=capsys)[0] == 0
    assert invoke(*resumed, capsys=capsys)[0] == 2


def test_a_damaged_artifact_is_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (finished / "distilled.h5").read_bytes()
    (tmp_path / "distilled.h5").write_bytes(whole[: len(whole) // 2])
    for name in ("evaluate", "show"):
        code, out, err = invoke(name, str(tmp_path), capsys=capsys)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "distilled.h5" in err


def _long(directory: Path, *extra: str) -> list[str]:
    return [*QUICK[:-4], "--outer-steps", "30", "--batch-size", "64", "--out", str(directory), *extra]


def _process(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "revdistill.cli", *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and len(path.read_text().splitlines()) >= count):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _distilled(directory: Path) -> list[np.ndarray]:
    with h5py.File(directory / "distilled.h5") as f:
        return [f[name][()] for name in ("x", "y", "lr", "momentum")]


@pytest.mark.usefixtures("heard_signals")
def test_kill_and_ctrl_c_and_resume_give_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is stopped has a process of its own; what is not goes on in this one."""
    part = _process(_long(tmp_path / "part", "--save-every", "0"))
    _wait_for_lines(tmp_path / "part/metrics.jsonl", 6)
    part.kill()
    part.communicate()
    assert not (tmp_path / "part/distilled.h5").exists()

    resume = ["train", "--resume", "--out", str(tmp_path / "part")]
    second = _process(resume)
    _wait_for_lines(tmp_path / "part/metrics.jsonl", 12)
    second.send_signal(signal.SIGSTOP)  # alive, and in the middle of it
    code, _, err = invoke(*resume, capsys=capsys)
    assert code == 2
    assert f"in use by another run (process {second.pid})" in err
    second.send_signal(signal.SIGCONT)
    second.send_signal(signal.SIGINT)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 130
    assert f"revdistill train --resume --out {tmp_path / 'part'}" in err
    assert "Traceback" not in err

    code, out, err = invoke(*resume, capsys=capsys)
    assert (code, err) == (0, "")
    assert "resuming after outer step" in out
    assert command.run(_long(tmp_path / "whole")) == 0
    for a, b in zip(_distilled(tmp_path / "part"), _distilled(tmp_path / "whole"), strict=True):
        assert np.array_equal(a, b)
    logged = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("part", "whole")]
    part_lines, whole_lines = (
        [line | {"seconds": 0} for line in lines] for lines in logged
    )  # the time alone may differ
    assert part_lines == whole_lines


NOBODY = 65534


@pytest.mark.parametrize("name", ["train", "tune", "attribute"])
@pytest.mark.parametrize("place", ["/proc/nope/x", "file/run", "kept/run", "kept"])
def test_where_nothing_can_be_kept(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: exit code 1, after the data had been read. It is one line, before any work, and leaves nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "kept").mkdir(mode=0o555)
    for module in ("train", "tune", "attribute"):
        monkeypatch.setattr(f"revdistill.cli.{module}.load", lambda *_: pytest.fail("it began to work"))
    is_root = os.geteuid() == 0
    if is_root and place.startswith("kept"):
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
                folder.chmod(folder.stat().st_mode | 0o011)
        os.seteuid(NOBODY)  # root may write anywhere
    try:
        code, out, err = invoke(name, "--out", place, capsys=capsys)
    finally:
        if is_root:
            os.seteuid(0)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--out: {place} cannot be made or written to (" in err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "kept"]


def test_a_run_that_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, command_name in (("checkpoint.h5", "train"), ("tuning.h5", "tune")):
        directory = tmp_path / command_name
        directory.mkdir()
        (directory / file).write_bytes(b"")
        for name in ("show", "evaluate"):
            code, _, err = invoke(name, str(directory), capsys=capsys)
            assert code == 2
            assert f"holds no distilled.h5 but the {file} of a" in err
            assert f"(revdistill {command_name} --resume --out {directory})" in err


def test_completion_shows_what_users_call() -> None:
    names = {name for name in dir(revdistill) if not name.startswith("__")}
    assert names == set(revdistill.__all__)
    assert {"schedule_lr", "Schedule", "ScheduleLR", "unroll"} <= names
    assert all(hasattr(revdistill, name) for name in dir(revdistill))


@pytest.mark.slow
def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = invoke("verify", "--device", "cpu", capsys=capsys)
    assert (code, err) == (0, "")
    assert "all checks passed" in out
    assert "FAILED" not in out


def test_verify_fails_with_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from revdistill.engine import selfcheck

    monkeypatch.setattr(selfcheck, "EXACT_STEPS", 5)
    monkeypatch.setattr(selfcheck, "BIT_STEPS", 500)
    monkeypatch.setattr(selfcheck, "TOLERANCE", 0.0)
    code, out, _ = invoke("verify", "--device", "cpu", capsys=capsys)
    assert code == 1
    assert "gradients" in out
    assert "FAILED" in out


@pytest.fixture
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (distill_plots, attribute_plots):
        monkeypatch.setattr(module, "draw_all", lambda *_: [])


@pytest.mark.usefixtures("_without_pictures")
def test_a_width_goes_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through every command that trains, in its canonical form."""
    x = np.random.default_rng(0).normal(size=(60, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(60) % 2)
    data = ["--dataset", str(tmp_path / "a.npz")]
    given, named = ["--arch", "convnet-3:norm=group,width=2"], "ConvNet-3:width=2,norm=group"
    once, out = ["--outer-steps", "1", "--batch-size", "20"], tmp_path / "run"
    made = ["--steps", "1", "--epochs", "1", "--pack", "2", "--zca", "--smooth"]
    code, said, err = invoke("train", *data, *given, *once, *made, "--out", str(out), capsys=capsys)
    assert (code, err) == (0, "")
    assert "8 (1 batches of 8, stored as 128 numbers), 1 inner steps, ConvNet-3:width=2,norm=group, 1" in said
    found = read(out / "distilled.h5")
    assert (found.architectures, list(found.evaluation)) == ([named], [named])
    shown = " ".join(invoke("show", str(out), capsys=capsys)[1].split())
    assert "stored 128 numbers: each image 2 x 2 smaller ones" in shown
    assert re.search(r"whitened ZCA, \d+ components", shown)
    code, said, _ = invoke("evaluate", str(out), *data, "--restarts", "1", "--json", capsys=capsys)
    assert (code, list(json.loads(said))) == (0, [named])
    few = ["--examples", "20", "--epochs", "1", "--batch-size", "10", "--queries", "2"]
    for name, more in (("tune", ["--steps", "2", *once]), ("attribute", few)):
        code, _, err = invoke(name, *data, *given, *more, "--out", str(tmp_path / name), capsys=capsys)
        assert (code, err) == (0, ""), name


@pytest.mark.parametrize(("given", "beta"), [(["--smooth"], 60.0), (["--smooth", "20"], 20.0), ([], 0.0)])
def test_smooth_has_a_value_or_none(
    given: list[str], beta: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stands."""
    seen = []

    def stop(config: object, *_: object) -> None:
        seen.append(config.smooth)  # type: ignore[attr-defined]
        raise ValueError("seen")

    monkeypatch.setattr(train_command, "Distiller", stop)
    for arguments in (["--dataset", "moons", *given], [*given, "--dataset", "moons"]):
        assert command.run(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert seen == [beta, beta]


@pytest.mark.usefixtures("_without_pictures")
def test_bases_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In what is printed at the start and by `show`; learned labels can be turned off."""
    out = tmp_path / "run"
    made = ["--steps", "1", "--epochs", "1", "--outer-steps", "1", "--arch", "LinearNet", "--bases", "3"]
    code, said, err = invoke(
        "train", "--preset", "best", "--no-learn-labels", *made, "--window", "1", "--pool", "2", "--clip-mean", "2",
        "--per-class", "1", "--grow", "0", "--inits", "1", "--out", str(out), capsys=capsys,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "10 (1 batches of 10, stored as 78 numbers)" in said
    shown = " ".join(invoke("show", str(out), capsys=capsys)[1].split())
    assert "stored 78 numbers: 3 bases labels hard" in shown


def test_training_with_weight_decay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is in the result, in `show`, and where `evaluate` trains."""
    out = tmp_path / "run"
    assert invoke(*QUICK, "--weight-decay", "0.125", "--out", str(out), capsys=capsys)[0] == 0
    assert read(out / "distilled.h5").weight_decay == 0.125
    assert re.search(r"weight decay +0\.125", invoke("show", str(out), capsys=capsys)[1])
    assert invoke("evaluate", str(out), "--restarts", "2", capsys=capsys)[0] == 0


def test_training_with_adam(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The inner optimizer is in the result, in `show`, and in what `evaluate` trains with."""
    out = tmp_path / "run"
    code, _, err = invoke(
        *QUICK, "--optimizer", "adam", "--lr", "0.01", "--momentum", "0.8", "--out", str(out), capsys=capsys
    )
    assert (code, err) == (0, "")
    found = read(out / "distilled.h5")
    assert found.optimizer == "adam"
    assert found.momentum == pytest.approx(0.8)
    assert "beta1" in invoke("show", str(out), capsys=capsys)[1]
    assert invoke("evaluate", str(out), "--restarts", "2", capsys=capsys)[0] == 0
    code, _, err = invoke("evaluate", str(out), "--schedule", "strategy1", capsys=capsys)
    assert code == 2
    assert "schedule is 'strategy1', whose rates are for SGD" in err
    code, _, err = invoke(
        *QUICK, "--optimizer", "adam", "--momentum", "1", "--out", str(tmp_path / "other"), capsys=capsys
    )
    assert code == 2
    assert "momentum is 1.0; accepted is a number below 1" in err


def mounted(folder: Path, size: str) -> bool:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    return done.returncode == 0


_FULL = """
import os, sys
from revdistill.cli.main import run

disk, *made = sys.argv[1:]
first = run([*made, "--out", os.path.join(disk, "run")])
status = os.statvfs(disk)
with open(os.path.join(disk, "more"), "wb") as file:  # now really full
    file.write(bytes(status.f_bavail * status.f_frsize))
print("really full", file=sys.stderr, flush=True)
print("exit codes", first, run([*made, "--out", os.path.join(disk, "other")]))
"""


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_the_command_on_a_disk_that_is_full(tmp_path: Path) -> None:
    """A real one. Regression: HDF5 ended the process with a segmentation fault when it closed a file on a full disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted(disk, "40k"):
        pytest.skip("this system does not let root mount a tmpfs")
    try:
        (disk / "ballast").write_bytes(bytes(4096))
        done = python("-c", _FULL, str(disk), *QUICK, "--save-every", "0", cwd=tmp_path)
        assert done.returncode == 0, done.stderr  # of the process: no signal has ended it
        assert "Traceback" not in done.stderr
        assert "Segmentation" not in done.stderr
        # checkpoints are replaced, which needs room for two: one fits here, with little beside it
        first, full = re.findall(r"^exit codes (\d+) (\d+)$", done.stdout, flags=re.M)[0]
        assert first in "01"
        assert full == "1"
        said = done.stderr.split("really full\n")[1]
        assert "No space left" in said
        assert said.count("\n") == 1
        saved = read_config(disk / "run" / "checkpoint.h5")
        assert saved.outer_steps == 6
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_checkpoint_of_another_version(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of this format, it is resumed with a note; of another one, it is refused."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with h5py.File(run / "checkpoint.h5", "a") as file:
        file.attrs["revdistill_version"] = "9.9.9"
    code, _, err = invoke("train", "--resume", "--out", str(run), capsys=capsys)
    assert code == 0
    assert "note: the checkpoint was written by revdistill 9.9.9, this is" in err
    with h5py.File(run / "checkpoint.h5", "a") as file:
        file.attrs["format_version"] = 99
    code, _, err = invoke("train", "--resume", "--out", str(run), capsys=capsys)
    assert code == 2
    assert "format version 99" in err
