"""A device that is no CPU, without a GPU: what the engine does on CUDA runs on it, and is counted.

A tensor on it wraps one on the CPU, and every operator runs there. What a GPU does otherwise is imitated, or refused:

- autograd has a thread of its own for the device, and runs backward on it;
- a root is correctly rounded, as the CPU's (of Intel's MKL) is not always;
- a division by a number of the host is a multiplication by its rounded reciprocal
(ATen/native/cuda/BinaryDivTrueKernel.cu);
- a tensor of the host with dimensions is no operand: RuntimeError, as on CUDA;
- whatever makes the host wait for the device is counted, with the line of the library that asked for it.

Not imitated: streams, memory, and kernels whose floating-point results have other bits than the CPU's.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from revdistill.engine import tensors

NAME = "standin"
_CPU = torch.device("cpu")


def available() -> bool:
    """torch 2.9 and newer can have such a device."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@cache
def device() -> torch.device:
    """The device; registered once per process."""

    class Module(backend_registration._DummyBackendModule):  # type: ignore[name-defined]
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())  # type: ignore[attr-defined]
    return torch.device(f"{NAME}:0")


class OnDevice(Tensor):
    """A tensor on the device. inner: the one on the CPU that it stands for."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device(),
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        _waited("tolist")
        return self.inner.detach().tolist()


tensors.PLAIN.add(OnDevice)


@dataclass
class Counts:
    """Since counting began.

    operators: those that a GPU would launch a kernel for, by name; waits: by what was asked for, and where in the
    library.
    """

    operators: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    def copy(self) -> Counts:
        """As it stands."""
        return Counts(self.operators.copy(), self.waits.copy())

    def clear(self) -> None:
        """Begin again."""
        self.operators.clear()
        self.waits.clear()


_counts = Counts()
_READS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::unique_consecutive",
    "aten::_unique2",
}
_EMPTY = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::_unsafe_view",
}
_COPIES = {"aten::copy_", "aten::_to_copy"}
_DIVISIONS = {"aten::div", "aten::div_"}


@contextmanager
def running() -> Iterator[Counts]:
    """While this lasts tensors can be made on the device too; what happens there is counted."""
    device()
    _counts.clear()
    with _Mode():
        yield _counts


class _Mode(TorchDispatchMode):
    """Makes the tensors that factories are asked for on the device."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled here, and to keep the compiler away from each operator takes longer than the operator
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def put(t: Tensor) -> Tensor:
    """A copy of t on the device, a leaf."""
    return OnDevice(t.detach().clone()).requires_grad_(t.requires_grad)


def put_module(net: nn.Module) -> nn.Module:
    """The network, its parameters and buffers on the device from now on."""
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(put(p), p.requires_grad))
        for name, b in module.named_buffers(recurse=False):
            setattr(module, name, put(b))
    return net


def take(t: Tensor) -> Tensor:
    """The numbers of t, on the CPU, whether it is on the device or not."""
    return t.inner.detach() if isinstance(t, OnDevice) else t.detach()


@dataclass(frozen=True)
class _Kind:
    """What is to be known of an operator."""

    name: str
    launches: bool
    in_place: bool
    divides: bool
    reshapes: bool  # in place, as unsqueeze_ does


@cache
def _kind(func: Any) -> _Kind:
    name, returns = func._schema.name, func._schema.returns
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    divides = name in _DIVISIONS and func._overloadname in ("Tensor", "Scalar")
    in_place, reshapes = func._schema.is_mutable and name.endswith("_"), torch.Tag.inplace_view in func.tags
    return _Kind(name, not (view or reshapes or name in _EMPTY), in_place, divides, reshapes)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    kind, here, stranger = _kind(func), False, None
    for a in _operands(args, kwargs):
        if isinstance(a, OnDevice):
            here = True
        elif a.ndim:
            stranger = a
    if here and stranger is not None and kind.name not in _COPIES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {kind.name} has an operand {stranger.shape} on the CPU"
        )
    result_here = here
    if kwargs.get("device") is not None:
        result_here = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | {"device": _CPU}
    if here or result_here:
        _count(kind, args, kwargs, here, result_here)
    if (
        kind.divides
        and here
        and not isinstance(args[1], OnDevice)
        and not (isinstance(args[1], Tensor) and args[1].ndim)
    ):
        return _divided_as_cuda_does(kind, *args)
    if kind.name == "aten::_efficientzerotensor":
        return OnDevice(torch.zeros(*args, **kwargs))  # torch's own has no memory, and its key does not come this far
    if kind.name == "aten::sqrt" and here:
        return OnDevice(torch.from_numpy(np.asarray(np.sqrt(args[0].inner.numpy()))))
    out = func(*map(_unwrapped, args), **{name: _unwrapped(a) for name, a in kwargs.items()})
    if kind.reshapes and here:
        with no_dispatch():
            func(*args, **kwargs)  # the tensor's own shape, without its numbers
    if kind.in_place:
        return args[0] if func._schema.returns else None
    if "out" in kwargs:
        return kwargs["out"]
    return _wrapped(out) if result_here else out


def _operands(args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for a in (*args, *kwargs.values()):
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from (e for e in a if isinstance(e, Tensor))


def _unwrapped(a: Any) -> Any:
    if isinstance(a, OnDevice):
        return a.inner
    return [_unwrapped(e) for e in a] if isinstance(a, (list, tuple)) else a


def _wrapped(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out if isinstance(out, OnDevice) else OnDevice(out)
    return type(out)(map(_wrapped, out)) if isinstance(out, (list, tuple)) else out


def _divided_as_cuda_does(kind: _Kind, a: Any, divisor: Any) -> Tensor:
    inverse = 1.0 / float(divisor)
    if kind.in_place:
        a.inner.mul_(inverse)
        return a
    return OnDevice(a.inner * inverse)


def _count(kind: _Kind, args: Any, kwargs: dict[str, Any], here: bool, result_here: bool) -> None:
    if kind.launches:
        _counts.operators[kind.name] += 1
    if kind.name in _READS:
        _waited(kind.name)
    elif kind.name == "aten::_to_copy":
        if here != result_here and not kwargs.get("non_blocking"):
            _waited("copy to the device" if result_here else "copy to the host")
    elif kind.name == "aten::copy_":
        to, of = (isinstance(a, OnDevice) for a in args[:2])
        if to != of and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            _waited("copy to the device" if to else "copy to the host")


def _waited(what: str) -> None:
    frame: Any = sys._getframe()
    while frame is not None and "revdistill" not in frame.f_code.co_filename.replace("\\", "/").split("/")[-3:]:
        frame = frame.f_back
    where = f"{frame.f_code.co_filename.split('/')[-1]}:{frame.f_lineno}" if frame is not None else "a test"
    _counts.waits[f"{what} at {where}"] += 1
