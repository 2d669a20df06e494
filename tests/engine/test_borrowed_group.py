"""What is computed under a group does not keep it: a process whose group outlives dist.destroy_process_group aborts."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import revdistill as rd
from tests.torchrun import group_of_one


def test_nothing_keeps_the_group(tmp_path: Path) -> None:
    loss, params = rd.from_module(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(reduction="none"))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    kept = []
    with group_of_one(tmp_path) as group:
        seen = weakref.ref(group)
        torch.optim.Adam(params.values())  # which imports torch._dynamo
        order = rd.epochs(6, 3, 2)
        for shard in (False, True):
            batches = x.view(2, 3, 4).clone().requires_grad_(), y.view(2, 3)
            theta = rd.unroll(
                lambda p, b: loss(p, b).mean(), params, batches, rd.SGD(0.1), steps=3, group=group, shard=shard
            )
            kept.append(theta)
            sum(rd.distributed.sum(p).sum() for p in theta.values()).backward()
            kept.append(rd.attribute(loss, params, (x, y), rd.SGD(0.1), order=order, queries=(x, y), group=group))
        unfinished = rd.unroll(lambda p, b: loss(p, b).mean(), params, batches, rd.SGD(0.1), steps=3, group=group)
        del group
    gc.collect()
    assert not dist.is_initialized()
    assert seen() is None
    with pytest.raises(rd.RankError, match=r"group was destroyed .* call it after the last backward pass"):
        sum(p.sum() for p in unfinished.values()).backward()
    with pytest.raises(rd.UnsupportedError, match=r"on what rd\.attribute returns without a group"):
        kept[1].check()


def test_another_group_is_another(tmp_path: Path) -> None:
    """Also where it has got the place in memory of one that is gone."""
    params = {"w": torch.ones(3, requires_grad=True)}
    theta = []
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        with group_of_one(tmp_path / str(i)) as group:
            unrolled = rd.unroll(
                lambda p, b: p["w"].square().sum(), params, lambda k: (), rd.SGD(0.1), steps=2, group=group
            )
            unrolled["w"].sum().backward()
            theta.append(unrolled["w"])
    assert torch.equal(theta[0], theta[2])
