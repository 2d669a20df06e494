"""TensorFloat-32 off on CUDA, and every setting of it as it was afterwards.

torch 2.9 and newer keep it twice: in the old switches (`allow_tf32`, `set_float32_matmul_precision`) and in the new
ones (`fp32_precision`, of an operator, of the backend, of all). Where the two disagree, reading the old ones is a
RuntimeError, and torch itself reads them: in `torch.backends.cudnn.flags`, and in its compiler. So both are set, to the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_OFF = "ieee"


@contextmanager
def without_tf32() -> Iterator[None]:
    """The context in which float32 products and convolutions on CUDA are made in float32, for the whole process."""
    restore = _turn_off() if hasattr(torch.backends.cuda.matmul, "fp32_precision") else _turn_off_old()
    try:
        yield
    finally:
        restore()


def _turn_off_old() -> Callable[[], None]:
    """torch 2.8 and older."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False

    def restore() -> None:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions

    return restore


def _turn_off() -> Callable[[], None]:
    backends: Any = torch.backends
    cudnn, matmul, on_cpu = backends.cudnn, backends.cuda.matmul, backends.mkldnn.matmul
    owners = (backends, cudnn, cudnn.conv, cudnn.rnn, matmul, on_cpu)
    shown = [owner.fp32_precision for owner in owners]
    # An owner without a value of its own shows its parent's, so the parents, which come first, are cleared first.
    own = []
    for owner in owners:
        own.append(owner.fp32_precision)
        owner.fp32_precision = "none"
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32"
    convolutions = _allows(cudnn)  # what the old switch says can be read where the new ones say the same
    precision = torch.get_float32_matmul_precision()

    cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    for owner in owners[1:]:
        owner.fp32_precision = _OFF
    backends.fp32_precision = own[0]

    def restore() -> None:
        cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(precision)
        for owner, value in zip(owners, own, strict=True):
            owner.fp32_precision = value
        # The value that torch starts with gives way to the parent's; set again, it does not (torch's own `cudnn.flags`
        # leaves that behind too). What is in force is what it was.
        for owner, value in zip(owners, shown, strict=True):
            if owner.fp32_precision != value:
                owner.fp32_precision = value

    return restore


def _allows(cudnn: Any) -> bool:
    try:
        return bool(cudnn.allow_tf32)
    except RuntimeError:
        return False
