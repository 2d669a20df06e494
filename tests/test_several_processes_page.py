"""docs/several-processes.md: its script gives in two processes what it gives in one; its formula is the benchmark's."""

from __future__ import annotations

import math
import re
from pathlib import Path

import bytes_per_rank
import pytest

from tests.torchrun import torchrun

PAGE = (Path(__file__).parents[1] / "docs/several-processes.md").read_text()
FIGURE = r"([-+]?\d+\.\d{4})"
# Processes that torchrun starts write unbuffered, a line and its end apart: two lines may come as one.
SAID = rf"rank (\d): loss {FIGURE}, dL/dlr {FIGURE}, \|dL/dx\| {FIGURE}"


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
    (tmp_path / "share.py").write_text(script)
    ran = torchrun(2, ["share.py"], cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    first, second = sorted(re.findall(SAID, ran.stdout, flags=re.M))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    exec(compile(script, "docs/several-processes.md", "exec"), {})
    (alone,) = re.findall(SAID, capsys.readouterr().out, flags=re.M)
    assert first[1:3] == second[1:3]
    assert [float(v) for v in first[1:3]] == pytest.approx([float(v) for v in alone[1:3]], rel=1e-3)
    # their own batches' parts of one gradient
    assert math.hypot(float(first[3]), float(second[3])) == pytest.approx(float(alone[3]), rel=1e-2)


def test_the_formula() -> None:
    header, words, slots = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if re.match(r"\| \| SGD|\| [ws],", line)
    )
    names = ["SGD", *header[2:]]
    assert dict(zip(names, map(int, words[1:]), strict=True)) == bytes_per_rank.STATE_WORDS
    assert dict(zip(names, map(int, slots[1:]), strict=True)) == bytes_per_rank.SLOTS
    (formula,) = re.findall(r"^ +(ceil\(n / W\).*)  bytes$", PAGE, flags=re.M)
    n, ranks, t, bits, k, chunk = 1001, 4, 50, 1.5, 7, 5
    for name in names:
        values = {"n": n, "W": ranks, "T": t, "b": bits, "K": k, "c": chunk, "ceil": math.ceil, "min": min}
        values |= {"w": bytes_per_rank.STATE_WORDS[name], "s": bytes_per_rank.SLOTS[name]}
        said = formula.replace("8 w", "8 * w").replace("b T", "b * T")
        said = said.replace(" x ", " * ").replace("4 (K (", "4 * (K * (")
        assert eval(said, values) == (
            bytes_per_rank.state_bytes(name, n, ranks)
            + bytes_per_rank.history_bytes(bits, t, n, ranks)
            + bytes_per_rank.bars_bytes(name, k, chunk, n, ranks)
        )
