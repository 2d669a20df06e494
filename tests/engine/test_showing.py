"""What users print says something in a line, and never a tensor's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import revdistill as rd
from revdistill.attribute.attribution import Ranked, Top
from revdistill.attribute.check import Check
from revdistill.attribute.retraining import Retrained
from revdistill.distill.artifact import Artifact
from revdistill.engine.optimizers.optimizer import Optimizer
from revdistill.engine.showing import brief, size
from revdistill.tune.schedule import Schedule

RATES = torch.linspace(0.02, 0.1, 900)


def artifact(**changes: Any) -> Artifact:
    given: dict[str, Any] = dict(
        x=np.zeros((30, 10, 1, 8, 8), np.float32),
        y=np.zeros((30, 10), np.int64),
        lr=np.linspace(0.02, 0.1, 90, dtype=np.float32),
        momentum=np.full(90, 0.7, np.float32),
        dataset="digits",
        architectures=["MLP", "LeNet"],
        epochs=3,
        seed=0,
        normalization={"mean": [0.0], "std": [1.0]},
        config={"threads": 1},
    )
    return Artifact(**(given | changes))


def schedule(**changes: Any) -> Schedule:
    rows = np.full((100, 2), 0.05, np.float32)
    arrays = {"lr": rows, "momentum": rows, "weight_decay": rows[0], "init_scale": rows[0]}
    return Schedule(**(arrays | {"optimizer": "adamw", "groups": ["fc1", "fc2"]} | changes))


def attribution(checked: Check | None = None) -> rd.Attribution:
    scores = torch.linspace(-0.25, 0.5, 300).reshape(3, 100)
    return rd.Attribution(scores, torch.tensor([0.1, 0.2, 0.3]), checked=checked)


def check() -> Check:
    torch.manual_seed(0)
    masks = torch.rand(9, 100) < 0.1
    actual = torch.rand(9, 3)
    found = attribution()
    return Check.of(found.scores, found.losses, masks, actual, drop=0.1, seed=4, smoothness=0.98765)


CHECK = check()
WALKED = rd.BackwardNorms()
for k, norm in ((2, 1.0), (1, 12.345678), (0, 4321.0)):
    WALKED(k, norm)
SLOTS = {"momentum_buffer": {f"layer{i}.weight": torch.ones(20, 30) for i in range(6)}}

CASES: dict[str, tuple[Any, str]] = {
    "sgd": (
        rd.SGD(RATES.clone().requires_grad_()),
        "SGD(lr=float32 [900], 0.02 to 0.1, requires grad, momentum=0.9, dampening=0, nesterov=False, weight_decay=0, "
        "max_norm=None)",
    ),
    "a learned number": (rd.RMSprop(torch.tensor(0.5, requires_grad=True)), "RMSprop(lr=0.5 (float32 [], requires"),
    "groups": (
        rd.AdamW({f"p{i}": RATES for i in range(6)}),
        "AdamW(lr={'p0': float32 [900], 0.02 to 0.1, 'p1': float32 [900], 0.02 to 0.1, 'p2': float32 [900], 0.02 to "
        "0.1, 'p3': float32 [900], 0.02 to 0.1, ... (6 in all)}, betas=(0.9, 0.999), eps=1e-08,",
    ),
    "a state": (
        rd.OptimizerState(7, SLOTS),
        "OptimizerState(step=7, slots={'momentum_buffer': {'layer0.weight': float32 [20, 30], 1 to 1,",
    ),
    "minibatches": (
        rd.Minibatches((torch.zeros(500, 3), torch.ones(500)), torch.arange(500).reshape(50, 10)),
        "Minibatches(data=(float32 [500, 3], 0 to 0, float32 [500], 1 to 1), order=int64 [50, 10], 0 to 499)",
    ),
    "stats": (
        rd.UnrollStats(90, 1000, 24_000, 3 * 2**20),
        "UnrollStats(steps=90, parameters=1000, state=23.4 KiB, history=3.0 MiB (280 bits per parameter and step))",
    ),
    "stats of backprop": (
        rd.UnrollStats(90, 1000, 24, None),
        "UnrollStats(steps=90, parameters=1000, state=24 bytes)",
    ),
    "no norms": (rd.BackwardNorms(), "BackwardNorms(no way back yet)"),
    "norms": (WALKED, "BackwardNorms(1 at step 2, 4321 at step 0, explodes from step 0 down)"),
    "attribution": (
        attribution(),
        "Attribution(queries=3, examples=100, scores=float32 [3, 100], -0.25 to 0.5, mean loss=0.2)",
    ),
    "checked": (attribution(CHECK), f", mean loss=0.2, LDS={CHECK.mean:.4g})"),
    "check": (CHECK, f"Check(drop=0.1, seed=4, mean={CHECK.mean:.4g}, interval=({CHECK.interval[0]:.4g}, "),
    "top": (
        Top(Ranked(torch.arange(3), RATES[:3]), Ranked(torch.arange(2), RATES[:2])),
        "Top(helpful=Ranked(indices=int64 [3], 0 to 2, scores=float32 [3], 0.02 to 0.02018), harmful=Ranked(",
    ),
    "retrained": (Retrained(torch.zeros(5, 2)), "Retrained(losses=float32 [5, 2], 0 to 0, theta=None)"),
    "artifact": (
        artifact(),
        "Artifact(digits: 30 batches of 10, inputs 1 x 8 x 8, hard labels; 90 steps of sgd, lr float32 [90], 0.02 to "
        "0.1; for MLP, LeNet)",
    ),
    "evaluated": (
        artifact(
            y=np.zeros((30, 10, 10), np.float32),
            evaluation={"MLP": {"mean": 0.931}, "LeNet": {"mean": None}, "other": 3},
        ),
        "soft labels of 10 classes; 90 steps of sgd, lr float32 [90], 0.02 to 0.1; for MLP, LeNet; test accuracy MLP "
        "93.1%)",
    ),
    "schedule": (
        schedule(comparison={"start": {"accuracy": 0.5}, "learned": {"accuracy": 0.75}}),
        "Schedule(100 steps of adamw of 2 layers; lr float32 [100, 2], 0.05 to 0.05; momentum float32 [100, 2], 0.05 "
        "to 0.05; weight_decay float32 [2], 0.05 to 0.05; init_scale float32 [2], 0.05 to 0.05; test accuracy start "
        "50.0%, learned 75.0%)",
    ),
    "reversible": (rd.Reversible(), "Reversible(history='device', fractional_bits=44, graph_bytes=None)"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_line_that_says_something(name: str) -> None:
    value, expected = CASES[name]
    text = repr(value)
    assert expected in text
    assert "tensor(" not in text
    assert "array(" not in text
    assert "\n" not in text
    assert len(text) < 500


def test_the_way_back_is_in_the_stats() -> None:
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = rd.SGD(0.1)
    theta, stats = rd.unroll(
        lambda p, _: p["w"].square().sum(), {"w": w}, lambda k: (), optimizer, steps=4, return_stats=True
    )
    assert "amplification" not in repr(stats)
    theta["w"].sum().backward()
    assert repr(stats).endswith(f"amplification={stats.amplification:.3g})")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(3), "3"),
        (torch.tensor([]), "float32 [0]"),
        (torch.tensor([True, False]), "bool [2], False to True"),
        (torch.zeros(2, dtype=torch.complex64), "complex64 [2]"),
        (np.array(["a", "b"]), "<U1 [2]"),
        (np.arange(5.0)[::-1], "float64 [5], 0 to 4"),
        (np.arange(3, dtype=">i4"), ">i4 [3], 0 to 2"),
        ((1.23456789,), "(1.235,)"),
        ([1, 2, 3, 4, 5], "[1, 2, 3, 4, ... (5 in all)]"),
        ("x" * 100, f"'{'x' * 56}..."),
        (float("nan"), "nan"),
    ],
    ids=str,
)
def test_brief(value: Any, expected: str) -> None:
    assert brief(value) == expected


@pytest.mark.parametrize(("count", "expected"), [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB")])
def test_sizes(count: int, expected: str) -> None:
    assert size(count) == expected
    assert size(2**60) == "1048576.0 TiB"


def test_under_torchs_transforms_it_still_shows() -> None:
    seen = []
    torch.func.vmap(lambda t: (seen.append(repr(rd.SGD(t))), t)[1])(torch.ones(3, 2))
    assert seen[0].startswith("SGD(lr=float32 [2]")


def test_an_array_that_nobody_may_write_is_shown_without_a_warning() -> None:
    values = np.arange(3.0)
    values.flags.writeable = False
    assert brief(values) == "float64 [3], 0 to 2"


def test_an_optimizer_that_is_no_dataclass_is_shown() -> None:
    class Own(Optimizer):
        def resolve(self, *_: Any) -> Any:
            raise AssertionError

    assert "Own object" in repr(Own())
