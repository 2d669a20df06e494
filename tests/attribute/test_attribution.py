"""What is done with scores: predictions, rankings, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import revdistill as rd
from revdistill.attribute.attribution import Attribution
from revdistill.attribute.check import Check

SCORES = torch.tensor([[0.5, -2.0, 0.0, 1.0], [-1.0, -3.0, -2.0, 0.0]], dtype=torch.float64)
LOSSES = torch.tensor([10.0, 20.0], dtype=torch.float64)


def made(checked: bool = False) -> Attribution:
    found = Attribution(SCORES, LOSSES)
    if checked:
        dropped = torch.eye(4, dtype=torch.bool)
        actual = torch.tensor([[9.0, 21.0], [12.5, 23.0], [10.0, 22.0], [9.5, 20.0]])
        found.checked = Check.of(SCORES, LOSSES, dropped, actual, drop=0.25, seed=3, smoothness=0.75)
    return found


def test_predictions() -> None:
    found = made()
    for dropped in ([0, 1], (1, 0), np.array([0, 1]), torch.tensor([1, 0], dtype=torch.int32), range(2)):
        assert found.predict(dropped).tolist() == [11.5, 24.0]
    assert found.predict([]).tolist() == LOSSES.tolist()
    rows = [[True, True, False, False], [False, False, False, True]]
    for several in (torch.tensor(rows), np.array(rows)):
        assert found.predict(several).tolist() == [[11.5, 9.0], [24.0, 20.0]]
    assert found.predict(torch.tensor(rows)[0]).tolist() == [11.5, 24.0]
    assert found.predict(torch.zeros(0, 4, dtype=torch.bool)).shape == (2, 0)


@pytest.mark.parametrize(
    ("dropped", "error", "message"),
    [
        ([4], ValueError, "dropped names example 4; accepted is a list of examples' numbers from 0 to 3"),
        ([-1], ValueError, "dropped names example -1"),
        ([2, 0, 2], ValueError, "dropped names example 2 twice"),
        ([0.5], TypeError, r"got shape \[1\], torch.float64"),
        ([[0, 1]], TypeError, r"got shape \[1, 2\], torch.int64"),
        (1, TypeError, r"got shape \[\], torch.int64"),
        (None, TypeError, "got NoneType"),
        ("ab", TypeError, "got str"),
        (
            torch.ones(3, dtype=torch.bool),
            ValueError,
            r"dropped has shape \[3\]; .* or a bool tensor \[4\] or \[R, 4\]",
        ),
        (torch.ones(1, 1, 4, dtype=torch.bool), ValueError, r"dropped has shape \[1, 1, 4\]"),
    ],
)
def test_what_cannot_be_dropped(dropped: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made().predict(dropped)


def test_the_most_helpful_and_the_most_harmful() -> None:
    found = made().top(0, 3)
    assert (found.helpful.indices.tolist(), found.helpful.scores.tolist()) == ([1], [-2.0])
    assert (found.harmful.indices.tolist(), found.harmful.scores.tolist()) == ([3, 0], [1.0, 0.5])
    assert made().top(1, 2).helpful.indices.tolist() == [1, 2]
    assert made().top(1, 99).harmful.indices.tolist() == []
    for arguments, message in (((2, 1), "q must be below the number of queries, 2"), ((-1, 1), "q must be at least 0")):
        with pytest.raises(ValueError, match=message):
            made().top(*arguments)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        made().top(0, 0)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "attribution.h5"
    for checked in (False, True):
        found = made(checked)
        found.save(path)
        for given in (path, str(path)):
            again = Attribution.load(given)
            assert torch.equal(again.scores, found.scores)
            assert torch.equal(again.losses, found.losses)
            assert again.scores.dtype == torch.float64
            assert again.to_numpy().keys() == found.to_numpy().keys()
            assert all(np.array_equal(a, found.to_numpy()[name]) for name, a in again.to_numpy().items())
            if found.checked is not None:
                assert again.checked is not None
                assert again.checked.to_dict() == found.checked.to_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["attribution.h5"]
    Attribution(SCORES.float(), LOSSES.float()).save(path)
    assert Attribution.load(path).scores.dtype == torch.float32
    with pytest.raises(rd.UnsupportedError, match=r"check\(\) trains again, but .* loaded from a file.*rd.attribute"):
        Attribution.load(path).check()
    with pytest.raises(rd.UnsupportedError, match=r"smoothness\(\) trains again"):
        Attribution.load(path).smoothness()


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "attribution.h5"
    made().save(path)
    broken = made(checked=True)
    assert broken.checked is not None
    broken.checked = replace(broken.checked, mean=object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        broken.save(path)
    assert torch.equal(Attribution.load(path).scores, SCORES)
    assert [p.name for p in tmp_path.iterdir()] == ["attribution.h5"]


def test_undefined_numbers_are_kept_as_such(tmp_path: Path) -> None:
    """A query whose losses do not vary has no LDS; with no other, the mean has no value."""
    found = Attribution(SCORES, LOSSES)
    dropped, actual = torch.eye(4, dtype=torch.bool)[:3], torch.ones(3, 2)
    found.checked = Check.of(SCORES, LOSSES, dropped, actual, drop=0.25, seed=0, smoothness=float("nan"))
    found.save(tmp_path / "a.h5")
    again = Attribution.load(tmp_path / "a.h5").checked
    assert again is not None
    assert np.isnan([again.mean, *again.interval, again.mean_query, again.smoothness, *again.lds]).all()
    assert again.advice is None


def put(name: str, values: Any) -> Callable[[h5py.File], None]:
    def change(f: h5py.File) -> None:
        if name in f:
            del f[name]
        if values is not None:
            f[name] = values

    return change


def attribute(name: str, value: Any) -> Callable[[h5py.File], None]:
    return lambda f: f.attrs.__setitem__(name, value)


def number(name: str, value: Any) -> Callable[[h5py.File], None]:
    return lambda f: f.attrs.__setitem__("check", json.dumps(json.loads(f.attrs["check"]) | {name: value}))


BAD: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "no scores": (put("scores", None), "has no dataset 'scores'"),
    "scores of integers": (put("scores", np.ones((2, 4), int)), "'scores' has dtype int64"),
    "scores not finite": (put("scores", np.full((2, 4), np.nan)), "'scores' has entries that are not finite"),
    "flat scores": (put("scores", np.ones(4)), r"'scores' has shape \[4\]"),
    "no numbers": (put("scores", np.ones((2, 0))), r"does not go with 'scores' of shape \[2, 0\]"),
    "losses": (put("losses", np.ones(3)), r"'losses' has shape \[3\], float64, which does not go with"),
    "two dtypes": (put("losses", np.ones(2, np.float32)), r"float32, which does not go with"),
    "version": (attribute("format_version", 2), "has format version 2"),
    "check": (attribute("check", "[1]"), "'check' holds a JSON list"),
    "dropped": (put("dropped", np.zeros((4, 3), np.uint8)), r"'dropped' has shape \[4, 3\]"),
    "dropped twice": (put("dropped", np.full((4, 4), 2, np.uint8)), "'dropped' has entries other than 0 and 1"),
    "actual": (put("actual", np.ones((4, 2))), r"'actual' \[4, 2\], which do not go"),
    "no actual": (put("actual", None), "has no dataset 'actual'"),
    "seed": (number("seed", 1.5), "the seed a whole number"),
    "mean": (number("mean", 2), "'check' has mean 2; expected a number from -1 to 1"),
    "a text": (number("smoothness", "1"), "'check' has smoothness '1'"),
    "interval": (number("interval", [0]), r"'check' has interval \[0\]; expected two numbers"),
    "another": (number("other", 1), "'check' must hold drop, seed, mean"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, tmp_path: Path) -> None:
    change, message = BAD[case]
    path = tmp_path / "attribution.h5"
    made(checked=True).save(path)
    with h5py.File(path, "a") as f:
        change(f)
    with pytest.raises(rd.ArtifactError, match=message) as caught:
        Attribution.load(path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(rd.ArtifactError, match="no such file"):
        Attribution.load(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("text")
    with pytest.raises(rd.ArtifactError, match="damaged or not an HDF5 file"):
        Attribution.load(tmp_path / "text.h5")
