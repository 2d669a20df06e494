"""A group of one process on a device: the exchanges are made, by NCCL on CUDA, and change nothing but rounding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import revdistill as rd
from tests.cuda.cases import DEVICE, EXACT, NEAR, assert_near, case, hypergradient

pytestmark = pytest.mark.cuda


@pytest.fixture
def group(device: torch.device, tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    if DEVICE == "standin":
        pytest.skip("torch.distributed has no backend for the stand-in")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{tmp_path / 'store'}",
        rank=0,
        world_size=1,
        **({"device_id": device} if device.type == "cuda" else {}),
    )
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_a_group_of_one(device: torch.device, group: dist.ProcessGroup, precision: torch.dtype, shard: bool) -> None:
    alone = hypergradient(case("mlp", precision, device), rd.Reversible(graph_bytes=0))
    shared = hypergradient(case("mlp", precision, device), rd.Reversible(graph_bytes=0), group=group, shard=shard)
    assert_near(shared, alone, EXACT if precision == torch.float64 else NEAR)
