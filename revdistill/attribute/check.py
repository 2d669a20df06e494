"""Whether scores are right: rank correlation with true retrainings, the linear datamodeling score (LDS)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revdistill.attribute.arguments import dropped_at_once
from revdistill.engine.showing import Shown

_RESAMPLES = 1000
_AT_ONCE = 2**19  # numbers ranked in one call
_COVERED = (2.5, 97.5)  # percentiles of a 95 % interval
FEWEST = 3  # retrainings: the ranks of two agree or do not
ROUGH = 0.9  # smoothness below which scores are not to be trusted without retrainings (benchmarks/attribution.py)
ADVICE = (
    "training is not smooth in the examples' weights (smoothness {:.2f}, of at most 1), so a derivative may say "
    "little about leaving examples out: trust the LDS of check(); GELU or softplus in the place of ReLU, a smaller lr, "
    "and a larger eps (or eps_root) of Adam make it smoother"
)
Interval = tuple[float, float]


@dataclass(frozen=True, repr=False)
class Check(Shown):
    """Predicted and true losses of R trainings without random subsets of the examples.

    An LDS is the Spearman rank correlation of both over the trainings. Where a query's true losses do not vary, it has
    none (nan) and is left out of the mean; where they do and the predicted ones do not, it is 0.

    Attributes:
        drop: share of the examples in each subset.
        seed: of the subsets.
        dropped: bool [R, n], the subsets.
        predicted: [K, R], losses - sum of the scores of a subset.
        actual: [K, R], losses after a training without it.
        lds: [K], of each query.
        mean: of `lds`; nan where no query has one.
        interval: 95 % of `mean`, by bootstrap over queries and trainings both.
        mean_query: LDS of the mean loss over the queries.
        mean_query_interval: likewise.
        smoothness: see `smoothness`; nan where nothing moved.
        advice: what makes training smoother, where that is needed; otherwise None.

    Source: Park et al. 2023 (TRAK) for the LDS.
    """

    drop: float
    seed: int
    dropped: np.ndarray = field(repr=False)
    predicted: np.ndarray = field(repr=False)
    actual: np.ndarray = field(repr=False)
    lds: np.ndarray = field(repr=False)
    mean: float
    interval: Interval
    mean_query: float
    mean_query_interval: Interval
    smoothness: float

    @classmethod
    def of(
        cls,
        scores: Tensor,
        losses: Tensor,
        dropped: Tensor,
        actual: Tensor,
        *,
        drop: float,
        seed: int,
        smoothness: float,
    ) -> Check:
        """From scores [K, n], losses [K], bool [R, n] and the true losses [R, K]; makes the bootstrap."""
        masks, truth = dropped.cpu().numpy(), actual.T.double().cpu().numpy()
        guess = predicted_losses(scores.double().cpu().numpy(), losses.double().cpu().numpy(), masks)
        lds = spearman(guess, truth)
        means, of_mean = _resampled(guess, truth, seed)
        return cls(
            drop=float(drop),
            seed=seed,
            dropped=masks,
            predicted=guess,
            actual=truth,
            lds=lds,
            mean=float(mean_known(lds)),
            interval=_interval(means),
            mean_query=float(spearman(guess.mean(0), truth.mean(0))),
            mean_query_interval=_interval(of_mean),
            smoothness=smoothness,
        )

    @classmethod
    def from_numbers(
        cls, scores: np.ndarray, losses: np.ndarray, dropped: np.ndarray, actual: np.ndarray, numbers: dict[str, Any]
    ) -> Check:
        """From what a file keeps of it: the subsets [R, n], the true losses [K, R], and NUMBERS."""
        guess = predicted_losses(scores.astype(np.float64), losses.astype(np.float64), dropped)
        return cls(dropped=dropped, predicted=guess, actual=actual, lds=spearman(guess, actual), **numbers)

    @property
    def advice(self) -> str | None:
        """What helps, where training is not smooth."""
        return ADVICE.format(self.smoothness) if self.smoothness < ROUGH else None

    def to_numpy(self) -> dict[str, np.ndarray]:
        """{"dropped", "predicted", "actual", "lds"}, in the shapes that they have here."""
        return {name: getattr(self, name) for name in ("dropped", "predicted", "actual", "lds")}

    def to_dict(self) -> dict[str, Any]:
        """Its numbers, in the types of JSON; nan is None."""
        named = {name: getattr(self, name) for name in NUMBERS}
        return {name: _plain(value) for name, value in named.items()}


NUMBERS = ("drop", "seed", "mean", "interval", "mean_query", "mean_query_interval", "smoothness")


def random_subsets(n: int, drop: float, count: int, seed: int) -> Tensor:
    """Random subsets of n examples; the first ones are the same whatever `count` is.

    Args:
        n: examples.
        drop: their share in each subset; it has at least one example, and not all.
        count: R.
        seed: of the subsets.

    Returns:
        bool [R, n] on the CPU.

    Raises:
        TypeError, ValueError: drop is no share.
    """
    size = dropped_at_once(drop, n)
    generator = torch.Generator().manual_seed(seed % 2**63)
    masks = torch.zeros(count, n, dtype=torch.bool)
    for mask in masks:
        mask[torch.randperm(n, generator=generator)[:size]] = True
    return masks


def predicted_losses(scores: np.ndarray, losses: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """[K, R], from scores [K, n], losses [K] and bool [R, n]."""
    predicted: np.ndarray = losses[:, None] - scores @ dropped.T.astype(np.float64)
    return predicted


def spearman(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Rank correlations over the last dimension: nan where the actual values do not vary, else 0 where the predicted
    ones do not.
    """
    from scipy.stats import rankdata

    a, b = (rankdata(values, axis=-1) for values in (predicted, actual))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    norms = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    found = np.divide((a * b).sum(-1), norms, out=np.zeros_like(norms), where=norms > 0)
    result: np.ndarray = np.where(np.ptp(actual, -1) > 0, found, np.nan)
    return result


def _resampled(predicted: np.ndarray, actual: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean LDS, and the LDS of the mean loss, of queries and trainings drawn again with replacement."""
    draw = np.random.default_rng(seed)
    queries, trainings = predicted.shape
    at_once = max(1, _AT_ONCE // predicted.size)
    means, of_mean = [], []
    for first in range(0, _RESAMPLES, at_once):
        count = min(at_once, _RESAMPLES - first)
        q = draw.integers(queries, size=(count, queries, 1))
        r = draw.integers(trainings, size=(count, 1, trainings))
        guess, truth = predicted[q, r], actual[q, r]
        means.append(mean_known(spearman(guess, truth)))
        of_mean.append(spearman(guess.mean(1), truth.mean(1)))
    return np.concatenate(means), np.concatenate(of_mean)


def mean_known(values: np.ndarray) -> np.ndarray:
    """Over the last dimension, of those that are not nan; nan where there are none."""
    kept = ~np.isnan(values)
    sums, counts = np.where(kept, values, 0.0).sum(-1), kept.sum(-1)
    found: np.ndarray = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return found


def _interval(values: np.ndarray) -> Interval:
    kept = values[~np.isnan(values)]
    if not len(kept):
        return float("nan"), float("nan")
    low, high = np.percentile(kept, _COVERED)
    return float(low), float(high)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and np.isnan(value) else value
