"""What an attribution found: a score for each query and training example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from revdistill.attribute.arguments import dropped_at_once, flag, integer, subsets
from revdistill.attribute.check import FEWEST, Check, random_subsets
from revdistill.attribute.retraining import retrain
from revdistill.attribute.run import Params, Run
from revdistill.attribute.smoothness import smoothness
from revdistill.engine import UnsupportedError
from revdistill.engine.showing import Shown, brief


@dataclass(frozen=True, repr=False)
class Ranked(Shown):
    """Examples by the size of their scores, largest first.

    indices: int64 [m]; scores: [m].
    """

    indices: Tensor
    scores: Tensor


@dataclass(frozen=True, repr=False)
class Top(Shown):
    """The examples that did most to one query.

    helpful: leaving them out raises its loss (scores below 0); harmful: leaving them out lowers it (above 0).
    """

    helpful: Ranked
    harmful: Ranked


class Attribution:
    """What each of n training examples did to the losses of K queries.

    Args:
        scores: [K, n], dL_q/dw_i at weights 1. *Positive*: leaving the example out lowers the loss.
        losses: [K], as trained.
        theta: the trained parameters; None where it was loaded.
        run: what `check` trains again; None where it was loaded.
        checked: what `check` found last, None before.

    Attributes: as these.
    """

    def __init__(
        self,
        scores: Tensor,
        losses: Tensor,
        *,
        theta: Params | None = None,
        run: Run | None = None,
        checked: Check | None = None,
    ) -> None:
        self.scores, self.losses, self.theta, self.run, self.checked = scores, losses, theta, run, checked

    def __repr__(self) -> str:
        queries, n = self.scores.shape
        found = f"scores={brief(self.scores)}, mean loss={brief(float(self.losses.double().mean()))}"
        lds = "" if self.checked is None else f", LDS={brief(self.checked.mean)}"
        return f"Attribution(queries={queries}, examples={n}, {found}{lds})"

    def predict(self, dropped: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """The queries' losses after a training without some examples, to first order: losses - sum of their scores.

        Args:
            dropped: the numbers of the examples, each once; or a bool tensor or array [n], or [R, n] for R trainings.

        Returns:
            [K]; [K, R] for R trainings.

        Raises:
            TypeError, ValueError: there is no such example, one is named twice, or the shape is another.
        """
        masks, single = subsets(dropped, self.scores.shape[1])
        sums = self.scores @ masks.to(self.scores).T
        predicted = self.losses[:, None] - sums
        return predicted[:, 0] if single else predicted

    def top(self, q: int, n: int) -> Top:
        """The n most helpful and the n most harmful examples of a query.

        Args:
            q: the query, from 0.
            n: how many of each; fewer where fewer have a score of that sign.

        Raises:
            TypeError, ValueError: there is no such query, or n is below 1.
        """
        q, n = integer("q", q, 0), min(integer("n", n, 1), self.scores.shape[1])
        if q >= len(self.scores):
            raise ValueError(f"q must be below the number of queries, {len(self.scores)}, got {q}")
        return Top(_ranked(-self.scores[q], self.scores[q], n), _ranked(self.scores[q], self.scores[q], n))

    def check(self, drop: float = 0.01, retrainings: int = 50, seed: int = 0, *, progress: bool = False) -> Check:
        """Train again without random subsets of the examples, and compare what was predicted with what came.

        From the same start, in the same order, with the same random numbers. `save` keeps the result.

        Args:
            drop: share of the examples in each subset; at least one example is left out, and one is left.
            retrainings: R, at least 3.
            seed: of the subsets.
            progress: bars on stderr.

        Returns:
            A `Check`: LDS per query, its mean with an interval, and the smoothness. Cost: R trainings and
            those of `smoothness`, see `retrain`.

        Raises:
            TypeError, ValueError: an argument will not do.
            UnsupportedError: this attribution was loaded from a file, or what it was computed from has changed.
            NonFiniteError, RangeError: a training went where numbers end.
        """
        run = self._trainable("check", drop, seed)
        retrainings, progress = integer("retrainings", retrainings, FEWEST), flag("progress", progress)
        smooth = smoothness(run, drop, seed, progress=progress)
        dropped = random_subsets(run.examples, drop, retrainings, seed)
        actual = retrain(run, ~dropped, progress=progress).losses
        self.checked = Check.of(self.scores, self.losses, dropped, actual, drop=drop, seed=int(seed), smoothness=smooth)
        return self.checked

    def smoothness(self, drop: float = 0.01, seed: int = 0, *, progress: bool = False) -> float:
        """How far a derivative says what leaving examples out does, before any retraining: see `smoothness`.

        Args, Raises: as of `check`.

        Returns:
            From -1 to 1, near 1 where scores are to be trusted. Cost: 7 trainings side by side, or 3.
        """
        return smoothness(self._trainable("smoothness", drop, seed), drop, seed, progress=flag("progress", progress))

    def _trainable(self, asked: str, drop: float, seed: int) -> Run:
        dropped_at_once(drop, self.scores.shape[1])
        integer("seed", seed, 0)
        if self.run is None:
            raise UnsupportedError(
                f"{asked}() trains again, but this attribution was loaded from a file, which holds no loss and no "
                "data; call it on what rd.attribute returns, and save() afterwards: the file keeps what check() found"
            )
        if self.run.on_many_ranks:
            raise UnsupportedError(
                f"{asked}() trains without examples of all ranks, and with a group each rank knows its own; call it on "
                "what rd.attribute returns without a group, on one process"
            )
        self.run.confirm()
        return self.run

    def save(self, path: str | Path) -> None:
        """Write scores, losses and what `check` found to an HDF5 file: whole, or what was there is left.

        Raises:
            OSError: it cannot be written.
        """
        from revdistill.attribute.file import write

        arrays = self.to_numpy()
        write(Path(path), arrays["scores"], arrays["losses"], self.checked)

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """What `save` wrote, on the CPU. It cannot train again.

        Raises:
            ArtifactError: names the file and what is wrong with it.
        """
        from revdistill.attribute.file import read

        scores, losses, checked = read(path)
        return cls(torch.from_numpy(scores), torch.from_numpy(losses), checked=checked)

    def to_numpy(self) -> dict[str, np.ndarray]:
        """{"scores": [K, n], "losses": [K]}; of `checked` too, where there is one: see `Check.to_numpy`."""
        arrays = {name: getattr(self, name).cpu().numpy() for name in ("scores", "losses")}
        return arrays if self.checked is None else arrays | self.checked.to_numpy()


def _ranked(by: Tensor, scores: Tensor, n: int) -> Ranked:
    found = by.topk(n)
    indices = found.indices[found.values > 0]
    return Ranked(indices, scores[indices])
