"""The benchmarks compare what they say they compare: every method's hypergradient is one, and stacked jobs do
not mix.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import methods
import pytest
import report_study
import stacked
import tasks
import torch

from revdistill.outer.data import load

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = stacked.Protocol(batches=3, per_class=2, epochs=2, outer_epochs=1, outer_batch=512)


@pytest.mark.parametrize(
    "name", [n for n, m in methods.METHODS.items() if not m.compiles and n not in ("training", "autograd")]
)
def test_every_method_gives_the_hypergradient(name: str) -> None:
    method = methods.METHODS[name]
    if method.missing():
        pytest.skip(method.missing() or "")
    task = tasks.make("tiny", dtype=torch.float64)
    expected_x, expected_rates = methods.autograd(task, 7)
    x, rates = method.run(task, 7)
    torch.testing.assert_close(x, expected_x, rtol=1e-8, atol=1e-12)
    if rates is not None:
        torch.testing.assert_close(rates, expected_rates, rtol=1e-8, atol=1e-12)


def test_the_compiled_rivals_steps_are_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile is given; and it is given one thing, once."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda step: compiled.append(step) or step)
    task = tasks.make("tiny", dtype=torch.float64)
    for _ in range(2):
        found = methods.autograd_compiled(task, 7)
    assert len(compiled) == 1
    for mine, expected in zip(found, methods.autograd(task, 7), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_stacked_jobs_are_independent(momentum: float) -> None:
    """A job distils to the same data alone as beside others, up to the rounding of batched products."""
    data = load("moons")
    jobs = [stacked.Job(data, ("NonLinearNet", "LinearNet"), seed=3), stacked.Job(data, ("NonLinearNet",) * 2, seed=4)]
    protocol = replace(SMALL, momentum=momentum, clip=1.0, average=0.5)
    together = stacked.distil(jobs, protocol, compile=False)
    for j, job in enumerate(jobs):
        alone = stacked.distil([job], protocol, compile=False)
        torch.testing.assert_close(together.x[:, [j]], alone.x, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(together.rates[:, [j]], alone.rates, rtol=1e-3, atol=1e-5)


def test_evaluation_is_torch_sgds() -> None:
    job = stacked.Job(load("moons"), ("MoreNonLinearNet",), seed=1)
    distilled = stacked.distil([job], SMALL, compile=False)
    found = stacked.evaluate([job], distilled, "raw", "MoreNonLinearNet", 0.5)

    stack = stacked.Stack({"MoreNonLinearNet": [0]}, 2, 2)
    drawn = stack.sample([torch.Generator().manual_seed(job.seed + 1_000_003)])
    net = torch.nn.Sequential()
    for i in range(4):
        layer = torch.nn.Linear(*drawn[f"MoreNonLinearNet.{i}.weight"].shape[1:])
        layer.weight.data = drawn[f"MoreNonLinearNet.{i}.weight"][0].t().clone()
        torch.nn.init.zeros_(layer.bias)
        net.extend([layer, torch.nn.ReLU()] if i < 3 else [layer])
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.5)
    for k, rate in enumerate(distilled.rates[:, 0].tolist()):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        logits = net(distilled.x[k % 3, 0])[:, 0]
        torch.nn.functional.binary_cross_entropy_with_logits(logits, distilled.y[k % 3, 0].float()).backward()
        optimizer.step()
    right = ((net(job.data.x_test)[:, 0] > 0) == job.data.y_test.bool()).float().mean()
    torch.testing.assert_close(
        found[0], right, rtol=0, atol=2.1 / len(job.data.y_test)
    )  # float32 may move a point across


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda p: p.name)
def test_committed_results_name_their_machine(path: Path) -> None:
    results = json.loads(path.read_text())
    assert results["machine"]["processor"]
    assert results["versions"]["torch"]


def test_the_studys_table_has_every_cell_of_the_talk() -> None:
    path = BENCHMARKS / "results/medvedev2020.json"
    if not path.exists():
        pytest.skip("not measured yet")
    results = json.loads(path.read_text())
    cells = report_study.by_place(results["cells"])
    for data, schedule in report_study.TALK:
        for test in report_study.STUDIED:
            for setting in ["faithful"] if data == "original" else ["ours", "faithful"]:
                assert len(cells[setting, data, schedule, test]["accuracies"]) == results["settings"]["restarts"]
    # where a cell exists in both settings, ours comes first
    first = {}
    for cell in results["cells"]:
        first.setdefault((cell["data"], cell["schedule"], cell["test"]), cell["setting"])
    assert all(setting == "ours" for (data, *_), setting in first.items() if data != "original")
