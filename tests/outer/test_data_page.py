"""docs/data.md: its examples run, and its commands end well."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from revdistill.cli import main as command

from revdistill.outer.roles import KINDS, PARTS

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text()


class CIFAR10:
    """What torchvision's has: images [N, 32, 32, 3] of bytes, and a list of classes."""

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        count = 60 if train else 20
        self.data = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
        self.targets = [i % 10 for i in range(count)]


def test_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    datasets: Any = types.ModuleType("torchvision.datasets")
    datasets.CIFAR10 = CIFAR10
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    monkeypatch.chdir(tmp_path)
    np.random.seed(0)
    ran: dict[str, str] = {}
    for code, line in re.findall(r"^```python\n(.*?)^```|^    revdistill (.*?)$", PAGE, flags=re.M | re.S):
        if code:
            exec(compile(code, "docs/data.md", "exec"), {})
            continue
        assert command.run(line.replace("--outer-steps 50", "--outer-steps 1 --steps 3").split()) == 0, line
        ran[line] = " ".join(capsys.readouterr().out.split())
    assert "0 setosa" in ran["data iris.npz"]
    assert "have their channels last: moved, to 3 channels of 32 x 32" in ran["data cifar.npz"]
    assert "moved, to 13 channels of 8 x 8" in ran["data bands.npz"]
    assert "the class is in column 'species'" in ran["data flowers.csv:species"]
    assert "inputs images of 32 x 32, 3 channels" in ran["data photos:32"]
    assert len(ran) == 6


def test_every_accepted_name_is_there() -> None:
    table = PAGE.split("**Names.**")[1].split("**Inputs.**")[0]
    assert set(re.findall(r"`(\w+)`", table)) >= {*KINDS, *PARTS}
