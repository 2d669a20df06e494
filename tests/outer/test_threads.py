"""How many threads a command computes with: by the size of the work, and as the run that is resumed began."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from revdistill.cli import main as command
from torch import nn

from revdistill.attribute.config import AttributeConfig
from revdistill.distill import checkpoint as checkpoints
from revdistill.distill.artifact import read
from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.outer.data import load
from revdistill.outer.networks import NetworkStack
from revdistill.outer.threads import MOST_THREADS, SMALL, default_threads, own_threads, shown, using_threads
from revdistill.tune.config import TuneConfig

CPU = torch.device("cpu")
QUICK = ["--dataset", "moons", "--arch", "linearnet", "--device", "cpu"]
COMMANDS = {
    "train": [*QUICK, "--steps", "2", "--epochs", "1", "--outer-steps", "2", "--batch-size", "8"],
    "tune": [*QUICK, "--steps", "3", "--outer-steps", "2", "--batch-size", "8"],
    "attribute": [*QUICK, "--examples", "20", "--epochs", "1", "--queries", "2"],
}


class Odd(nn.Module):
    """What cannot be watched: it leaves torch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.utils._python_dispatch import _get_current_dispatch_mode

        if _get_current_dispatch_mode() is not None:
            raise RuntimeError("watched")
        return x @ self.w


def odd(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Odd()


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of four threads, where nobody has asked for any number."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with using_threads(4):
        yield
        assert torch.get_num_threads() == 4  # whatever ran has put it back


def test_the_work_of_a_step_counts_networks_and_samples() -> None:
    mlp = NetworkStack("MLP", 3, (64,), 10, CPU)
    matrices = sum(p[0].numel() for name, p in mlp.sample(0).items() if p[0].ndim == 2)
    assert mlp.work(5) == 2 * matrices * 5 * 3
    assert NetworkStack("ConvNet-3", 1, (3, 32, 32), 10, CPU).work(10) > SMALL
    assert NetworkStack(f"{__name__}:odd", 1, (2,), 2, CPU).work(1) == math.inf


@pytest.mark.parametrize(("work", "expected"), [((1e6, SMALL - 1), 1), ((1e6, SMALL), 4)])
@pytest.mark.usefixtures("four")
def test_one_thread_where_several_save_little(work: tuple[float, ...], expected: int) -> None:
    assert default_threads("cpu", lambda: work) == expected
    assert default_threads("cuda", lambda: work) is None
    assert shown("cpu") == "cpu, 4 threads"
    with using_threads(1):
        assert shown("cpu") == "cpu, 1 thread"
        assert default_threads("cpu", lambda: work) == 1  # never more than torch has


def test_a_machine_of_very_many_threads_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 300)
    assert default_threads("cpu", lambda: [SMALL]) == own_threads() == MOST_THREADS


@pytest.mark.parametrize("config", [Config, TuneConfig, AttributeConfig])
@pytest.mark.parametrize("threads", [0, 257, True, 1.5])
def test_a_wrong_number_is_named(config: type[Config], threads: object) -> None:
    with pytest.raises(ValueError, match=rf"threads is {threads}; accepted is an integer from 1 to 256, or none"):
        config(threads=threads)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("given", ["0", "257", "two"])
def test_a_wrong_option_is_one_line(name: str, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run([name, "--threads", given]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "'--threads'" in err
    assert given in err


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.usefixtures("four")
def test_the_headline_says_how_many_and_resume_goes_on_with_them(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert command.run([name, *COMMANDS[name], "--threads", "2", "--out", out]) == 0
    assert "on cpu, 2 threads\n" in capsys.readouterr().out
    assert command.run([name, "--resume", "--out", out]) == 0
    assert "on cpu, 2 threads\n" in capsys.readouterr().out
    assert command.run([name, "--resume", "--out", out, "--threads", "3"]) == 2
    err = capsys.readouterr().err
    assert "--threads is 3, but the" in err
    assert f"in {out} has 2; resume without it" in err


@pytest.mark.usefixtures("four")
def test_by_default_a_small_job_has_one_and_its_evaluation_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    made = Distiller.step
    monkeypatch.setattr(Distiller, "step", lambda self: (seen.append(torch.get_num_threads()), made(self))[1])
    out = tmp_path / "run"
    assert command.run(["train", *COMMANDS["train"], "--out", str(out)]) == 0
    assert "on cpu, 1 thread\n" in capsys.readouterr().out
    assert set(seen) == {1}
    assert read(out / "distilled.h5").config["threads"] == 1
    evaluate = ["evaluate", str(out), "--restarts", "1", "--device", "cpu"]
    assert command.run(evaluate) == 0
    assert "1 fresh network of each architecture, on cpu, 1 thread\n" in capsys.readouterr().out
    assert command.run([*evaluate, "--threads", "2"]) == 0
    assert ", on cpu, 2 threads\n" in capsys.readouterr().out
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # as torch has read it
    assert command.run(evaluate) == 0
    assert ", on cpu, 4 threads\n" in capsys.readouterr().out
    assert command.run(["train", *COMMANDS["train"], "--out", str(tmp_path / "other")]) == 0
    assert "on cpu, 4 threads\n" in capsys.readouterr().out


@pytest.mark.usefixtures("four")
def test_a_checkpoint_of_an_earlier_release_has_torchs_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(dataset="moons", architectures=("linearnet",), steps=2, epochs=1, outer_steps=2, batch_size=8)
    without = {name: value for name, value in config.to_dict().items() if name != "threads"}
    with monkeypatch.context() as patched:
        patched.setattr(Config, "to_dict", lambda self: without)
        checkpoints.save(tmp_path / checkpoints.FILE_NAME, Distiller(config, load("moons", tmp_path)))
    assert command.run(["train", "--resume", "--out", str(tmp_path)]) == 0
    assert "on cpu, 4 threads\n" in capsys.readouterr().out
    assert read(tmp_path / "distilled.h5").config["threads"] is None
