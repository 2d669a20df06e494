"""Which modules can be called with other parameters in the place of their own, for one network or several at once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.operators import COMPILED

# What every module has in its __dict__, and the hooks among it.
OWN = frozenset(vars(nn.Module()))
HOOKS = sorted(key for key in OWN if key.endswith(("_hooks", "_pre_hooks")))
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def check_module(net: object, label: str = "net") -> None:
    """Check that a module can be called with other parameters.

    Args:
        net: the module.
        label: what it is called in the error.

    Raises:
        TypeError: it is no module.
        ValueError: one of its parameters or buffers has no shape yet.
        UnsupportedError: torch.compile or torch.jit made it or a part of it, it is parallel, or a parameter that
            requires grad has a hook.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"{label} must be a torch.nn.Module, got {type(net).__name__}")
    for name, module in net.named_modules():
        where = f"{label}.{name}" if name else label
        # by its attribute: to import the class is to import the compiler
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise UnsupportedError(
                f"{where} was made by torch.compile, which has no second derivatives; give the original module"
                f"{f' ({where}._orig_mod)' if hasattr(module, '_orig_mod') else ''}, and compile=True to rd.unroll"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"{where} was made by torch.jit, and cannot be called with other parameters than its own; give the "
                "module that it was made from, and compile=True to rd.unroll"
            )
        if is_compiled(vars(module).get("forward", type(module).forward)):
            raise UnsupportedError(COMPILED.format(f"{where}.forward is a function that"))
        if isinstance(module, _PARALLEL):
            raise UnsupportedError(
                f"{where} is a {type(module).__name__}, which copies the module's own parameters; give the module "
                f"inside ({where}.module), and group= to rd.unroll where processes share its batches"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UnsupportedError(
                f"{where} is a FullyShardedDataParallel, whose parameters are parts; give the module before "
                "it was wrapped, and group= and shard=True to rd.unroll, which keeps the state in parts"
            )
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"{label}'s {name!r} has no shape yet (a lazy module makes its parameters in its first call); run one "
                f"batch through it first: {label}(x)"
            )
        if type(tensor).__name__ == "DTensor":
            raise UnsupportedError(
                f"{label}'s {name!r} is a DTensor, of which each process has a part (fully_shard of FSDP2 makes them); "
                "give the module before that, and group= and shard=True to rd.unroll, which keeps the state in parts"
            )
    for name, p in net.named_parameters():
        if p.requires_grad and (p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)):
            raise UnsupportedError(
                f"{label}'s parameter {name!r} has a hook (register_hook or register_post_accumulate_grad_hook), which "
                "training here would go past: the loss is called with other tensors in the place of the parameters. "
                "Write what the hook does into the loss, or remove the hook; one for the hypergradient is to be "
                "registered afterwards, on the params that rd.from_module returned"
            )


def is_compiled(function: Any) -> bool:
    """Whether torch.compile made a function, with the default backend: a backend may have second derivatives."""
    attributes = vars(function) if isinstance(function, FunctionType) else {}
    # functools.wraps gives a wrapper the attributes of what it wraps.
    if attributes.get("_torchdynamo_wrapper_id", id(function)) != id(function):
        return False
    return "get_compiler_config" in attributes and bool(attributes["get_compiler_config"]())


def check_stackable(net: nn.Module, label: str) -> None:
    """Check that a module can be called for several networks at once, by torch.func.vmap.

    Args:
        net: the module.
        label: what it is called in the error.

    Raises:
        UnsupportedError: it holds a layer that cannot.
    """
    for name, module in net.named_modules():
        where = f"{label}.{name}" if name else label
        if isinstance(module, nn.RNNBase):
            raise UnsupportedError(
                f"{where} is a {type(module).__name__}, which torch.func.vmap cannot call for several networks at "
                "once; train each network by rd.from_module, or build the layer of torch.nn."
                f"{'RNN' if type(module) is nn.RNN else type(module).__name__}Cell"
            )
        if module._backward_hooks or module._backward_pre_hooks:
            raise UnsupportedError(
                f"{where} has a backward hook, which under torch.func.vmap sees the gradients of all networks at once; "
                "train each network by rd.from_module, or remove the hook"
            )


def name_call(
    error: Exception,
    net: nn.Module,
    tensors: Mapping[str, Tensor],
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
) -> None:
    """Name what a module was called with, where it could not be called with that.

    Args:
        error: what the call of the module raised.
        net: the module that was called.
        tensors: what stood in the place of its own.
        inputs: what it was given.
        keywords: what it was given by name.

    Raises:
        TypeError: the batch has another number of entries, or other names, than forward has arguments.
        ValueError: the tensors have several dtypes or devices, or another shape than the module's own, and the error is
            about that.
    """
    if isinstance(error, TypeError):
        _name_arguments(error, net, inputs, keywords)
    elif isinstance(error, RuntimeError):
        _name_shapes(error, net, tensors)
        _name_dtypes(error, net, tensors, (*inputs, *keywords.values()))


def _name_arguments(error: TypeError, net: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    try:
        inspect.signature(net.forward).bind(*inputs, **keywords)
    except TypeError as mismatch:
        entries = (
            f"the names {list(keywords)}" if keywords else f"{len(inputs)} {'entry' if len(inputs) == 1 else 'entries'}"
        )
        raise TypeError(
            f"the batch gives the module {entries} beside the target, which is its last entry, and "
            f"{type(net).__name__}.forward cannot be called so: {mismatch}. A batch is (*inputs, target), or a dict "
            "with forward's names and the target's last; where the input is the target, as an autoencoder's, (x, x)"
        ) from error
    except ValueError:  # without a signature
        return


def _name_shapes(error: RuntimeError, net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    if not any(word in str(error) for word in ("size", "shape", "dimension", "channels")):
        return
    for name, own in net.named_parameters():
        if name in tensors and tensors[name].shape != own.shape:
            raise ValueError(
                f"params[{name!r}] has shape {list(tensors[name].shape)}, but the module's own has {list(own.shape)}, "
                f"and it could not be called. torch said: {error}"
            ) from error


def _name_dtypes(error: RuntimeError, net: nn.Module, tensors: Mapping[str, Tensor], inputs: tuple[Any, ...]) -> None:
    if not any(word in str(error) for word in ("type", "device")):
        return
    given = [("the given", repr(name), t) for name, t in tensors.items()]
    own = [("the module's own", repr(name), p) for name, p in net.named_parameters() if name not in tensors]
    entries = [("the batch's", f"entry {i}", t) for i, t in enumerate(inputs) if isinstance(t, Tensor)]
    kinds: dict[tuple[str, torch.dtype, torch.device], str] = {}
    for whose, label, t in (*given, *own, *entries):
        if t.is_floating_point():
            kinds.setdefault((whose, t.dtype, t.device), label)
    if len({(dtype, device) for _, dtype, device in kinds}) > 1:
        who = ", ".join(f"{whose} {label} is {dtype} on {device}" for (whose, dtype, device), label in kinds.items())
        raise ValueError(
            f"the module was called with tensors of several dtypes or devices: {who}. Where it was converted "
            "(.double(), .to(...)) after rd.from_module, call rd.from_module after that; convert the batches alike. "
            f"torch said: {error}"
        ) from error
