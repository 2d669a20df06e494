"""The checks of rd.unroll's arguments: each error names the argument, what came and what is accepted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from revdistill.engine.adjoints.adjoint import Adjoint
from revdistill.engine.adjoints.backprop import Backprop
from revdistill.engine.callables import check_callable
from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.batches import function_of, is_table
from revdistill.engine.loss.gradient import check_arity
from revdistill.engine.loss.minibatches import Minibatches
from revdistill.engine.loss.tree import leaves
from revdistill.engine.optimizers.optimizer import Optimizer
from revdistill.engine.scalars import as_float, is_integer, is_real
from revdistill.engine.tensors import check_plain, check_tensor


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError on the first argument that will not do. given: rd.unroll's, by name."""
    if torch.is_inference_mode_enabled():
        raise UnsupportedError(
            "rd.unroll needs gradients inside and cannot run in torch.inference_mode(); use torch.no_grad()"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            "rd.unroll cannot run inside torch.func.grad, jacrev, jvp or vmap: its way back is a backward pass of "
            "autograd; use backward() or torch.autograd.grad on what is computed from its result (rd.jacobian for many "
            "outputs at once), and rd.stack_modules for several networks at once"
        )
    _check_loss(given["loss"], given["hyper"] is not None)
    device = _check_params(given["params"])
    _check_int("steps", given["steps"], least=0)
    _check_batches(given["batches"], device)
    _warn_of_single_examples(given["loss"], given["batches"])
    _check_hyper(given["hyper"], device)
    if not isinstance(given["optimizer"], Optimizer):
        raise TypeError(
            "optimizer must be rd.SGD(...), rd.Adam(...), rd.AdamW(...) or rd.RMSprop(...), "
            f"got {_optimizer(given['optimizer'])}"
        )
    for label, value in vars(given["optimizer"]).items():
        for path, t in leaves(value, label):
            if isinstance(t, Tensor):
                check_plain(path, t)
    adjoint = given["adjoint"]
    if adjoint is not None and not isinstance(adjoint, Adjoint):
        raise TypeError(
            "adjoint must be rd.Reversible(), rd.Checkpoint(), rd.StoreAll(), rd.Backprop() or None, "
            f"got {adjoint.__name__ if isinstance(adjoint, type) else _kind(adjoint)}"
        )
    for name, form in (("on_step", "on_step(k, theta, loss)"), ("on_step_back", "on_step_back(k, norm)")):
        if given[name] is not None:
            check_callable(name, given[name], form, form.count(",") + 1)
    _check_clip(given["clip_back"])
    if given["seed"] is not None:
        _check_int("seed", given["seed"], least=0)
    if given["window"] is not None:
        _check_int("window", given["window"], least=1)
    if given["save_at"] is not None:
        state = given["state"]
        _check_save_at(given["save_at"], getattr(state, "step", 0), given["steps"])
    if not isinstance(given["compile"], bool) and given["compile"] != "graphs":
        raise ValueError(f'compile must be False, True or "graphs", got {given["compile"]!r}')
    for name in ("return_state", "return_stats", "progress"):
        if not isinstance(given[name], bool):
            raise TypeError(f"{name} must be a bool, got {_kind(given[name])}")


def check_shard(shard: Any) -> None:
    """Raise TypeError where it is no bool."""
    if not isinstance(shard, bool):
        raise TypeError(f"shard must be a bool, got {_kind(shard)}")


def check_grouped(loss: Any, adjoint: Adjoint | None, compile: Any, *, shard: Any) -> None:
    """Raise TypeError or UnsupportedError where the unroll cannot be shared by the ranks of a group."""
    check_shard(shard)
    if isinstance(adjoint, Backprop):
        raise UnsupportedError(
            "adjoint=rd.Backprop() keeps the graphs of one process, through which no gradient reaches the other ranks "
            "of group; use rd.Reversible(), rd.Checkpoint() or rd.StoreAll()"
        )
    if compile == "graphs":
        raise UnsupportedError(
            'compile="graphs" replays steps of one process; with a group use compile=False or compile=True'
        )
    if shard and getattr(loss, "networks", 1) > 1:
        raise UnsupportedError(
            "shard=True cuts the parameters of one network into parts, and loss is of rd.stack_modules; give each rank "
            "networks of its own instead, without a group"
        )


def check_average(average: Any, steps: int) -> list[float]:
    """The weights of theta_0 to theta_T in the average. Raises: TypeError, ValueError."""
    if isinstance(average, Tensor):
        if average.requires_grad:
            raise ValueError(
                "average requires grad, but neither a decay nor weights are differentiated; use save_at and sum up the "
                "iterates"
            )
        if average.is_complex():
            raise TypeError(f"average must be real, got a tensor of {average.dtype}")
    if isinstance(average, Tensor) and average.ndim:
        if average.shape != (steps + 1,):
            raise ValueError(
                f"average has shape {list(average.shape)}; with steps={steps} the weights of theta_0 to theta_T have "
                f"shape [{steps + 1}]"
            )
        weights: list[float] = average.double().tolist()
        if not all(map(math.isfinite, weights)):
            raise ValueError("average has weights that are not finite")
        return weights
    average = average.item() if isinstance(average, Tensor) else average
    if not is_real(average):
        raise TypeError(f"average must be a float, a tensor [steps + 1] or None, got {_kind(average)}")
    average = as_float(average)
    if not 0 <= average <= 1:
        raise ValueError(f"average must be a decay from 0 to 1, got {average}")
    return [average**steps] + [(1 - average) * average ** (steps - k) for k in range(1, steps + 1)]


def _optimizer(given: Any) -> str:
    """What it is, and what to write in its place."""
    kind = given if isinstance(given, type) else type(given)
    if issubclass(kind, torch.optim.Optimizer):
        return (
            f"torch.optim.{kind.__name__}; write its numbers as rd's, and give state=rd.OptimizerState.from_torch(...) "
            "to go on from its state"
        )
    return f"the class {kind.__name__}, not an instance" if kind is given else kind.__name__


def _check_loss(loss: Any, has_hyper: bool) -> None:
    if not isinstance(loss, nn.Module):
        return check_arity(loss, has_hyper)
    try:
        check_arity(loss.forward, has_hyper)
    except TypeError as error:
        raise TypeError(f"{error}. A network is no loss: write loss, params = rd.from_module(net, criterion)") from None


def _warn_of_single_examples(loss: Any, batches: Any) -> None:
    """A data set (x [n, ...], y [n]) in the place of a table of batches trains on one example per step."""
    entries = tuple(batches.values()) if isinstance(batches, Mapping) else batches
    if getattr(loss, "networks", None) != 1 or not isinstance(entries, (tuple, list)) or not is_table(batches):
        return
    target = entries[-1]
    if isinstance(target, Tensor) and target.ndim == 1 and len(target) > 1:
        warnings.warn(
            f"batches is a table, whose row k is step k's batch, and its last entry has shape {list(target.shape)}: "
            "each step gets a single example. Give [(x, y)] for all examples at each step, or rd.Minibatches((x, y), "
            f"rd.epochs({len(target)}, batch_size, epochs)) for batches of them; one example as a batch is [1, ...]",
            UserWarning,
            stacklevel=5,
        )


def _check_clip(clip_back: Any) -> None:
    if clip_back is None:
        return
    if not is_real(clip_back):
        raise TypeError(f"clip_back must be a float or None, got {_kind(clip_back)}")
    if not 0 < as_float(clip_back) < math.inf:
        raise ValueError(f"clip_back must be above 0 and finite, got {clip_back}")


def _check_params(params: Any) -> torch.device:
    if not isinstance(params, Mapping):
        hint = "; write loss, params = rd.from_module(net, criterion)" if isinstance(params, nn.Module) else ""
        raise TypeError(f"params must be a dict from name to tensor, got {_kind(params)}{hint}")
    if not params:
        raise ValueError("params is empty; it must hold at least one tensor")
    for name, p in params.items():
        if not isinstance(name, str):
            raise TypeError(f"params must have str keys, got {name!r}")
        label = f"params[{name!r}]"
        check_tensor(label, p)
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{label} has dtype {p.dtype}; accepted are torch.float32 and torch.float64")
    first_name, first = next(iter(params.items()))
    for name, p in params.items():
        if (p.dtype, p.device) != (first.dtype, first.device):
            raise ValueError(
                f"params[{name!r}] is {p.dtype} on {p.device}, but params[{first_name!r}] is {first.dtype} on "
                f"{first.device}; all "
                "must have one dtype and one device"
            )
    if not sum(p.numel() for p in params.values()):
        raise ValueError("params holds no numbers: every tensor in it is empty")
    frozen = [name for name, p in params.items() if isinstance(p, nn.Parameter) and not p.requires_grad]
    if frozen and any(p.requires_grad for p in params.values()):
        warnings.warn(
            f"params[{frozen[0]!r}] is a frozen parameter (requires_grad=False) beside others that are not, and is "
            "trained like them: every entry of params is. Leave out of params what is to stay as it is (rd.from_module "
            "does so), or detach() it where only no gradient to its start is wanted",
            stacklevel=5,
        )
    device: torch.device = first.device
    return device


def _check_batches(batches: Any, device: torch.device) -> None:
    if isinstance(batches, Minibatches):
        batches.check()
        for label, t in leaves(batches.data, "batches.data"):
            _check_device(label, t, device)
        return
    if isinstance(batches, (tuple, list, Mapping)) and not batches:
        raise ValueError("batches is empty; it must hold at least one tensor [s, ...]")
    if not is_table(batches):
        function_of(batches)
        return
    first: Tensor | None = None
    for label, t in leaves(batches, "batches"):
        check_tensor(label, t)
        if not t.ndim or not len(t):
            raise ValueError(
                f"{label} has shape {list(t.shape)}; its first dimension must be the number of batches, at least 1"
            )
        first = t if first is None else first
        if len(t) != len(first):
            raise ValueError(
                f"{label} holds {len(t)} batches (its first dimension), but {next(leaves(batches, 'batches'))[0]} "
                f"holds {len(first)}"
            )
        _check_device(label, t, device)


def _check_hyper(hyper: Any, device: torch.device) -> None:
    if hyper is None:
        return
    if isinstance(hyper, nn.Module):
        raise TypeError(
            f"hyper must be a tensor, or nested tuples, lists and dicts of tensors, got the module {_kind(hyper)}; "
            "pass hyper=dict(module.named_parameters()) and call it by torch.func.functional_call(module, hyper, args)"
        )
    if not isinstance(hyper, (Tensor, tuple, list, Mapping)):
        raise TypeError(f"hyper must be a tensor, or nested tuples, lists and dicts of tensors, got {_kind(hyper)}")
    for label, t in leaves(hyper, "hyper"):
        check_tensor(label, t)
        _check_device(label, t, device)


def _check_device(label: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{label} is on {t.device}, but params are on {device}; move it with .to({str(device)!r})")


def _check_save_at(save_at: Any, first: int, steps: int) -> None:
    if isinstance(save_at, (Tensor, np.ndarray)) and save_at.ndim == 1:
        save_at = save_at.tolist()
    if not isinstance(save_at, (tuple, list, range)):
        raise TypeError(f"save_at must be a list of steps, got {_kind(save_at)}")
    if not save_at:
        raise ValueError(f"save_at is empty; it must hold at least one step from {first} to {first + steps}")
    for i, k in enumerate(save_at):
        _check_int(f"save_at[{i}]", k, least=first)
        if k > first + steps:
            raise ValueError(f"save_at[{i}] is {k}; with steps={steps} it must be from {first} to {first + steps}")


def _check_int(label: str, value: Any, *, least: int) -> None:
    if not is_integer(value):
        raise TypeError(f"{label} must be an int, got {_kind(value)}")
    if value < least:
        raise ValueError(f"{label} must be at least {least}, got {value}")


def _kind(value: Any) -> str:
    return type(value).__name__
