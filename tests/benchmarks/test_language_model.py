"""The language model's benchmark measures what it says: scores, retrainings, ways back through Adam, the report."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bergson_magic
import gpt
import language_model
import numpy as np
import pytest
import report_language_model
import reversible_adam
import torch
from measuring import load
from torch.nn import functional as F

SIZE = gpt.Size(
    width=8, layers=1, heads=2, length=8, train=12, held_out=4, batch=3, steps=6, rate=0.005, warm_up=2, eps=1e-3
)
OPTIONS = argparse.Namespace(queries=2, retrainings=3)


@pytest.fixture(scope="module")
def run() -> gpt.Run:
    return gpt.prepare(SIZE)


def test_chunks_are_taken_once_an_epoch_and_are_as_long_as_they_should_be(run: gpt.Run) -> None:
    assert run.train.shape == (12, 9)
    assert run.held_out.shape == (4, 9)
    assert sorted(run.order[:4].reshape(-1).tolist()) == list(range(12))
    assert run.order.shape == (6, 3)
    assert "".join(map(chr, run.train[0].tolist())) in gpt.text_of()[0]
    with pytest.raises(ValueError, match="chunks of 9 characters, 1000000000 are needed"):
        gpt.prepare(replace(SIZE, train=10**9 - 4))


def test_the_network_sees_nothing_that_comes_later(run: gpt.Run) -> None:
    chunk = run.train[:1, :-1]
    changed = chunk.clone()
    changed[0, 5] = (changed[0, 5] + 1) % gpt.CHARACTERS
    before, after = run.net(chunk), run.net(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_scores_are_what_leaving_out_does_to_the_plain_loop(run: gpt.Run) -> None:
    exact = replace(run, net=gpt.network(SIZE).double())
    losses, scores = language_model.metagradient(exact, SIZE.steps, 2)

    def trained(weights: torch.Tensor) -> torch.Tensor:
        found = exact.losses(gpt.train_by_hand(exact, weights, SIZE.steps), exact.held_out)
        return torch.cat([found.mean()[None], found[:2]])

    ones, h = torch.ones(12, dtype=torch.float64), 1e-4
    torch.testing.assert_close(trained(ones), losses, rtol=1e-7, atol=0)
    for i in (0, 7):
        step = h * torch.eye(12, dtype=torch.float64)[i]
        slope = (trained(ones + step) - trained(ones - step)) / (2 * h)
        torch.testing.assert_close(scores[:, i], slope, rtol=1e-4, atol=1e-9)
    _, mean = language_model.metagradient(exact, SIZE.steps, 0)
    torch.testing.assert_close(mean[0], scores[0], rtol=1e-9, atol=1e-12)


def test_a_retraining_is_without_its_chunks_and_is_read_again(
    run: gpt.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "DROPPED", 0.25)
    scratch = language_model.Scratch(tmp_path, run)
    found = language_model.retrainings(run, scratch, 2)
    weights = torch.ones(12)
    weights[language_model.dropped(run, 1)] = 0
    by_hand = run.losses(gpt.train_by_hand(run, weights, SIZE.steps), run.held_out).detach()
    assert np.allclose(found[2], by_hand)
    assert not np.allclose(found[2], found[0])
    for file in tmp_path.iterdir():
        np.save(file, np.zeros(4))
    assert not language_model.retrainings(run, scratch, 2).any()
    other = language_model.Scratch(tmp_path, replace(run, size=replace(SIZE, rate=0.01)))
    assert language_model.retrainings(run, other, 1).all()


def test_the_parts_give_what_the_report_needs(run: gpt.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "DROPPED", 0.25)
    monkeypatch.setattr(language_model, "SMALL", {})
    monkeypatch.setattr(language_model, "CHECKED_STEPS", 3)
    monkeypatch.setattr(language_model, "TIMED_STEPS", 2)
    monkeypatch.setattr(language_model, "ROUNDS", 1)
    scratch = language_model.Scratch(None, run)
    size = {**vars(SIZE), "parameters": 1}
    results: dict[str, Any] = {"text": run.said, "size": size}
    for part in ("scores", "lds", "speed", "adam"):
        results[part] = {"found": language_model.PARTS[part](run, scratch, OPTIONS)}
    peaks = [language_model.one_peak(run, method, steps) for method, steps in (("ours", 5), ("autograd", 2))]
    plain = results["lds"]["found"]["plain_held_out_loss"]
    results["memory"] = {"found": [*peaks, language_model.one_peak(run, "autograd", 4)]}
    assert results["scores"]["found"]["difference_from_autograd"]["relative"] < 1e-3
    _, scores = language_model.metagradient(run, SIZE.steps, 0)
    changes = results["lds"]["found"]["changes_mean_loss"]
    left_out = [language_model.dropped(run, i) for i in range(3)]
    assert np.allclose(changes["predicted"], [-float(scores[0, rows].sum()) for rows in left_out], rtol=1e-3)
    assert np.allclose(changes["true"], [float(language_model.retrain(run, r).mean()) - plain for r in left_out])
    assert len(results["lds"]["found"]["spearman_queries"]) == 2
    written = report_language_model.section(json.loads(json.dumps(results)), lambda part: "a machine")
    assert written.count("On a machine.") == 5


def test_ours_beside_bergson_is_the_same_training(run: gpt.Run) -> None:
    setting = bergson_magic.Setting(rate=0.01)
    net = gpt.network(replace(SIZE, length=9))
    net.register_forward_hook(lambda net, x, logits: SimpleNamespace(logits=logits))  # as transformers returns them
    data = {"chunks": run.train.numpy(), "queries": run.held_out[:2].numpy(), "order": run.order[:3].numpy()}
    report: dict[str, Any] = {}
    scores = bergson_magic.by_ours(net, setting, data, "", report)

    def losses(rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(net(rows).logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none").mean(1)

    optimizer = torch.optim.AdamW(net.parameters(), setting.rate, eps=setting.eps, weight_decay=setting.weight_decay)
    for rows in run.order[:3]:
        optimizer.zero_grad()
        losses(run.train[rows]).mean().backward()
        optimizer.step()
    assert np.allclose(report["losses"], losses(run.held_out[:2]).detach(), rtol=1e-5)
    assert scores.shape == (2, 12)
    assert (scores[:, run.order[:3].unique()] != 0).all()


def test_the_committed_results_are_reported() -> None:
    results = load("language_model")
    assert results is not None
    written = report_language_model.section(results, lambda part: "a machine")
    assert written.count("###") == sum(part in results for part in report_language_model.PARTS)


@pytest.mark.parametrize("factor", reversible_adam.BETAS)
def test_the_restated_decay_is_undone_bit_for_bit(factor: float) -> None:
    store = reversible_adam.Remainders(factor, 100)
    start = torch.randint(-(10**12), 10**12, (100,), generator=torch.Generator().manual_seed(0))
    value, steps = start, store.steps_a_word + 20 if factor < 0.99 else 50
    for _ in range(steps):
        before, value = value, store.decay(value)
        assert (value - before.double() * factor).abs().max() <= 1 / (1 - factor) + 1
    for _ in range(steps):
        value = store.undo(value)
    assert torch.equal(value, start)
    assert store.put_away == steps // store.steps_a_word


def test_the_restated_adam_is_adam_and_comes_back_where_division_does_not() -> None:
    start = torch.linspace(-1, 1, 7, dtype=torch.float64)

    def gradient(theta: torch.Tensor, k: int) -> torch.Tensor:
        return theta**3 - 0.1 * (k % 5)

    leaf = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], reversible_adam.RATE, reversible_adam.BETAS, reversible_adam.EPS)
    for k in range(300):
        leaf.grad = gradient(leaf.detach(), k)
        optimizer.step()
    passed, back, _ = reversible_adam.by_remainders(start, gradient, 300)
    # v starts at 1e-12 and is rounded up
    torch.testing.assert_close(passed[-1], leaf.detach(), rtol=1e-5, atol=2e-6)
    assert reversible_adam.walk(passed, back) == {"error": 0.0, "lost_after": None}
    passed, back = reversible_adam.by_division(start.float(), gradient, 300)
    torch.testing.assert_close(passed[-1].double(), leaf.detach(), rtol=1e-4, atol=1e-5)
    assert reversible_adam.walk(passed, back)["lost_after"] < 300
