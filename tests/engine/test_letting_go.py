"""What an unroll keeps is freed with its result, as a tensor's graph is, without the collector of cycles."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd
from revdistill.engine.adjoints import fixed_point
from revdistill.engine.adjoints.trajectory import Trajectory

ADJOINTS: list[Any] = [rd.Reversible(graph_bytes=0), rd.Reversible(), rd.Checkpoint(), rd.StoreAll()]


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Every trajectory, and every recording, that is made."""
    seen: list[weakref.ref[Any]] = []

    def watch(cls: type) -> None:
        init = cls.__init__

        def watched(self: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(weakref.ref(self))
            init(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", watched)

    watch(Trajectory)
    watch(fixed_point.Unrolled)
    return seen


def loss(p: dict[str, Tensor], batch: tuple[int]) -> Tensor:
    value = (p["w"] ** 3).sum()
    return value * (float("nan") if batch[0] < 0 else 1.0)


def unrolled(adjoint: Any, **options: Any) -> Any:
    w = torch.ones(4, requires_grad=True)
    return rd.unroll(loss, {"w": w}, lambda k: (k,), rd.SGD(0.01), steps=5, adjoint=adjoint, **options)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_at_del_without_a_backward(adjoint: Any, kept: list[weakref.ref[Any]]) -> None:
    """Regression: the record held the result, which held the record."""
    theta = unrolled(adjoint)
    assert any(ref() is not None for ref in kept)
    del theta
    assert all(ref() is None for ref in kept)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_with_all_that_can_be_asked_for(adjoint: Any, kept: list[weakref.ref[Any]]) -> None:
    found = unrolled(adjoint, average=0.9, return_stats=True, return_state=True)
    del found
    assert all(ref() is None for ref in kept)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_after_a_backward(adjoint: Any, kept: list[weakref.ref[Any]]) -> None:
    theta = unrolled(adjoint)
    theta["w"].sum().backward()
    del theta
    assert all(ref() is None for ref in kept)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_where_the_way_back_raises(adjoint: Any, kept: list[weakref.ref[Any]]) -> None:
    def explode(k: int, norm: float) -> None:
        raise RuntimeError("on the way back")

    theta = unrolled(adjoint, on_step_back=explode)
    with pytest.raises(RuntimeError, match="on the way back"):
        theta["w"].sum().backward()
    del theta
    # pytest's record of the error, with its frames, is gone at the end of the `with`
    assert all(ref() is None for ref in kept)


def test_a_saved_parameter_is_its_own_size() -> None:
    """Regression: a view of all parameters was saved with all of them."""
    params = {"small": torch.ones(3, requires_grad=True), "large": torch.ones(5000, requires_grad=True)}

    def both(p: dict[str, Tensor], _: Any) -> Tensor:
        return p["small"].sum() * p["large"].sum()

    for options in ({}, {"adjoint": rd.Backprop()}, {"save_at": [0, 2]}):
        theta = rd.unroll(both, params, lambda k: (), rd.SGD(1e-6), steps=2, **options)
        with torch.no_grad():
            flat = rd.unroll(both, params, lambda k: (), rd.SGD(1e-6), steps=2, **options)
        for found in (theta["small"].detach(), flat["small"]):
            file = io.BytesIO()
            torch.save(found, file)
            assert file.tell() < 3000
