"""Attribution on a device that is no CPU: as on the CPU, but for the last bits."""

from __future__ import annotations

import pytest
import torch

import revdistill as rd
from tests import standin
from tests.attribute.small import N, attributed, data, params, queries

pytestmark = pytest.mark.standin


def found(where: torch.device) -> rd.Attribution:
    return attributed(
        params={name: p.to(where) for name, p in params().items()},
        data=tuple(t.to(where) for t in data()),
        queries=tuple(t.to(where) for t in queries()),
        seed=0,
    )


def test_scores_and_checks_are_as_on_the_cpu(counts: standin.Counts) -> None:
    here, there = found(torch.device("cpu")), found(standin.device())
    torch.testing.assert_close(there.scores.cpu(), here.scores, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(there.losses.cpu(), here.losses, rtol=1e-9, atol=1e-9)
    mine, theirs = here.check(0.2, 4), there.check(0.2, 4)
    assert mine.actual == pytest.approx(theirs.actual)
    assert mine.mean == pytest.approx(theirs.mean)
    assert mine.smoothness == pytest.approx(theirs.smoothness, abs=1e-6)
    torch.testing.assert_close(there.predict([1, 2]).cpu(), here.predict([1, 2]))
    assert there.top(0, 2).harmful.indices.tolist() == here.top(0, 2).harmful.indices.tolist()
    assert there.to_numpy()["scores"].shape == (3, N)
    with pytest.raises(ValueError, match=r"data\[0\] is on cpu, but params are on .*; move it with"):
        attributed(params={name: p.to(standin.device()) for name, p in params().items()})
