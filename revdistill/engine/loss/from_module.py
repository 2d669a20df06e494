"""A torch.nn.Module and a criterion as the pure function that rd.unroll wants; one network, or several stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revdistill.engine.layout import stacked
from revdistill.engine.loss.alike import check_alike
from revdistill.engine.loss.buffers import Buffers, check_buffers
from revdistill.engine.loss.criterion import Criterion
from revdistill.engine.loss.gradient import check_loss
from revdistill.engine.loss.modules import check_module, check_stackable, name_call
from revdistill.engine.loss.substitution import Substitution
from revdistill.engine.loss.untouched import check_stacked
from revdistill.engine.loss.vmapped import name_vmap

PureLoss = Callable[[dict[str, Tensor], Any], Tensor]


def from_module(net: nn.Module, criterion: Callable[..., Tensor]) -> tuple[PureLoss, dict[str, Tensor]]:
    """A module and a criterion as the loss and params that rd.unroll takes.

    Frozen parameters stay as they are, and parameters shared between layers are one. Buffers are those that the module
    has when an unroll begins, and are left untouched: BatchNorm in training mode uses batch statistics, and a module
    whose loss depends on buffers that its forward changes (spectral_norm in training mode) is refused. An unroll goes
    back in the training mode in which it went forward, whatever mode the module is in by then. A module that
    checkpoints its activations (torch.utils.checkpoint, use_reentrant=False) computes them again with the unroll's
    parameters.

    Args:
        net: the network. A call of the loss leaves it as it was.
        criterion: criterion(output, target) -> scalar tensor. If it is a module, its parameters that require grad are
            trained with the network's, and its buffers treated alike; both are named "criterion." and their name in it.

    Returns:
        (loss, params). loss(params, (*inputs, target)) is criterion(net(*inputs), target), evaluated with `params` in
        the place of net's own. A batch that is a dict goes to `net` as keyword arguments, but for its last entry, which
        is the target. params: name -> parameter of `net` (and `criterion`) that requires grad, the very tensors, so
        that backward fills their `grad`.

    Raises:
        TypeError: `net` is no module, or `criterion` not callable or a class.
        ValueError: no parameter requires grad, a buffer does, a lazy parameter has no shape yet, or a name of the
            criterion's is one of the network's.
        UnsupportedError: torch.compile or torch.jit made the module, a function in it or the criterion, it is a
            DataParallel, or a parameter that requires grad has a hook.
    """
    check_module(net)
    judge = Criterion(criterion, net)
    params: dict[str, Tensor] = {name: p for name, p in net.named_parameters() if p.requires_grad} | judge.params
    if not params:
        raise ValueError("net has no parameter that requires grad, so there is nothing to train")
    call = Substitution(net)
    copies = Buffers(
        net, lambda: call.modules() + judge.all_modules, lambda: dict(net.named_buffers()) | judge.buffers()
    )

    def evaluate(params: Mapping[str, Tensor], fresh: Mapping[str, Tensor], batch: Any) -> Tensor:
        inputs, keywords, target = _parts(batch)
        tensors = judge.without_own({**params, **fresh} if fresh else params)
        try:
            output = call(tensors, inputs, keywords, buffers=copies.sources)
        except (RuntimeError, TypeError) as error:
            name_call(error, net, tensors, inputs, keywords)
            raise
        return judge(output, target, params, fresh)

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        return copies.evaluate(
            lambda fresh: evaluate(params, fresh, batch), params, lambda: call.rebound | judge.rebound
        )

    loss.networks = 1  # type: ignore[attr-defined]  # rd.unroll knows what its batches are
    return loss, params


def stack_modules(
    nets: Sequence[nn.Module], criterion: Callable[..., Tensor], *, shared_batches: bool = True
) -> tuple[PureLoss, dict[str, Tensor]]:
    """E networks of one architecture, trained side by side in one unroll, as the loss and params that rd.unroll takes.

    The networks do not interact, so each one's training and hypergradient is what it would be alone. lr may then have
    shape [T, E]: a rate per step and network. Random numbers (dropout) differ between networks. An evaluation is one
    batched call (torch.func.vmap; none of it where E is 1). What `from_module` says of buffers and training modes
    holds here too.

    Args:
        nets: the E networks. They differ in the values of parameters and buffers only: layers, settings, modes and
            hooks are those of nets[0].
        criterion: criterion(output, target) -> scalar tensor. If it is a module with parameters that require grad, each
            network trains a copy of them of its own, named "criterion." and their name in it.
        shared_batches: all networks see the same batch; otherwise each entry of a batch has a leading dimension E, one
            batch for each network.

    Returns:
        (loss, params). loss(params, (*inputs, target)) is the sum of the networks' losses; a batch may be a dict, as in
        `from_module`. params: name -> [E, ...], new leaf tensors that require grad.

    Raises:
        TypeError: a net is no module, or `criterion` not callable or a class.
        ValueError: `nets` is empty, no parameter requires grad, or the networks differ in more than the values of
            parameters and buffers (what is one tensor included); or as in `from_module`. When the loss is called: with
            shared_batches=False an entry of the batch is not [E, ...].
        UnsupportedError: a module that cannot be called for several networks at once (LSTM and GRU, backward hooks), or
            as in `from_module`. When the loss is called: it does what torch.func.vmap cannot evaluate (.item(), if on a
            tensor's value, x[mask]).
    """
    if not nets:
        raise ValueError("nets is empty; give at least one module")
    for i, net in enumerate(nets):
        check_module(net, f"nets[{i}]")
        if len(nets) > 1:
            check_stackable(net, f"nets[{i}]")
    first = nets[0]
    check_alike(nets)
    judge = Criterion(criterion, first)
    trained = [name for name, p in first.named_parameters() if p.requires_grad] + list(judge.params)
    if not trained:
        raise ValueError("nets have no parameter that requires grad, so there is nothing to train")
    own = judge.params | judge.buffers()
    tensors = [dict(net.named_parameters()) | dict(net.named_buffers()) | own for net in nets]
    params = {name: stacked([t[name].detach() for t in tensors]).requires_grad_() for name in trained}
    rest = {name: stacked([t[name].detach() for t in tensors]) for name in tensors[0] if name not in params}
    buffer_names = {name for name, _ in first.named_buffers()} | judge.buffers().keys()
    for i, net in enumerate(nets):
        check_buffers(dict(net.named_buffers()) | judge.buffers(), f"nets[{i}]")
    buffers = {name: t for name, t in rest.items() if name in buffer_names}
    frozen = {name: t for name, t in rest.items() if name not in buffer_names}
    call = Substitution(first)
    copies = Buffers(first, lambda: call.modules() + judge.all_modules, lambda: buffers)

    def one(params: dict[str, Tensor], rest: dict[str, Tensor], batch: Any) -> Tensor:
        inputs, keywords, target = _parts(batch)
        tensors = judge.without_own({**params, **rest})
        own = {name: rest[name] for name in buffers if name in tensors}
        try:
            output = call(tensors, inputs, keywords, buffers=own)
        except (RuntimeError, TypeError) as error:
            name_call(error, first, tensors, inputs, keywords)
            raise
        value = judge(output, target, params, rest)
        if len(nets) > 1:  # of what is no scalar the sum would be one
            check_loss(value)
        return value

    every = torch.func.vmap(one, in_dims=(0, 0, None if shared_batches else 0), randomness="different")

    def evaluate(params: dict[str, Tensor], fresh: Mapping[str, Tensor], batch: Any) -> Tensor:
        others = {name: fresh[name] if name in fresh else t.clone() for name, t in rest.items()}
        batch = dict(batch) if isinstance(batch, Mapping) else tuple(batch)
        if not shared_batches:
            _check_own_batches(batch, len(nets))
        if len(nets) == 1:  # a convolution costs more under vmap
            parts, firsts = _first(params), _first(others)
            value = one(parts, firsts, batch if shared_batches else _first_of_each(batch))
            check_stacked(params, parts, frozen, firsts)
            return value
        try:
            summed: Tensor = every(params, others, batch).sum()
        except RuntimeError as error:
            name_vmap(error, one.__code__, len(nets))
            raise
        check_stacked(params, params, frozen, others)
        return summed

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        return copies.evaluate(
            lambda fresh: evaluate(params, fresh, batch), params, lambda: call.rebound | judge.rebound
        )

    loss.networks = len(nets)  # type: ignore[attr-defined]  # rd.unroll clips each by its own norm
    return loss, params


def _parts(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """A batch as the module's arguments, its keyword arguments, and the target."""
    if isinstance(batch, Tensor) or not isinstance(batch, Iterable):
        got = f"one tensor of shape {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(
            f"a batch must be a tuple (*inputs, target) or a dict whose last entry is the target, got {got}"
        )
    entries = list(batch)
    if not entries:
        raise ValueError("a batch is empty; it must hold the target, and before it the module's inputs")
    if isinstance(batch, Mapping):
        *names, last = entries
        return (), {name: batch[name] for name in names}, batch[last]
    *inputs, target = entries
    return tuple(inputs), {}, target


def _first(stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[1, ...] -> [...], as views."""
    return {name: t.squeeze(0) for name, t in stacked.items()}


def _check_own_batches(batch: Any, networks: int) -> None:
    """Raise ValueError where an entry of a batch is not [E, ...]: otherwise vmap says it, in words of its own."""
    for label, t in batch.items() if isinstance(batch, dict) else enumerate(batch):
        if isinstance(t, Tensor) and (not t.ndim or len(t) != networks):
            raise ValueError(
                f"batch[{label!r}] has shape {list(t.shape)}, but with shared_batches=False each network has a batch "
                f"of its own: [{networks}, ...]"
            )


def _first_of_each(batch: Any) -> Any:
    return _first(batch) if isinstance(batch, dict) else tuple(t.squeeze(0) for t in batch)
