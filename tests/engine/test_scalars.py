"""Numbers are numpy's as well as Python's, wherever an argument is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import revdistill as rd


def train(optimizer: Any = None, **options: Any) -> Any:
    params = {n: torch.tensor([0.5, 2.0], dtype=torch.float64) for n in ("a", "b")}
    return rd.unroll(
        lambda p, b: (p["a"] - p["b"].square()).square().sum(),
        params,
        lambda k: (),
        optimizer or rd.SGD(0.1, 0.5),
        **({"steps": 4} | options),
    )


def flat(found: Any) -> list[Tensor]:
    return [t for part in (found if isinstance(found, tuple) else (found,)) for t in part.values()]


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_numpys_floats(kind: Any) -> None:
    """Regression: only float64, which is a Python float, was accepted."""
    for make in (
        lambda n: rd.SGD(n(0.125), n(0.5), n(0.25), weight_decay=n(0.125), max_norm=n(0.5)),
        lambda n: rd.AdamW(n(0.125), (n(0.5), n(0.75)), n(0.125), {"a": n(0.125), "b": n(0)}, eps_root=n(0.125)),
        lambda n: rd.RMSprop(n(0.125), n(0.5), n(0.125), momentum=n(0.5)),
        lambda n: rd.SGD(lambda k: n(0.125), lambda k: np.array([0.5], dtype=np.dtype(n))),
    ):
        assert all(map(torch.equal, flat(train(make(kind))), flat(train(make(float)))))
    options = {"average": 0.25, "clip_back": 0.5}
    found = train(**{name: kind(value) for name, value in options.items()})
    assert all(map(torch.equal, flat(found), flat(train(**options))))
    assert all(map(torch.equal, flat(found), flat(train(average=torch.tensor(0.25)))))


@pytest.mark.parametrize("saved", [[np.int64(0), np.int32(3)], np.array([0, 3]), torch.tensor([0, 3])])
def test_numpys_integers(saved: Any) -> None:
    """Regression: a count that numpy gave was refused."""
    adjoint = rd.Checkpoint(every=np.int64(2))
    found = train(steps=np.int64(4), window=np.int32(2), seed=np.uint8(3), save_at=saved, adjoint=adjoint)
    assert all(map(torch.equal, flat(found), flat(train(window=2, seed=3, save_at=[0, 3]))))
    rd.Reversible(graph_bytes=np.int64(0))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"optimizer": rd.SGD(10**400)}, ValueError, "lr must be finite and at least 0, got inf"),
        ({"optimizer": rd.SGD(np.full(4, 0.1))}, TypeError, r"got ndarray; give torch.as_tensor\(lr\)"),
        ({"optimizer": rd.SGD({"a": [0.1] * 4, "b": 0.1})}, TypeError, r"got list; give torch.as_tensor\(lr\['a'\]\)"),
        ({"optimizer": rd.SGD(np.bool_(True))}, TypeError, "lr must be a float, a tensor or a schedule, got bool"),
        ({"optimizer": rd.SGD(nn.Identity())}, TypeError, "lr must be a float, a tensor or a schedule, got Identity"),
        (
            {"optimizer": rd.SGD(nn.ParameterDict({"a": torch.ones(())}))},
            TypeError,
            r"got ParameterDict; give dict\(lr.items\(\)\)",
        ),
        ({"optimizer": rd.SGD(torch.optim.lr_scheduler.StepLR)}, TypeError, "lr must be a float, .* got type"),
        ({"optimizer": rd.SGD(torch.full((4,), 0.1).to_sparse())}, ValueError, "lr has layout torch.sparse_coo"),
        ({"average": torch.ones(5, dtype=torch.complex64)}, TypeError, "average must be real, got a tensor of"),
        ({"average": torch.tensor(0.5, requires_grad=True)}, ValueError, "average requires grad"),
        ({"clip_back": 10**400}, ValueError, "clip_back must be above 0 and finite"),
        ({"steps": np.float64(4)}, TypeError, "steps must be an int, got float64"),
        ({"save_at": np.array([0.0, 1.0])}, TypeError, r"save_at\[0\] must be an int, got float"),
    ],
)
def test_what_is_no_number_is_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        train(**options)
