"""The forms in which batches can be given; each trains as torch.optim.SGD trains on the same batches."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import revdistill as rd
from revdistill.engine.loss.tree import contents
from tests.engine.small import CE, total

EVERY = [rd.Reversible(graph_bytes=0), rd.Reversible(), rd.Backprop()]
STEPS = 7
X = torch.randn(15, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(15) % 3
ROWS = [(X[i : i + 5], Y[i : i + 5]) for i in (0, 5, 10)]


class TwoInputs(nn.Module):
    """Its arguments have names; the batches below give them in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """[B, 4], [B, 4] -> [B, 3]."""
        return self.layer(x) * torch.sigmoid(self.gate(gate))


def make(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def by_torch(kind: Callable[[], nn.Module], outputs: Callable[[nn.Module, int], Tensor]) -> dict[str, Tensor]:
    net = make(kind)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.5)
    for k in range(STEPS):
        optimizer.zero_grad()
        CE(outputs(net, k), ROWS[k % 3][1]).backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


def trained(kind: Callable[[], nn.Module], batches: Any, adjoint: Any) -> dict[str, Tensor]:
    loss, params = rd.from_module(make(kind), CE)
    theta = rd.unroll(loss, params, batches, rd.SGD(0.1, 0.5), steps=STEPS, adjoint=adjoint)
    total(theta).backward()
    assert all(p.grad is not None for p in params.values())
    return theta


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, p in expected.items():
        torch.testing.assert_close(found[name].detach(), p, rtol=1e-9, atol=1e-11)


def linear() -> nn.Module:
    return nn.Linear(4, 3)


class Items(TensorDataset):
    """A data set with a method for several items at once."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        return [self[i] for i in indices]


FORMS: dict[str, Callable[[], Any]] = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(map(list, ROWS)),
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=5),
    "loader, several": lambda: DataLoader(Items(X, Y), batch_size=5, num_workers=0),
    "loader, no batching": lambda: DataLoader(ROWS, batch_size=None),  # type: ignore[arg-type]
    "loader, listed": lambda: list(DataLoader(TensorDataset(X, Y), batch_size=5)),
    "dict": lambda: {"input": X.reshape(3, 5, 4), "target": Y.reshape(3, 5)},
    "function, dict": lambda: lambda k: {"input": ROWS[k % 3][0], "target": ROWS[k % 3][1]},
    "list of dicts": lambda: [{"input": x, "y": y} for x, y in ROWS],
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_trains_as_torch_does(form: str) -> None:
    expected = by_torch(linear, lambda net, k: net(ROWS[k % 3][0]))
    for adjoint in EVERY:
        close(trained(linear, FORMS[form](), adjoint), expected)


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_a_dict_goes_to_the_module_as_keywords(adjoint: Any) -> None:
    def gates(k: int) -> Tensor:
        return ROWS[k % 3][0].flip(0)

    expected = by_torch(TwoInputs, lambda net, k: net(x=ROWS[k % 3][0], gate=gates(k)))
    table = {
        "gate": torch.stack([gates(k) for k in range(3)]),
        "x": X.reshape(3, 5, 4),
        "y": Y.reshape(3, 5),
    }
    close(trained(TwoInputs, table, adjoint), expected)
    close(trained(TwoInputs, lambda k: {name: t[k % 3] for name, t in table.items()}, adjoint), expected)


def test_the_gradient_of_a_dict_of_tensors() -> None:
    """Against a loop in float64; and stacked networks take dicts too."""
    x = X.reshape(3, 5, 4).clone().requires_grad_()
    net = make(linear)
    theta = dict(net.named_parameters())
    for k in range(STEPS):
        value = CE(torch.func.functional_call(net, theta, (x[k % 3],)), ROWS[k % 3][1])
        gradients = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        theta = {name: p - 0.1 * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
    (expected,) = torch.autograd.grad(total(theta), x)
    for adjoint in EVERY:
        for maker in (lambda: rd.from_module(make(linear), CE), lambda: rd.stack_modules([make(linear)] * 2, CE)):
            loss, params = maker()
            table = {"input": x, "y": Y.reshape(3, 5)}
            found = rd.unroll(loss, params, table, rd.SGD(0.1, 0.0), steps=STEPS, adjoint=adjoint)
            (gradient,) = torch.autograd.grad(total(found), x)
            networks = next(iter(found.values())).shape[0] if "weight" in found and found["weight"].ndim == 3 else 1
            torch.testing.assert_close(gradient, networks * expected, rtol=1e-8, atol=1e-10)


def once() -> Iterator[tuple[Tensor, Tensor]]:
    yield from ROWS


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Data without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return once()


class Scaled(DataLoader[tuple[Tensor, ...]]):
    """What it gives is not what its data set holds."""

    def __iter__(self) -> Iterator[Any]:
        return ((x * 0.1, y) for x, y in super().__iter__())


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "shuffled": (
        lambda: DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True),
        ValueError,
        r"shuffle=False.*batches=list\(loader\)",
    ),
    "stream": (
        lambda: DataLoader(Stream()),
        ValueError,
        r"of an IterableDataset, (?!.*shuffle).*batches=list\(loader\)",
    ),
    "own iteration": (
        lambda: Scaled(TensorDataset(X, Y), batch_size=5),
        ValueError,
        r"is a Scaled, a DataLoader with an __iter__ of its own.*batches=list\(loader\)",
    ),
    "iterator": (once, TypeError, r"generator, which gives each batch once.*batches=list"),
    "data set": (lambda: TensorDataset(X, Y), TypeError, r"TensorDataset, .* single examples; .*rd.Minibatches\("),
    "sequence": (lambda: range(3), TypeError, r"got range.*lambda k: batches\[k % len\(batches\)\]"),
    "mixed": (lambda: [X, ROWS[0]], TypeError, "got a list of Tensor and tuple"),
    "numbers": (lambda: [1.0, 2.0], TypeError, "got a list of float"),
    "dict of lists": (lambda: {"x": [1.0]}, TypeError, "got a dict of list"),
    "empty dict": (lambda: {}, ValueError, "batches is empty"),
    "dict, lengths": (lambda: {"x": X, "y": Y[:4]}, ValueError, r"batches\['y'\] holds 4 .*batches\['x'\] holds 15"),
    "nested, wants a gradient": (
        lambda: lambda k: {"x": [ROWS[0][0].clone().requires_grad_()], "y": ROWS[0][1]},
        ValueError,
        r"shape \[5, 4\] that requires grad \(at batches\(0\)\['x'\]\[0\]\).*not differentiated",
    ),
    "list, wants a gradient": (
        lambda: [(ROWS[0][0].clone().requires_grad_(), ROWS[0][1])],
        ValueError,
        "a list of batches are not differentiated",
    ),
    "one tensor": (lambda: lambda k: X[:2], TypeError, r"got one tensor of shape \[2, 4\]"),
    "no batch": (lambda: lambda k: None, TypeError, r"whose last entry is the target, got NoneType"),
    "nothing in it": (lambda: lambda k: (), ValueError, "must hold the target"),
    "no target": (lambda: (X[None],), TypeError, r"the module 0 entries beside the target.*autoencoder's, \(x, x\)"),
    "too many": (lambda: lambda k: (X, X, Y), TypeError, r"2 entries beside the target, .*Linear\.forward cannot"),
    "other names": (
        lambda: lambda k: {"x": X, "y": Y},
        TypeError,
        r"the names \['x'\] beside.*'input'.*forward's names",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_refused_says_what_to_do(form: str) -> None:
    batches, error, message = REFUSED[form]
    loss, params = rd.from_module(make(linear), CE)
    for adjoint in EVERY:
        with pytest.raises(error, match=message):
            rd.unroll(loss, params, batches(), rd.SGD(0.1), steps=STEPS, adjoint=adjoint)


def test_a_module_without_inputs() -> None:
    """Its batches hold the target alone."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(4))

        def forward(self) -> Tensor:
            return self.mean

    loss, params = rd.from_module(Mean().double(), lambda mean, x: (mean - x).square().sum())
    (found,) = rd.unroll(loss, params, (X[:3],), rd.SGD(0.1, 0.0), steps=2).values()
    torch.testing.assert_close(found, 0.16 * X[0] + 0.2 * X[1], rtol=1e-4, atol=1e-4)


def test_an_iterator_that_is_used_up_is_named_forward_and_back() -> None:
    loss, params = rd.from_module(make(linear), CE)
    for count, steps in ((3, 5), (4, 4)):
        rows = iter([ROWS[0]] * count)

        def run(rows: Iterator[Any] = rows, steps: int = steps) -> None:
            adjoint = rd.Reversible(graph_bytes=0)
            total(rd.unroll(loss, params, lambda k: next(rows), rd.SGD(0.1), steps=steps, adjoint=adjoint)).backward()

        with pytest.raises(ValueError, match=r"used up. batches must be a function of k.*batches=list"):
            run()


# --- objects


@dataclasses.dataclass
class WithFields:
    x: Tensor


class WithSlots:
    __slots__ = ("__hidden", "empty")

    def __init__(self, x: Tensor) -> None:
        self.__hidden = x

    @property
    def x(self) -> Tensor:
        return self.__hidden


class Linked:
    """A graph's data refer to their store, and the store to them."""

    def __init__(self, x: Tensor) -> None:
        self.store: dict[str, Any] = {"x": x, "owner": self}

    @property
    def x(self) -> Tensor:
        found: Tensor = self.store["x"]
        return found


class NamedInputs(dict):  # type: ignore[type-arg]
    """A dict whose tensors are attributes."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class OfObjects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, batch: Any) -> Tensor:
        return torch.tanh(self.layer(batch.x))


OBJECTS = [WithFields, WithSlots, Linked, NamedInputs]


def of_objects(kind: Any, adjoint: Any, grad: bool = False) -> tuple[Tensor, list[Any], list[Tensor]]:
    batches = [(kind(x.clone().requires_grad_(grad and k == 2)), y) for k, (x, y) in enumerate(ROWS)]
    loss, params = rd.from_module(make(OfObjects), lambda out, y: CE(out, y))
    theta = rd.unroll(loss, params, batches, rd.SGD(0.1, 0.5), steps=4, adjoint=adjoint)
    return total(theta), [b for b, _ in batches], list(params.values())


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_tensor_in_an_object_that_requires_grad_is_named(kind: Any) -> None:
    place = {WithFields: r"\.x", WithSlots: r"\._WithSlots__hidden", Linked: r"\.store\['x'\]", NamedInputs: r"\.x"}
    for adjoint in (rd.Reversible(), rd.Backprop()):
        with pytest.raises(ValueError, match=rf"requires grad \(at batches\(2\)\[0\]{place[kind]}\)"):
            of_objects(kind, adjoint, grad=True)


@pytest.mark.parametrize("kind", OBJECTS)
def test_an_object_changed_behind_torchs_back_is_caught(kind: Any) -> None:
    for adjoint in (rd.Reversible(), rd.StoreAll()):
        value, objects, params = of_objects(kind, adjoint)
        torch.autograd.grad(value, params)
        value, objects, params = of_objects(kind, adjoint)
        objects[1].x.data.mul_(2)
        with pytest.raises(rd.ReversalError):
            torch.autograd.grad(value, params)


def test_objects_that_refer_to_half_the_world_cost_little() -> None:
    """A data set is none of a batch's data, and of the rest no more than so many objects are looked at."""
    batch, far = WithFields(ROWS[0][0]), [[i] for i in range(100_000)]
    batch.dataset = Items(X, Y)  # type: ignore[attr-defined]
    batch.far = far  # type: ignore[attr-defined]
    found = dict(contents(batch, "batch"))
    assert found["batch.x"] is ROWS[0][0]
    assert found["batch.dataset"] is batch.dataset  # type: ignore[attr-defined]
    assert len(found) < 10_100
    assert len(list(contents(far, "batch"))) == 100_000


def test_a_batch_may_refer_to_a_trainer() -> None:
    """Regression: the parameters of an optimizer were taken for tensors of the batch."""
    own = torch.ones(2, requires_grad=True)
    batch = types.SimpleNamespace(x=torch.ones(2), trainer=types.SimpleNamespace(optimizer=torch.optim.SGD([own], 0.1)))
    theta = rd.unroll(
        lambda p, b: (p["w"] - b.x).square().sum(), {"w": torch.zeros(2)}, lambda k: batch, rd.SGD(0.1), steps=2
    )
    assert bool((theta["w"] > 0).all())
