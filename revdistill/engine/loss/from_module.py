"""A torch.nn.Module and a criterion as the pure function that rd.unroll wants; one network, or several stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revdistill.engine.loss.substitution import Substitution

PureLoss = Callable[[dict[str, Tensor], Any], Tensor]


def from_module(net: nn.Module, criterion: Callable[..., Tensor]) -> tuple[PureLoss, dict[str, Tensor]]:
    """A module and a criterion as the loss and params that rd.unroll takes.

    Frozen parameters stay as they are, and parameters shared between layers are one. Buffers are those of this moment
    and are left untouched: BatchNorm in training mode uses batch statistics.

    Args:
        net: the network. A call of the loss leaves it as it was.
        criterion: criterion(output, target) -> scalar tensor.

    Returns:
        (loss, params). loss(params, (*inputs, target)) is criterion(net(*inputs), target), evaluated with `params` in
        the place of net's own. params: name -> parameter of `net` that requires grad, the very tensors, so that
        backward fills their `grad`.

    Raises:
        TypeError: `net` is no module, or `criterion` not callable.
        ValueError: no parameter of `net` requires grad.
    """
    _check(net, criterion)
    buffers = _detached_buffers(net)
    params: dict[str, Tensor] = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("net has no parameter that requires grad, so there is nothing to train")

    call = Substitution(net)

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        *inputs, target = batch
        # Fresh copies each time: what the module writes into them (running statistics) must not reach the next call.
        tensors = {**params, **{name: b.clone() for name, b in buffers.items()}}
        return criterion(call(tensors, tuple(inputs)), target)

    return loss, params


def stack_modules(
    nets: Sequence[nn.Module], criterion: Callable[..., Tensor], *, shared_batches: bool = True
) -> tuple[PureLoss, dict[str, Tensor]]:
    """E networks of one architecture, trained side by side in one unroll, as the loss and params that rd.unroll takes.

    The networks do not interact, so each one's training and hypergradient is what it would be alone. lr may then have
    shape [T, E]: a rate per step and network. Random numbers (dropout) differ between networks. An evaluation is one
    batched call (torch.func.vmap; none of it where E is 1).

    Args:
        nets: the E networks.
        criterion: criterion(output, target) -> scalar tensor.
        shared_batches: all networks see the same batch; otherwise each entry of a batch has a leading dimension E, one
            batch for each network.

    Returns:
        (loss, params). loss(params, (*inputs, target)) is the sum of the networks' losses. params: name -> [E, ...],
        new leaf tensors that require grad.

    Raises:
        TypeError: a net is no module, or `criterion` not callable.
        ValueError: `nets` is empty, no parameter requires grad, or the networks' parameters differ in name or shape.
    """
    if not nets:
        raise ValueError("nets is empty; give at least one module")
    for net in nets:
        _check(net, criterion)
    first = nets[0]
    _check_alike(nets)
    trained = [name for name, p in first.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("nets have no parameter that requires grad, so there is nothing to train")
    tensors = [dict(net.named_parameters()) | dict(net.named_buffers()) for net in nets]
    params = {name: torch.stack([t[name].detach() for t in tensors]).requires_grad_() for name in trained}
    rest = {name: torch.stack([t[name].detach() for t in tensors]) for name in tensors[0] if name not in params}

    call = Substitution(first)

    def one(params: dict[str, Tensor], rest: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        *inputs, target = batch
        return criterion(call({**params, **rest}, tuple(inputs)), target)

    every = torch.func.vmap(one, in_dims=(0, 0, None if shared_batches else 0), randomness="different")

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        copies = {name: t.clone() for name, t in rest.items()}
        if len(nets) == 1:  # a convolution costs more under vmap
            own = tuple(batch) if shared_batches else tuple(t.squeeze(0) for t in batch)
            return one(_first(params), _first(copies), own)
        summed: Tensor = every(params, copies, tuple(batch)).sum()
        return summed

    loss.networks = len(nets)  # type: ignore[attr-defined]  # rd.unroll clips each by its own norm
    return loss, params


def _first(stacked: dict[str, Tensor]) -> dict[str, Tensor]:
    """[1, ...] -> [...], as views."""
    return {name: t.squeeze(0) for name, t in stacked.items()}


def _check(net: object, criterion: object) -> None:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    if not callable(criterion):
        raise TypeError(f"criterion must be callable as criterion(output, target), got {type(criterion).__name__}")


def _check_alike(nets: Sequence[nn.Module]) -> None:
    shapes = [{name: tuple(t.shape) for name, t in net.named_parameters()} for net in nets]
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"nets[{i}] has other parameters than nets[0]; stacked networks must have one architecture"
            )


def _detached_buffers(net: nn.Module) -> dict[str, Tensor]:
    return {name: b.detach().clone() for name, b in net.named_buffers()}
