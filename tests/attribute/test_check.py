"""Scores against retrainings: right where training is smooth, and said not to be where it is rough."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import revdistill as rd
from revdistill.attribute.check import Check, random_subsets, spearman
from revdistill.attribute.retraining import retrain
from revdistill.attribute.smoothness import smoothness
from tests.attribute.small import attributed, loss, params

N, K = 40, 5


def problem(activation: nn.Module, lr: float, dtype: torch.dtype = torch.float64) -> rd.Attribution:
    torch.manual_seed(0)
    x, y = torch.randn(N, 6, dtype=dtype), torch.arange(N) % 3
    net = nn.Sequential(nn.Linear(6, 12), activation, nn.Linear(12, 3)).to(dtype)
    loss, params = rd.from_module(net, nn.CrossEntropyLoss(reduction="none"))
    queries = torch.randn(K, 6, dtype=dtype), torch.arange(K) % 3
    return rd.attribute(loss, params, (x, y), rd.SGD(lr, 0.9), order=rd.epochs(N, 8, 4), queries=queries, seed=0)


def test_smooth_and_rough_training() -> None:
    """Softplus at a small rate: both near 1. ReLU at a large one: both lower, and what helps is said."""
    smooth = problem(nn.Softplus(), 0.01)
    found = smooth.check(0.05, 20)
    assert smooth.checked is found
    assert found.smoothness > 0.95
    assert found.mean > 0.98
    assert found.mean_query > 0.95
    assert found.interval[0] <= found.mean <= found.interval[1] <= 1
    assert found.interval[0] > 0.9
    assert found.advice is None
    assert smooth.smoothness(0.05) == pytest.approx(found.smoothness)
    torch.testing.assert_close(smooth.predict(found.dropped), torch.from_numpy(found.predicted))
    assert smooth.run is not None
    torch.testing.assert_close(
        retrain(smooth.run, ~torch.from_numpy(found.dropped)).losses, torch.from_numpy(found.actual.T)
    )

    rough = problem(nn.ReLU(), 0.5).check(0.05, 20)
    assert rough.smoothness < 0.5
    assert rough.mean < 0.5
    assert rough.advice is not None
    assert "GELU or softplus" in rough.advice
    assert f"{rough.smoothness:.2f}" in rough.advice


def test_smoothness_is_definition_2() -> None:
    """From three trainings, by loops over parameters; the third one leaves the subset out."""
    found = problem(nn.Tanh(), 0.05)
    assert found.run is not None
    for directions in (1, 2):
        values = []
        for subset in random_subsets(N, 0.1, directions, seed=7):
            steps = [1 - scale * subset.double() for scale in (0.0, 0.5, 1.0)]
            assert steps[2].sum() == N - 4
            thetas = [found.run.train(w) for w in steps]
            total = agreeing = 0.0
            for name in thetas[0]:
                z, half, out = (t[name].flatten().tolist() for t in thetas)
                for a, b, c in zip(z, half, out, strict=True):
                    total += abs(b - a)
                    agreeing += abs(b - a) * math.copysign(1, b - a) * math.copysign(1, c - b)
            values.append(agreeing / total)
        measured = smoothness(found.run, 0.1, 7, directions=directions)
        assert measured == pytest.approx(sum(values) / directions, abs=1e-6)


def test_nothing_moves() -> None:
    """Examples that no step takes: no smoothness, no LDS, and no error."""
    x, y = torch.randn(6, 3), torch.zeros(6, dtype=torch.int64)
    found = attributed(data=(x.double(), y), order=torch.tensor([[0, 1], [1, 0]]), optimizer=rd.SGD(0.0, 0.9))
    checked = found.check(0.2, 3)
    assert math.isnan(checked.smoothness)
    assert math.isnan(checked.mean)
    assert math.isnan(checked.mean_query)
    assert all(map(math.isnan, checked.interval))


def test_a_parameter_of_one_number() -> None:
    """A temperature, say."""
    start = params() | {"t": torch.ones((), dtype=torch.float64)}
    found = attributed(params=start, loss=lambda p, b: loss(p, b) * p["t"].square())
    assert 0 < found.check(0.3, 3).smoothness <= 1


def test_rank_correlation() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(4, 9)), draw.integers(0, 4, (4, 9)).astype(float)  # with ties
    expected = [spearmanr(a[q], b[q]).statistic for q in range(4)]
    assert spearman(a, b) == pytest.approx(expected)
    b[0], a[1], a[2], b[2] = 1.0, 1.0, 1.0, 1.0
    found = spearman(a, b)
    assert np.isnan(found).tolist() == [True, False, True, False]  # the truth does not vary: undefined
    assert found[1] == 0  # it does, and the prediction does not
    assert found[3] == pytest.approx(expected[3])


def checked(scores: Tensor, actual: Tensor, dropped: Tensor, **changes: Any) -> Check:
    given: dict[str, Any] = dict(drop=0.1, seed=0, smoothness=1.0)
    return Check.of(scores, torch.zeros(len(scores)), dropped, actual, **(given | changes))


def test_means_and_intervals() -> None:
    """A query without LDS is left out of the mean. The interval covers the truth of a model with a known one."""
    dropped = random_subsets(30, 0.1, 40, seed=1)
    scores = torch.randn(10, 30, generator=torch.Generator().manual_seed(0))
    exact = (-scores @ dropped.float().T).T
    found = checked(scores, exact, dropped)
    assert (found.mean, found.mean_query) == (pytest.approx(1), pytest.approx(1))
    assert found.interval == (pytest.approx(1), pytest.approx(1))
    constant = exact.clone()
    constant[:, :5] = 3.0
    left_out = checked(scores, constant, dropped)
    assert np.isnan(left_out.lds).sum() == 5
    assert left_out.mean == pytest.approx(1)
    noisy = exact + 2 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    found = checked(scores, noisy, dropped)
    each = [spearmanr(found.predicted[q], noisy[:, q]).statistic for q in range(10)]
    assert found.mean == pytest.approx(np.mean(each))
    assert found.mean_query == pytest.approx(spearmanr(found.predicted.mean(0), noisy.mean(1)).statistic)
    assert 0.02 < found.interval[1] - found.interval[0] < 0.5
    assert found.interval == checked(scores, noisy, dropped).interval
    assert found.interval != checked(scores, noisy, dropped, seed=1).interval
    alike = scores[:1].expand(10, -1)
    noisy_alike = exact[:, :1] + noisy - exact  # the mean over the queries has less noise than each of them
    found_alike = checked(alike, noisy_alike, dropped)
    assert found_alike.mean_query_interval[0] > found_alike.mean
    assert found_alike.mean_query_interval[0] < found_alike.mean_query < found_alike.mean_query_interval[1]
    alone = checked(scores[:1], noisy[:, :1], dropped)
    assert alone.mean == pytest.approx(alone.mean_query)
    wide = alone.interval[1] - alone.interval[0]
    assert wide == pytest.approx(alone.mean_query_interval[1] - alone.mean_query_interval[0])
    assert wide > found.interval[1] - found.interval[0]


def test_random_subsets() -> None:
    masks = random_subsets(30, 0.1, 40, seed=1)
    assert masks.sum(1).tolist() == [3] * 40
    assert masks.any(0).all()
    assert torch.equal(random_subsets(30, 0.1, 5, seed=1), masks[:5])
    assert not torch.equal(random_subsets(30, 0.1, 40, seed=2), masks)
    assert random_subsets(30, 1e-6, 1, seed=0).sum() == 1
    assert random_subsets(3, 0.999, 1, seed=0).sum() == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(drop=0.0), ValueError, "drop must be a share of the examples between 0 and 1, got 0.0"),
        (dict(drop=1), ValueError, "drop must be a share"),
        (dict(drop="1%"), TypeError, "drop must be a float, got str"),
        (dict(retrainings=2), ValueError, "retrainings must be at least 3, got 2"),
        (dict(retrainings=3.0), TypeError, "retrainings must be an int, got float"),
        (dict(seed=-1), ValueError, "seed must be at least 0"),
        (dict(progress="yes"), TypeError, "progress must be a bool, got str"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    found = attributed()
    with pytest.raises(error, match=message):
        found.check(**changes)


def test_another_training_is_not_compared() -> None:
    """Data changed in place, the module in another mode, a parameter of its own frozen and changed: refused."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    loss, params = rd.from_module(net, nn.CrossEntropyLoss(reduction="none"))
    rate = torch.tensor(0.1)
    found = attributed(loss=loss, params=params, optimizer=rd.SGD(rate, 0.5))
    assert found.run is not None
    found.run.confirm()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()  # copies were made
    found.run.confirm()
    net.eval()
    with pytest.raises(rd.UnsupportedError, match=r"gives other values .* mode \(train\(\) or eval\(\)\)"):
        found.check()
    net.train()
    found.smoothness(0.2)
    rate.mul_(2)
    with pytest.raises(rd.UnsupportedError, match=r"changed in place since .* call rd.attribute again"):
        found.smoothness()
    found = attributed(loss=loss, params=params)
    assert found.run is not None
    found.run.data[1].add_(0)
    with pytest.raises(rd.UnsupportedError, match="changed in place since"):
        found.check()
