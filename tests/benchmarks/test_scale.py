"""The benchmark of more processes than one: it compares what it says, its formula is right, its processes end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bytes_per_rank
import measuring
import processes
import pytest
import report_scale
import scale
import scale_worker
import torch

import revdistill as rd
from tests.outer.test_image_files import write_mnist

OPTIMIZERS = {
    "SGD": rd.SGD(0.1, 0.1),
    "Adam": rd.Adam(0.01),
    "AdamW": rd.AdamW(0.01, betas=(0.1, 0.999)),
    "RMSprop": rd.RMSprop(0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_formula_gives_the_measured_state(name: str) -> None:
    _, stats = rd.unroll(
        lambda params, batch: (params["w"] - batch[0]).square().sum(),
        {"w": torch.linspace(-1, 1, 301)},
        (torch.zeros(1, 1),),
        OPTIMIZERS[name],
        steps=1,
        adjoint=rd.Reversible(),
        return_stats=True,
    )
    assert bytes_per_rank.state_bytes(name, 301) == stats.state_bytes


def test_the_parts_of_a_peak_are_found_again() -> None:
    assert bytes_per_rank.split(7 + 12, 7 + 12 / 4, 4) == pytest.approx((7, 12))


def test_a_model_on_paper_by_hand() -> None:
    model = bytes_per_rank.Model(10, batch=4, whole=3, parts=64, activations=100, bits=0.5, steps=16)
    assert model.ours(1) == 30 + 640 + 10 + 400
    assert model.ours(4) == 30 + 3 * 64 + 3 + 100  # three parameters on the rank with the most
    assert model.ours(4, shard=False) == 30 + 640 + 10 + 100
    assert model.autograd(2) == 16 * (120 + 200)
    assert model.every_state(2) == 16 * 120 / 2 + 80 + 200
    assert model.some_states(2) == 8 * 120 / 2 + 80 + 200
    rows = bytes_per_rank.on_paper(model, (1, 4), (16,))
    assert all(row["computed"] for row in rows)
    assert rows[0]["bytes"] == {"1": model.ours(1), "4": model.ours(4)}


class Here:
    """In the place of a group: one process is this one, and two are started once for all of the test.

    Outer steps are all made here, as they take long to import; that two processes have the same bits is tests/outer's.
    """

    two: Any = None

    def __init__(self, size: int, threads: int, **environment: str) -> None:
        self._size, self._member = size, scale_worker.Member(0, 1, "")
        if size == 2 and Here.two is None:
            Here.two = processes.Group(2, 1).__enter__()

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def ask(self, seconds: float, *, do: str, **request: Any) -> list[dict[str, Any]]:
        if self._size == 2 and do != "train":
            found: list[dict[str, Any]] = Here.two.ask(seconds, do=do, **request)
            return found
        return [json.loads(json.dumps(getattr(self._member, do)(**request)))]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "results").mkdir()
    for name in ("adam.json", "cuda.jsonl"):
        (tmp_path / "results" / name).write_bytes((measuring.RESULTS / name).read_bytes())
    monkeypatch.setattr(measuring, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(scale, "Group", Here)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield measuring
    torch.set_num_threads(threads)
    if Here.two is not None:
        Here.two.close()
        Here.two = None


@pytest.mark.slow
def test_all_parts_are_measured_and_reported(results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scale.TRAININGS, "MLP", {"steps": 2, "epochs": 1, "batch_size": 16})
    memory = (("AdamW", 1, False), ("AdamW", 2, True))
    monkeypatch.setattr(scale, "QUICK", scale.Size(**{**vars(scale.QUICK), "memory": memory}))
    scale.main(["--quick", "--data-dir", str(write_mnist(tmp_path / "files"))])
    found = results.load("scale")
    assert not [part for part in scale.PARTS if "error" in found[part]], found
    assert found["train"]["found"]["MLP"]["same_bits"]
    one = found["unroll"]["found"]["MLP"]
    assert max(one["difference_float64"].values()) < 1e-6
    assert max(one["difference"].values()) < 1e-3
    ways = one["sent"]
    # Forward, integers of 8 bytes, which a ring of two sends once; of parts, half as many, and half of theta's floats,
    # at three steps and at the end. Back, a product of floats: half to be summed, half as sums.
    plain, parts = ways["2 processes x 1 thread"], ways["2 processes x 1 thread, shard=True"]
    assert plain["forward"] == pytest.approx(8, rel=0.02)
    assert parts["forward"] == pytest.approx(4 + 2 * 4 / 3, rel=0.02)
    assert plain["back"] == pytest.approx(4, rel=0.02)
    alone, shared = found["memory"]["found"]["rows"]
    for row, ranks in ((alone, 1), (shared, 2)):
        assert row["state_bytes"] == bytes_per_rank.state_bytes("AdamW", row["parameters"], ranks)
        assert row["peak_bytes"] > 0
    text = report_scale.section(found, lambda part: "a machine")
    assert text.count("On a machine.") == 4
    assert text.count("computed |") == 5

    _a_group_ends_in_any_case()
    monkeypatch.setitem(scale.PARTS, "unroll", lambda *_: 1 / 0)
    scale.main(["--quick", "--parts", "unroll"])  # a part that fails leaves the others as they are
    assert results.load("scale")["train"] == found["train"]
    assert "Failed: ZeroDivisionError" in report_scale.section(results.load("scale"), lambda part: "a machine")


def _a_group_ends_in_any_case() -> None:
    started = [*Here.two._processes]
    with pytest.raises(processes.FailedError, match=r"rank 0 of 2: TypeError: shard must be a bool"):
        Here.two.ask(60, do="unroll", network="MLP", batch=4, steps=0, shard="yes", dtype="float32")
    assert all(process.poll() is not None for process in started)
    with pytest.raises(processes.FailedError, match="were ended after an earlier failure"):
        Here.two.ask(1, do="unroll")
    silent = processes.Group(1, 1)  # it is still starting
    started = [*silent._processes]
    with pytest.raises(processes.FailedError, match=r"rank 0 of 1 did not answer within 0 s"):
        silent.ask(0, do="unroll")
    assert started[0].poll() is not None
