"""What a tensor must be that the engine is given: each error names it, what came and what is accepted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revdistill.engine.errors import UnsupportedError

# What holds its numbers itself; a subclass (DTensor, FakeTensor) may hold them elsewhere.
PLAIN: set[type] = {Tensor, nn.Parameter}


def check_tensor(label: str, t: Any) -> None:
    """Raise TypeError, ValueError or UnsupportedError where t is no dense tensor that holds its numbers itself."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(t).__name__}")
    if is_lazy(t):
        raise ValueError(f"{label} has no shape yet (a lazy module makes it); run one batch through the module first")
    check_plain(label, t)
    if t.layout != torch.strided:
        raise ValueError(f"{label} has layout {t.layout}; accepted are dense tensors: call .to_dense()")
    if t.is_meta:
        raise ValueError(f"{label} is on device meta and holds no numbers; make it on a real device")
    if t.is_inference():
        raise UnsupportedError(
            f"{label} was made in torch.inference_mode() and cannot be differentiated; make it outside, or clone it"
        )


def check_plain(label: str, t: Tensor) -> None:
    """Raise TypeError where t is a subclass of torch.Tensor."""
    if type(t) not in PLAIN:
        raise TypeError(
            f"{label} is a {type(t).__name__}, a subclass of torch.Tensor whose numbers the engine cannot read; give a "
            "plain tensor (of a DTensor, full_tensor(); of a module in FSDP, the module before it was sharded, and "
            "group= and shard=True to rd.unroll, which keeps the state in parts)"
        )
