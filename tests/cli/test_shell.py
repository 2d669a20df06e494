"""What a shell gets of the command: completions and its script, and what --version says for a report of a fault."""

from __future__ import annotations

import platform
import shutil
import subprocess

import click
import pytest
import torch
from click.shell_completion import BashComplete
from revdistill.cli import main as command
from revdistill.cli.main import cli

import revdistill

BASH = BashComplete(cli, {}, "revdistill", "_REVDISTILL_COMPLETE")
CASES: dict[str, tuple[list[str], str, list[str]]] = {
    "commands": ([], "t", ["train", "tune"]),
    "options": (["train"], "--sav", ["--save-every"]),
    "choices": (["train", "--init"], "", ["random", "fixed"]),
    "architectures": (["train", "--arch"], "m", ["MoreNonLinearNet", "MLP", "MLP-GELU"]),
    "architectures of another command": (["evaluate", "RUN", "--arch"], "Le", ["LeNet"]),
    "datasets or a file": (["tune", "--dataset"], "fa", ["fashion-mnist", "file: fa"]),
    "a file": (["attribute", "--dataset"], "./photos", ["file: ./photos"]),
    "datasets of an argument": (["data"], "moo", ["moons", "file: moo"]),
    "a folder": (["train", "--out"], "ru", ["dir: ru"]),
    "devices": (["verify", "--device"], "c", ["cpu", "cuda"]),
    "a list": (["tune", "--learn"], "lr,m", ["lr,momentum"]),
    "what a list has not": (["tune", "--learn"], "lr,", ["lr,momentum", "lr,weight-decay", "lr,init"]),
}


@pytest.mark.parametrize("name", CASES)
def test_completions(name: str) -> None:
    given, incomplete, expected = CASES[name]
    found = BASH.get_completions(given, incomplete)
    assert [item.value if item.type == "plain" else f"{item.type}: {item.value}" for item in found] == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version")
    monkeypatch.setenv("_REVDISTILL_COMPLETE", f"{shell}_source")
    with pytest.raises(SystemExit, match="0"):
        command.run([])
    out, _ = capsys.readouterr()
    assert f"_REVDISTILL_COMPLETE={shell}_complete" in out
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_the_version_names_releases_and_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def name_of(i: int) -> str:
        if i:
            raise RuntimeError("The NVIDIA driver is too old\nand more")
        return "A GPU"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", name_of)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert command.run(["--version"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"revdistill, version {revdistill.__version__} (torch {torch.__version__}, Python {platform.python_version()})",
        "devices: cpu (3 threads), cuda:0 (A GPU), cuda:1 (cannot be used: The NVIDIA driver is too old)",
    ]


def test_names_are_proposed_and_anything_is_taken() -> None:
    """What completes a value does not check it."""
    for subcommand in ("train", "tune", "attribute", "evaluate", "show", "data"):
        context = click.Context(cli.commands[subcommand])
        (option,) = [p for p in cli.commands[subcommand].params if p.name == "dataset"]
        assert option.type_cast_value(context, "my/own.npz") == "my/own.npz"
