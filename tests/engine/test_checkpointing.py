"""Activation checkpointing inside a module: the hypergradients of a loop in float64 over the same network without."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, set_checkpoint_early_stop

import revdistill as rd
from tests.engine.small import CE, EVERY

STEPS, LR, MOMENTUM = 5, 0.2, 0.9
X = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12).reshape(2, 6) % 3


class Body(nn.Module):
    """A buffer, dropout and a layer; checkpointed in its turn where `within`."""

    def __init__(self, within: Any) -> None:
        super().__init__()
        self.layer, self.drop, self.within = nn.Linear(4, 4), nn.Dropout(0.3), within
        self.register_buffer("scale", torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 4]."""
        x = self.within(lambda x: torch.tanh(self.layer(x)), x)
        return self.drop(x * self.scale)


class Net(nn.Module):
    """around: how the body is called."""

    def __init__(self, around: Any, within: Any) -> None:
        super().__init__()
        self.around, self.first, self.body, self.norm = around, nn.Linear(4, 4), Body(within), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 3]."""
        x = self.around(lambda x: self.norm(self.body(x)), torch.sin(self.first(x)))
        return self.head(x)


def plain(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def checkpointed(**kwargs: Any) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]:
    return lambda function, x: checkpoint(function, x, use_reentrant=False, **kwargs)


def with_contexts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        result: Tensor = checkpoint(function, x, use_reentrant=False, context_fn=lambda: (nullcontext(), nullcontext()))
    return result


def make(around: Any = plain, within: Any = plain) -> nn.Module:
    torch.manual_seed(0)
    return Net(around, within).double()


def hypergradient(loss: Any, params: dict[str, Tensor], adjoint: Any, outer: Any = None, **kwargs: Any) -> list[Tensor]:
    x, lr = X.clone().requires_grad_(), torch.full((STEPS,), LR, dtype=torch.float64, requires_grad=True)
    optimizer = rd.SGD(lr, MOMENTUM)
    theta = rd.unroll(loss, params, (x, Y), optimizer, steps=STEPS, adjoint=adjoint, seed=3, **kwargs)
    value = (outer or outer_loss)(theta)
    return [*(t.detach() for t in theta.values()), *torch.autograd.grad(value, [x, lr, *params.values()])]


def outer_loss(theta: dict[str, Tensor]) -> Tensor:
    return torch.stack([p.pow(3).sum() for p in theta.values()]).sum()


def by_loop(seed: int = 3, outer: Any = None) -> list[Tensor]:
    """SGD with momentum written out, through the network without checkpointing; momentum as the engine rounds it."""
    net = make()
    start = dict(net.named_parameters())
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    x, lr = X.clone().requires_grad_(), torch.full((STEPS,), LR, dtype=torch.float64, requires_grad=True)
    theta, v = dict(start), {name: torch.zeros_like(p) for name, p in start.items()}
    momentum = round(MOMENTUM * 2**16) / 2**16
    for k in range(STEPS):
        torch.manual_seed((seed + k * 0x1E3779B97F4A7C15) % 2**63)  # the engine's numbers, for dropout
        copies = {name: b.clone() for name, b in buffers.items()}
        value = CE(functional_call(net, theta | copies, (x[k % 2],)), Y[k % 2])
        gradients = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        v = {name: momentum * v[name] + g for name, g in zip(v, gradients, strict=True)}
        theta = {name: p - lr[k] * v[name] for name, p in theta.items()}
    found = torch.autograd.grad((outer or outer_loss)(theta), [x, lr, *start.values()])
    return [*(t.detach() for t in theta.values()), *found]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


NETS = {
    "body": (checkpointed(), plain),
    "nested": (checkpointed(), checkpointed()),
    "contexts": (with_contexts, checkpointed(determinism_check="none")),
}


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
@pytest.mark.parametrize("name", NETS)
def test_training_and_hypergradient_are_those_without_checkpointing(name: str, adjoint: Any) -> None:
    net = make(*NETS[name])
    loss, params = rd.from_module(net, CE)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    close(hypergradient(loss, params, adjoint), by_loop())
    assert all(net.get_parameter(name) is p for name, p in params.items())
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


@pytest.mark.parametrize("adjoint", [EVERY[0], EVERY[1]], ids=repr)
def test_one_network_in_a_stack(adjoint: Any) -> None:
    loss, params = rd.stack_modules([make(checkpointed())], CE)
    found = [t.squeeze(0) if t.ndim and t.shape[0] == 1 else t for t in hypergradient(loss, params, adjoint)]
    close(found, by_loop())


def test_the_loss_of_a_validation_set_holds_its_parameters_too() -> None:
    """Called by the user, and differentiated when the module has its own parameters back, and another mode."""

    def outer(net: nn.Module, validation: Any) -> Callable[[dict[str, Tensor]], Tensor]:
        def value(theta: dict[str, Tensor]) -> Tensor:
            net.eval()
            found: Tensor = validation(theta, (X[0] + 1, Y[0]))
            net.train()
            return found

        return value

    reference, net = make(), make(checkpointed(), checkpointed())
    buffers = {name: b.clone() for name, b in reference.named_buffers()}
    expected = by_loop(
        outer=outer(reference, lambda theta, pair: CE(functional_call(reference, theta | buffers, (pair[0],)), pair[1]))
    )
    loss, params = rd.from_module(net, CE)
    close(hypergradient(loss, params, rd.Reversible(), outer(net, loss)), expected)


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_functional_call_in_the_users_own_loss_is_refused(adjoint: Any) -> None:
    net = make(checkpointed()).eval()

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        return CE(functional_call(net, params, (batch[0],)), batch[1])

    with pytest.raises(rd.UnsupportedError, match=r"Give the module to rd\.from_module.* switch checkpointing off"):
        hypergradient(loss, dict(net.named_parameters()), adjoint)


@pytest.mark.parametrize("adjoint", [EVERY[0], EVERY[1]], ids=repr)
def test_a_loss_that_checkpoints_a_function_of_its_arguments_is_right(adjoint: Any) -> None:
    def loss(call: Any) -> Any:
        return lambda p, batch: CE(call(lambda x: torch.tanh(x @ p["w"]) @ p["w"], batch[0])[:, :3], batch[1])

    start = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found, expected = (
        hypergradient(loss(call), {"w": start.clone().requires_grad_()}, adjoint) for call in (checkpointed(), plain)
    )
    close(found, expected)


def test_what_cannot_be_computed_again_is_refused() -> None:
    adjoint = rd.Reversible()

    def refused(around: Any, message: str, stacked: int = 0) -> None:
        nets = [make(around) for _ in range(stacked or 1)]
        loss, params = rd.stack_modules(nets, CE) if stacked else rd.from_module(nets[0], CE)
        with pytest.raises(rd.UnsupportedError, match=message):
            hypergradient(loss, params, adjoint)
        assert torch.utils.checkpoint._CheckpointFrame.__module__ == "torch.utils.checkpoint"

    refused(checkpointed(), r"under torch\.func\.vmap \(rd\.stack_modules\)", stacked=2)
    refused(checkpointed(preserve_rng_state=False), "preserve_rng_state=True")
    selective = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    refused(checkpointed(context_fn=selective), "selective activation checkpointing.*checkpoint without context_fn")
    refused(lambda f, x: checkpoint(f, x, use_reentrant=True), "use_reentrant=True.*use_reentrant=False")


def test_without_an_unroll_torchs_checkpointing_is_as_it_was() -> None:
    net = make(checkpointed()).eval()
    for reentrant in (False, True):
        checkpoint(net.body, X[0].clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    with torch.no_grad():
        loss, params = rd.from_module(make(lambda f, x: checkpoint(f, x, use_reentrant=False)), CE)
        assert torch.isfinite(loss(params, (X[0], Y[0])))


def test_compiled_or_not_it_is_right() -> None:
    """torch 2.13's compiler cannot compile this gradient: what it leaves switched off is on again."""
    loss, params = rd.from_module(make(checkpointed()), CE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = hypergradient(loss, params, rd.Reversible(), compile=True)
    assert torch._C._autograd._saved_tensors_hooks_is_enabled()
    close(found, by_loop())


def tells_hooks() -> bool:
    """Whether this torch tells that a saved tensor is behind hooks: 2.6 does not."""
    graph = torch.ones(1, requires_grad=True).exp().grad_fn
    return hasattr(graph._raw_saved_result, "unpack_hook")  # type: ignore[union-attr]


@pytest.mark.skipif(not tells_hooks(), reason="there they are computed again, to the same values")
def test_nothing_is_computed_again_to_see_how_much_memory_a_graph_takes() -> None:
    """On the way forward each part runs twice, for the loss and for its gradient, whether graphs are kept or not."""
    net = make(checkpointed())
    net.eval()
    calls = []
    net.body.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, params = rd.from_module(net, CE)
    rd.unroll(loss, params, (X, Y), rd.SGD(LR), steps=1)  # the first evaluation of all also follows the buffers
    for graph_bytes in (0, 2**20):
        calls.clear()
        lr = torch.full((STEPS,), LR, requires_grad=True)
        rd.unroll(loss, params, (X, Y), rd.SGD(lr), steps=STEPS, adjoint=rd.Reversible(graph_bytes=graph_bytes))
        assert len(calls) == 2 * STEPS


def test_a_torch_whose_frames_are_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for torch's frames rests on a private name: without it modules would be wrong in silence."""
    monkeypatch.delattr(torch.utils.checkpoint, "_CheckpointFrame")
    name = "revdistill.engine.loss.checkpointing"
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match=r"how torch .* checkpoints activations.*constraints\.txt"):
        spec.loader.exec_module(again)
