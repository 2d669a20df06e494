"""What a loss reads of the parameters as they were given to the unroll stays at the start: it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import revdistill as rd
from tests.engine.small import CE

ADJOINTS = [rd.Reversible(), rd.StoreAll(), rd.Backprop()]
STEPS = 6
X = torch.randn(3, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24).reshape(3, 8) % 3


class Listed(nn.Module):
    """Holds a weight in a plain list too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.weights = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 3]."""
        return self.layer(x) / self.weights[0].detach().norm()


class Distilling(nn.Module):
    """A criterion that holds the network: it is called with the unroll's parameters, as the network is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return CE(output, target) + mse_loss(output, self.net(X[0]).detach())


CRITERIA: dict[str, Callable[[Any], Callable[..., Tensor]]] = {
    "a target by the network": lambda net: lambda o, y: CE(o, y) + mse_loss(o, net(X[0]).detach()),
    "a target without gradients": lambda net: lambda o, y: CE(o, y) + mse_loss(o, torch.no_grad()(net)(X[0])),
    "a weight": lambda net: lambda o, y: CE(o, y) / net.layer.weight.detach().norm(),
    "a number": lambda net: lambda o, y: CE(o, y) / (1 + net.layer.weight.norm().item()),
}


class Plain(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 3]."""
        result: Tensor = self.layer(x)
        return result


def unrolled(net: nn.Module, criterion: Any, adjoint: Any, **kwargs: Any) -> dict[str, Tensor]:
    theta: dict[str, Tensor] = rd.unroll(
        *rd.from_module(net, criterion), (X, Y), rd.SGD(0.1, 0.5), steps=STEPS, adjoint=adjoint, **kwargs
    )
    return theta


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_that_reads_the_network_is_refused(name: str, adjoint: Any) -> None:
    """Regression: detached, it saw the start's parameters at every step."""
    net = Plain().double()
    with pytest.raises(rd.UnsupportedError, match=r"params\['layer.*as it was given.*step 0: a criterion.*clone\(\)"):
        unrolled(net, CRITERIA[name](net), adjoint)
    # The parameters given may be others than the network's own, which are read all the same.
    loss, params = rd.from_module(net, CRITERIA[name](net))
    others = {name: p.detach().clone() for name, p in params.items()}
    with pytest.raises(rd.UnsupportedError, match="as it was given"):
        rd.unroll(loss, others, (X, Y), rd.SGD(0.1), steps=STEPS, adjoint=adjoint)


def test_a_weight_in_a_list_is_refused_and_stacked_too() -> None:
    nets = [Listed().double() for _ in range(2)]
    with pytest.raises(rd.UnsupportedError, match="as it was given"):
        unrolled(nets[0], CE, None)
    loss, params = rd.stack_modules(nets, CRITERIA["a weight"](nets[0]))
    with pytest.raises(rd.UnsupportedError, match="as it was given"):
        rd.unroll(loss, params, (X, Y), rd.SGD(0.1), steps=STEPS)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_a_criterion_that_is_a_module_holds_the_network(adjoint: Any) -> None:
    torch.manual_seed(0)
    net, reference = Plain().double(), Plain().double()
    reference.load_state_dict(net.state_dict())
    theta = unrolled(net, Distilling(net), adjoint)
    optimizer, criterion = torch.optim.SGD(reference.parameters(), 0.1, 0.5), Distilling(reference)
    for k in range(STEPS):
        optimizer.zero_grad()
        criterion(reference(X[k % 3]), Y[k % 3]).backward()
        optimizer.step()
    for name, p in reference.named_parameters():
        torch.testing.assert_close(theta[name], p, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_what_is_read_late_is_refused_in_time(adjoint: Any) -> None:
    """At the steps whose number, of all that the loss was ever evaluated at, is a power of two."""
    w = {"w": torch.ones(3, dtype=torch.float64, requires_grad=True)}

    def loss(p: dict[str, Tensor], k: int) -> Tensor:
        return (p["w"] - (w["w"].detach() if k >= 2 else 1.5)).square().sum()

    def unroll(steps: int) -> None:
        rd.unroll(loss, w, lambda k: k, rd.SGD(0.1), steps=steps, adjoint=adjoint)

    unroll(2)
    unroll(4)  # looked at once: at the 4th step of all, which is step 1
    with pytest.raises(rd.UnsupportedError, match=r"at step 9\b"):
        unroll(10)  # at the 8th, step 1 again, and the 16th


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_what_is_given_or_copied_may_be_read(adjoint: Any) -> None:
    w = {"w": torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)}
    anchor = w["w"].detach().clone()

    def loss(p: dict[str, Tensor], batch: Any, start: dict[str, Tensor]) -> Tensor:
        like = torch.zeros_like(w["w"]) + w["w"].new_zeros(3)  # of its shape and dtype, no number of it
        terms = [(p["w"] - other).square().sum() for other in (start["w"], anchor, like, 0.1 * batch[0])]
        return torch.stack(terms).sum()

    theta = rd.unroll(loss, w, lambda k: (w["w"].detach(),), rd.SGD(0.1), steps=3, hyper=w, adjoint=adjoint)
    theta["w"].sum().backward()


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_parameters_without_numbers_are_no_originals(adjoint: Any) -> None:
    """Regression: all empty tensors have the address 0."""
    params = {"w": torch.ones(2, dtype=torch.float64), "empty": torch.ones(0, dtype=torch.float64)}

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        return torch.cat([p["w"], 2 * p["empty"], torch.empty(0, dtype=torch.float64)]).square().sum()

    theta = rd.unroll(loss, params, lambda k: (), rd.SGD(0.1, 0.5), steps=2, adjoint=adjoint)
    assert theta["empty"].shape == (0,)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_memory_may_be_shared_with_the_rest(adjoint: Any) -> None:
    """Regression: what lies in the same memory as a parameter was taken for it, as loaded from a mapped file."""
    memory = torch.randn(12, dtype=torch.float64)
    layer = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3)).double().eval()
    memory[9:].abs_()
    layer.load_state_dict(layer.state_dict() | {"1.running_var": memory[9:], "1.bias": memory[:3]}, assign=True)
    data = memory[3:9]

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        return (output * data[:3]).square().sum() + len({p.data_ptr() for p in layer.parameters()}) * output.sum()

    loss, params = rd.from_module(layer, criterion)
    rd.unroll(loss, params, (X[:, :, :1], Y), rd.SGD(1e-3, 0.5), steps=2, adjoint=adjoint)
    with pytest.raises(rd.UnsupportedError, match=r"params\['1.bias'\] as it was given"):
        rd.unroll(
            lambda p, b: loss(p, b) + memory[2:5].sum(),
            params,
            (X[:, :, :1], Y),
            rd.SGD(1e-3),
            steps=2,
            adjoint=adjoint,
        )


@pytest.mark.parametrize("adjoint", [rd.Reversible(graph_bytes=0), rd.Checkpoint()], ids=repr)
def test_a_frozen_transformer_computes_the_same_watched_or_not(adjoint: Any) -> None:
    """Regression: torch takes another way through it where nothing is differentiated, but not while it is watched."""
    torch.manual_seed(0)
    teacher = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval()

    def loss(p: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            target = teacher(batch[0][None])[0]
        return (batch[0] @ p["w"] - target).square().mean()

    w = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    theta = rd.unroll(loss, {"w": w}, (X,), rd.SGD(0.1, 0.5), steps=10, adjoint=adjoint)
    theta["w"].sum().backward()
    assert torch.backends.mha.get_fastpath_enabled()


@torch.library.custom_op("revdistill_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """Without a derivative."""
    return 2 * x


LIBRARY = torch.library.Library("revdistill_tests", "FRAGMENT")
LIBRARY.define("cubed(Tensor x) -> Tensor")
LIBRARY.impl("cubed", lambda x: x * x * x, "CPU")  # its graph is that of the operators it is made of


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_an_operator_without_a_kernel_for_autograd_keeps_its_graph(adjoint: Any) -> None:
    """Regression: under the mode that watches it had none, and a part of the gradient was missing."""
    found = []
    for cube in (torch.ops.revdistill_tests.cubed, lambda x: x * x * x):
        w = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
        theta = rd.unroll(
            lambda p, b, cube=cube: cube(p["w"]).sum() + p["w"].square().sum() + doubled(p["w"].detach()).sum(),
            {"w": w},
            lambda k: (),
            rd.SGD(0.1, 0.5),
            steps=4,
            adjoint=adjoint,
        )
        found.append(torch.autograd.grad(theta["w"].sum(), w)[0])
    assert torch.equal(found[0], found[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where it imports its compiler
@pytest.mark.parametrize("adjoint", [rd.Reversible(graph_bytes=0), rd.Reversible()], ids=repr)
def test_what_was_compiled_stays_so(adjoint: Any) -> None:
    """Regression: the compiler gave the user's function up, after it had tried to trace what watches."""
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            compiled.append(1)
            return graph(*args)

        return run

    teacher = torch.compile(lambda x: x.tanh().sum(1), backend=backend)
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def loss(p: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            target = teacher(batch[0])
        return (batch[0] @ p["w"] - target).square().mean()

    theta = rd.unroll(loss, {"w": w}, (X,), rd.SGD(0.1, 0.5), steps=20, adjoint=adjoint)
    theta["w"].sum().backward()
    assert len(compiled) >= 20 - 5  # of 20 steps those with the numbers 1, 2, 4, 8 and 16 are watched
    compiled.clear()
    teacher(X[0])
    assert compiled == [1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operators_that_take_functions_are_fine() -> None:
    def loss(p: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            scale = torch.cond(batch[0].sum() > 0, lambda x: x.sum(), lambda x: -x.sum(), (batch[0],))
        return (p["w"] * scale).square().sum() + p["w"].sum()

    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    rd.unroll(loss, {"w": w}, (X,), rd.SGD(1e-3, 0.5), steps=3)["w"].sum().backward()


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_with_backprop_the_originals_may_be_reached_with_a_gradient(adjoint: Any) -> None:
    w = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        return (p["w"] - 1.0).square().sum() + 0.5 * (p["w"] - w).square().sum()

    if not isinstance(adjoint, rd.Backprop):
        with pytest.raises((ValueError, rd.UnsupportedError), match=r"hyper="):
            rd.unroll(loss, {"w": w}, lambda k: (), rd.SGD(0.1, 0.5), steps=2, adjoint=adjoint)
        return
    theta = rd.unroll(loss, {"w": w}, lambda k: (), rd.SGD(0.1, 0.5), steps=1, adjoint=adjoint)
    (found,) = torch.autograd.grad(theta["w"].sum(), w)
    torch.testing.assert_close(found, torch.full_like(w, 1 - 0.1 * (2 + 1) + 0.1))


def test_a_loss_whose_hash_raises_is_looked_at_each_time() -> None:
    class Unhashable:
        def __hash__(self) -> int:
            raise RuntimeError("not to be kept")

        def __call__(self, p: dict[str, Tensor], batch: Any) -> Tensor:
            return (p["w"] - w.detach()).square().sum()

    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss = Unhashable()
    for _ in range(2):
        with pytest.raises(rd.UnsupportedError, match=r"at step 0\b"):
            rd.unroll(loss, {"w": w}, lambda k: (), rd.SGD(0.1), steps=2)
