"""Modules and tensors of which torch gives each process a part are refused by name, with the way to keep parts here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import revdistill as rd
from tests.torchrun import group_of_one

WAY = r"group= and shard=True to rd\.unroll"
CE = nn.functional.cross_entropy


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    with group_of_one(tmp_path) as found:
        yield found


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_parallel_modules() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(
        rd.UnsupportedError, match=r"DistributedDataParallel.*\(net\.module\), and group= to rd\.unroll"
    ):
        rd.from_module(nn.parallel.DistributedDataParallel(net), CE)
    mesh = init_device_mesh("cpu", (1,))
    wrapped = FullyShardedDataParallel(nn.Linear(3, 2), device_id=torch.device("cpu"))
    with pytest.raises(
        rd.UnsupportedError, match=rf"net is a FullyShardedDataParallel.*before it was wrapped, and {WAY}"
    ):
        rd.from_module(wrapped, CE)
    fully_shard(net, mesh=mesh)
    with pytest.raises(rd.UnsupportedError, match=rf"net's '0.weight' is a DTensor.*before that, and {WAY}"):
        rd.from_module(net, CE)


@pytest.mark.parametrize("where", ["params", "batches", "hyper"])
def test_tensors_in_parts(where: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    given = {"params": torch.ones(3, requires_grad=True), "batches": torch.ones(2, 3), "hyper": torch.ones(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given[where] = distribute_tensor(given[where].detach(), init_device_mesh("cpu", (1,)), [Replicate()])
    with pytest.raises(TypeError, match=rf"{where}.* is a DTensor.*{WAY}"):
        rd.unroll(
            lambda p, b, h: (p["w"] * b[0] * h).sum(),
            {"w": given["params"]},
            (given["batches"],),
            rd.SGD(0.1),
            steps=1,
            hyper=given["hyper"],
        )
