"""Networks and optimizers unrolled on a device: every bit comes back, and the hypergradients are autograd's and the
CPU's.
"""

from __future__ import annotations

import pytest
import torch

import revdistill as rd
from tests.cuda.cases import DEVICE, EXACT, NEAR, NETWORKS, Optimizer, assert_near, case, hypergradient, on_the_cpu

pytestmark = pytest.mark.cuda

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda lr: rd.SGD(lr, 0.9, weight_decay=0.01),
    "adam": lambda lr: rd.Adam(lr / 10, (0.9, 0.999), 1e-3, 0.01),
    "adamw": lambda lr: rd.AdamW(lr / 10, (0.9, 0.999), 1e-3, 0.01),
}


@pytest.fixture(params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "recurrent" and DEVICE == "standin":
        pytest.skip("the stand-in has no fused recurrent cell, and the CPU, which it rests on, has none")
    return str(request.param)


def test_float64_hypergradients_are_autograds(device: torch.device, name: str) -> None:
    found, expected = (
        hypergradient(case(name, torch.float64, device), a) for a in (rd.Reversible(graph_bytes=0), rd.Backprop())
    )
    assert_near(found, expected, EXACT)


def test_float32_comes_back_to_the_bit_and_is_near_float64(device: torch.device, name: str) -> None:
    """Other devices draw other random numbers: a random loss is held against float32 autograd's on its own device."""
    found = hypergradient(case(name, torch.float32, device), rd.Reversible(graph_bytes=0))
    own = name == "dropout"
    expected = hypergradient(case(name, torch.float32, device), rd.Backprop()) if own else on_the_cpu(name)
    assert_near(found, expected, NEAR)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_in_float64(device: torch.device, optimizer: str) -> None:
    problem = case("mlp", torch.float64, device)
    found, expected = (
        hypergradient(problem, a, optimizer=OPTIMIZERS[optimizer])
        for a in (rd.Reversible(graph_bytes=0), rd.Backprop())
    )
    assert_near(found, expected, EXACT)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_in_float32(device: torch.device, optimizer: str) -> None:
    found = hypergradient(
        case("mlp", torch.float32, device), rd.Reversible(graph_bytes=0), optimizer=OPTIMIZERS[optimizer]
    )
    assert_near(found, on_the_cpu("mlp", optimizer=OPTIMIZERS[optimizer]), NEAR)
