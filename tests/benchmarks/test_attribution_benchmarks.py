"""The benchmarks of attribution compare what they say they compare."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import attribution
import attribution_cost
import attribution_rivals
import leave_out
import pytest
import report_attribution
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from tests.outer.legible import illegible
from tests.outer.test_image_files import write_mnist

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
SGD = leave_out.Cell("MLP", "GELU", "SGD", 0.05)
PATHS = [RESULTS / f"{name}.json" for name in ("attribution", "attribution_cost")]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> leave_out.Images:
    monkeypatch.setattr(leave_out, "BATCH", 16)
    monkeypatch.setattr(leave_out, "EPOCHS", 1)
    return leave_out.mnist(write_mnist(tmp_path / "mnist"), examples=60, queries=4)["pixels"]


def test_the_inputs_are_pixels(images: leave_out.Images) -> None:
    assert float(images.x.min()) == pytest.approx(0, abs=1e-6)
    assert float(images.x.max()) == pytest.approx(1, abs=1e-6)
    assert images.order.shape == (3, 16)
    assert len(images.order.flatten().unique()) == 48


@pytest.mark.parametrize("cell", [SGD, leave_out.Cell("LeNet", "ReLU", "AdamW", 0.01, 1e-3)])
def test_a_retraining_goes_without_the_examples(images: leave_out.Images, cell: leave_out.Cell) -> None:
    dropped = leave_out.left_out(0.2, 3, len(images.x))
    assert int(dropped.sum()) == 12
    found = leave_out.query_losses(leave_out.train(cell, images, (~dropped).float()), images)

    net = cell.network().double()
    if cell.optimizer == "SGD":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, eps=1e-3, weight_decay=0.01)
    for rows in images.order:
        kept = [i for i in rows.tolist() if not dropped[i]]
        optimizer.zero_grad()
        (F.cross_entropy(net(images.x[kept].double()), images.y[kept], reduction="sum") / 16).backward()
        optimizer.step()
    expected = F.cross_entropy(net(images.x_queries.double()), images.y_queries, reduction="none")
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-5)


def one_gradient(net: torch.nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    leaves = {name: p.double().requires_grad_() for name, p in params.items()}
    loss = F.cross_entropy(functional_call(net, leaves, (x[None].double(),)), y[None])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))])


def test_tracin_is_the_sum_of_dot_products(images: leave_out.Images) -> None:
    along = attribution_rivals.checkpoints(SGD, images)
    found = attribution_rivals.tracin(SGD, images, along)[""]
    expected = -sum(
        one_gradient(along.net, params, images.x_queries[1], images.y_queries[1])
        @ one_gradient(along.net, params, images.x[7], images.y[7])
        for params in along.params
    )
    torch.testing.assert_close(found[1, 7].double(), torch.as_tensor(expected), rtol=1e-4, atol=1e-7)


def test_the_last_layers_influence_is_the_formula(images: leave_out.Images) -> None:
    along = attribution_rivals.checkpoints(SGD, images)
    found = attribution_rivals.last_layer(SGD, images, along)["damping 0.01"]
    params = {name: p.double() for name, p in along.params[-1].items()}
    last = ["layers.2.weight", "layers.2.bias"]

    def mean_loss(weight: Tensor, bias: Tensor) -> Tensor:
        given = {**params, last[0]: weight, last[1]: bias}
        return F.cross_entropy(functional_call(along.net, given, (images.x.double(),)), images.y)

    blocks = torch.autograd.functional.hessian(mean_loss, tuple(params[name] for name in last))
    sizes = [params[name].numel() for name in last]
    curvature = torch.cat(
        [
            torch.cat([b.reshape(m, n) for b, n in zip(row, sizes, strict=True)], 1)
            for row, m in zip(blocks, sizes, strict=True)
        ]
    )
    asked = one_gradient(along.net, params, images.x_queries[2], images.y_queries[2])[-sum(sizes) :]
    trained = one_gradient(along.net, params, images.x[5], images.y[5])[-sum(sizes) :]
    expected = -asked @ torch.linalg.solve(curvature + 0.01 * torch.eye(len(curvature)), trained)
    torch.testing.assert_close(found[2, 5].double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", list(attribution_rivals.RIVALS))
def test_an_example_helps_itself(images: leave_out.Images, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The sign is that of dL/dw: without its own image, a query's loss rises."""
    rival = attribution_rivals.RIVALS[name]
    if rival.missing():
        pytest.skip(rival.missing() or "")
    monkeypatch.setattr(attribution_rivals, "PROJECTED", 20)
    chosen = images.order[0, :4]
    images = replace(images, x_queries=images.x[chosen], y_queries=images.y[chosen])
    for scores in rival.scores(SGD, images, attribution_rivals.checkpoints(SGD, images)).values():
        assert scores.shape == (4, 60)
        assert bool((scores[torch.arange(4), chosen] < 0).all())


def test_the_grid_is_measured_and_reported(
    images: leave_out.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [SGD, leave_out.Cell("MLP", "ReLU", "AdamW", 0.01, 1e-3, "normalised")]
    written: dict[str, Any] = {"cells": []}
    monkeypatch.setattr(attribution, "load", lambda name: written)
    monkeypatch.delitem(attribution_rivals.RIVALS, "trak")
    monkeypatch.setattr(attribution, "cells", lambda: small)
    monkeypatch.setattr(attribution, "mnist", lambda folder: leave_out.mnist(folder, examples=60, queries=4))
    monkeypatch.setattr(attribution, "save", lambda name, results: written.update(json.loads(json.dumps(results))))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    command = ["attribution.py", "--data-dir", str(tmp_path / "mnist"), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", [*command, "--retrainings", *"765432"])
    attribution.main()
    before = dict(written)
    assert [row["retrainings"] for row in written["cells"][1]["drops"]] == [7, 6, 5]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--cells", "ReLU"])

    monkeypatch.setattr(attribution_rivals, "train", None)  # nothing is trained or scored again
    monkeypatch.setattr(leave_out, "train", None)
    monkeypatch.setattr(attribution, "ours", None)
    attribution.main()
    assert written == before

    text = report_attribution.section(written, "here")
    for cell in written["cells"]:
        assert report_attribution.cell_title(cell) in text
        for row in cell["drops"]:
            assert all(f"{one['lds']:.3f}" in text for one in row["methods"].values())
    assert not illegible(report_attribution.picture(written))


def test_who_loses_is_said() -> None:
    def cell(lr: float, mine: float, other: float) -> dict[str, Any]:
        shared = {"interval": [0.0, 1.0], "mean_loss": 0.5, "settings": ""}
        methods = {"ours": {"lds": mine, **shared}, "tracin": {"lds": other, **shared}}
        named = vars(replace(SGD, lr=lr))
        return {**named, "smoothness": 0.5, "drops": [{"drop": 0.01, "retrainings": 9, "methods": methods}]}

    results = {
        "cells": [cell(0.1, 0.9, 0.2), cell(0.2, 0.3, 0.4)],
        "missing": {"trak": "not here"},
        "foretold": {"0.01": 0.8},
    }
    text = report_attribution.verdict(results)
    assert "1 of 2, and not in: MLP, GELU, SGD 0.2 at 1% (TracIn)." in text
    assert "TRAK is left out: not here." in text


def test_the_best_settings_of_a_rival_count() -> None:
    dropped = torch.eye(4, dtype=torch.bool)
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    scored = {"scores": {"bad": -scores, "good": scores}, "losses": torch.zeros(1)}
    found = attribution.figures(scored, dropped, -scores.T, 0.25)
    assert (found["settings"], found["lds"]) == ("good", pytest.approx(1.0))


def test_costs_are_of_the_same_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution_cost, "BATCHES", 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert set(attribution_cost.check()) == set(attribution_cost.WAYS)
    found = attribution_cost.one("reversible", 6, 3)
    assert found["seconds"] > 0
    right = attribution_cost.WAYS["reversible"]
    wrong = replace(right, derivatives=lambda losses, w: 1.001 * right.derivatives(losses, w))
    monkeypatch.setitem(attribution_cost.WAYS, "reversible", wrong)
    with pytest.raises(AssertionError):
        attribution_cost.check()


def test_what_would_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attribution_cost, "measure", lambda name, steps, queries: {"seconds": steps, "bytes": steps * 1e8}
    )
    options = type("Options", (), {"steps": [10, 40, 200], "most_seconds": 1e9, "most_bytes": 5e9})
    kept = attribution_cost.rise("backprop-loop", 100, options)
    assert [row.get("skipped") for row in kept] == [None, None, "would need about 20 GB"]
    assert "skipped" not in attribution_cost.rise("reversible", 100, options)[-1]
    options.most_seconds = 100
    assert attribution_cost.rise("reversible", 100, options)[-1]["skipped"] == "would take about 200 s"
    results = {"rows": kept, "settings": {"width": 3, "batch": 2}, "apart": {"a": 1e-12}}
    text = report_attribution.cost_section(results, "here")
    assert "not run: would need about 20 GB" in text
    assert "40.0 s, 3,815 MiB" in text


@pytest.mark.parametrize("path", [path for path in PATHS if path.exists()], ids=lambda path: path.stem)
def test_the_committed_tables_have_every_figure(path: Path) -> None:
    results = json.loads(path.read_text())
    if path.stem == "attribution_cost":
        text = report_attribution.cost_section(results, "here")
        assert all(f"{row['seconds']:.1f} s" in text for row in results["rows"] if "seconds" in row)
        return
    text = report_attribution.section(results, "here")
    for cell in results["cells"]:
        for row in cell["drops"]:
            assert all(f"{one['lds']:.3f}" in text for one in row["methods"].values())
