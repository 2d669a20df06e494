"""Minibatches of a data set: training and gradients are those of a loop that indexes the data."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import revdistill as rd
from revdistill.engine.layout import Layout
from revdistill.engine.loss import compiled
from revdistill.engine.loss.data import Data
from revdistill.engine.loss.determinism import Determinism
from revdistill.engine.loss.gradient import Gradient
from tests import standin
from tests.engine.small import EVERY, total
from tests.engine.test_compile import needs_compiler

FIXED = EVERY[:-1]
N, STEPS, LR, MOMENTUM = 7, 11, 0.2, 0.5
# a smaller batch within and at the end; 3 and 0 twice in theirs; 4 in none
ORDER = torch.tensor([[0, 1, 2], [3, 3, 5], [6, -1, -1], [5, 0, 1], [0, 2, 0], [2, 6, -1]])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(k: int, order: Tensor = ORDER) -> Tensor:
    """Of step k, counted with plain Python."""
    return torch.tensor([i for i in order.tolist()[k % len(order)] if i >= 0])


Theta = dict[str, Tensor]


def weighted(p: Theta, batch: tuple[Tensor, Tensor, Tensor], hyper: Any = None) -> Tensor:
    """Weights w [B], x [B, 4] and labels y [B]; hyper: a penalty."""
    w, x, y = batch
    losses = F.cross_entropy(torch.tanh(x @ p["a"]) @ p["b"], y, reduction="none")
    return (w * losses).sum() / len(w) + (0 if hyper is None else hyper * p["a"].square().sum())


def by_name(p: Theta, batch: dict[str, Tensor]) -> Tensor:
    return weighted(p, (batch["w"], batch["x"], batch["y"]))


class Task:
    """A loss, its parameters at the start, and its data."""

    def __init__(self, kind: str = "weighted") -> None:
        self.w, self.x = torch.ones(N, dtype=torch.float64).requires_grad_(), randn(N, 4, seed=1).requires_grad_()
        self.y = torch.arange(N) % 3
        self.params = {"a": randn(4, 5, seed=2).requires_grad_(), "b": randn(5, 3, seed=3).requires_grad_()}
        self.leaves = [self.w, self.x, *self.params.values()]
        self.data: Any = (self.w, self.x, self.y)
        self.loss: Callable[..., Tensor] = weighted
        self.hyper: Tensor | None = None
        if kind == "dict":
            self.loss, self.data = by_name, {"y": self.y, "w": self.w, "x": self.x}
        elif kind == "hyper":
            self.hyper = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
            self.leaves.append(self.hyper)
        elif kind in ("module", "stacked"):
            torch.manual_seed(0)
            nets = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double() for _ in range(3)]
            made = (
                rd.from_module(nets[0], F.cross_entropy)
                if kind == "module"
                else rd.stack_modules(nets, F.cross_entropy)
            )
            (self.loss, self.params), self.data = made, (self.x, self.y)
            self.leaves = [self.x, *self.params.values()]

    def batch(self, k: int, order: Tensor = ORDER) -> Any:
        """By plain indexing."""
        index = rows(k, order)
        if isinstance(self.data, dict):
            return {name: t[index] for name, t in self.data.items()}
        return tuple(t[index] for t in self.data)

    def loop(self, steps: int = STEPS, window: int = STEPS, order: Tensor = ORDER) -> Theta:
        """SGD with momentum, with a graph over all steps."""
        theta = dict(self.params)
        velocity = {name: torch.zeros_like(p) for name, p in theta.items()}
        extra = () if self.hyper is None else (self.hyper,)
        for k in range(steps):
            if k == steps - window and k:
                theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
                velocity = {name: v.detach() for name, v in velocity.items()}
            value = self.loss(theta, self.batch(k, order), *extra)
            gradients = torch.autograd.grad(value, list(theta.values()), create_graph=True)
            for (name, p), g in zip(list(theta.items()), gradients, strict=True):
                velocity[name] = MOMENTUM * velocity[name] + g
                theta[name] = p - LR * velocity[name]
        return theta

    def unroll(self, adjoint: Any = None, steps: int = STEPS, order: Tensor = ORDER, **kwargs: Any) -> Any:
        batches = rd.Minibatches(self.data, order)
        optimizer = rd.SGD(LR, MOMENTUM)
        return rd.unroll(
            self.loss, self.params, batches, optimizer, steps=steps, hyper=self.hyper, adjoint=adjoint, **kwargs
        )

    def gradients(self, theta: Theta, **kwargs: Any) -> list[Tensor]:
        return list(torch.autograd.grad(total(theta), self.leaves, **kwargs))


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
@pytest.mark.parametrize("kind", ["weighted", "dict", "hyper", "module", "stacked"])
def test_training_and_gradients_are_those_of_a_loop(kind: str, adjoint: Any) -> None:
    """Smaller batches, examples twice in one and examples in none; more steps than rows of the order."""
    task = Task(kind)
    expected = task.loop()
    found = task.unroll(adjoint)
    for name, p in expected.items():
        close(found[name], p)
    found, expected = task.gradients(found), task.gradients(expected)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    assert not task.x.grad_fn
    assert not found[0][4].any()
    assert all(found[0][i].any() for i in (0, 1, 2, 3, 5, 6))


def test_adam_too() -> None:
    task, first, second = Task(), {}, {}
    theta = dict(task.params)
    for k in range(STEPS):
        gradients = torch.autograd.grad(weighted(theta, task.batch(k)), list(theta.values()), create_graph=True)
        for (name, p), g in zip(list(theta.items()), gradients, strict=True):
            beta1, beta2 = round(0.9 * 2**30) / 2**30, round(0.999 * 2**30) / 2**30  # as the engine has them
            first[name] = beta1 * first.get(name, torch.zeros_like(p)) + (1 - beta1) * g
            second[name] = beta2 * second.get(name, torch.zeros_like(p)) + (1 - beta2) * g * g
            root = (second[name] / (1 - beta2 ** (k + 1))).sqrt()
            theta[name] = p - 0.05 / (1 - beta1 ** (k + 1)) * first[name] / (root + 1e-2)
    expected = task.gradients(theta)
    for adjoint in FIXED:
        batches = rd.Minibatches(task.data, ORDER)
        theta = rd.unroll(weighted, task.params, batches, rd.Adam(0.05, eps=1e-2), steps=STEPS, adjoint=adjoint)
        for a, b in zip(task.gradients(theta), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_the_gradient_of_the_weights_is_the_finite_difference_of_trainings() -> None:
    task, h = Task(), 1e-5
    found, *_ = task.gradients(task.unroll(rd.Reversible(graph_bytes=0)))
    for i in range(N):
        ends = []
        for sign in (1, -1):
            weights = torch.ones(N, dtype=torch.float64)
            weights[i] += sign * h
            moved = Task()
            moved.data = (weights, moved.x.detach(), moved.y)
            ends.append(float(total(moved.loop()).detach()))
        assert abs(float(found[i]) - (ends[0] - ends[1]) / (2 * h)) < 1e-7


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_steps_before_a_window_add_nothing(adjoint: Any) -> None:
    task = Task()
    theta, expected = task.unroll(adjoint, window=3), task.loop(window=3)
    for a, b in zip(
        torch.autograd.grad(total(theta), [task.w, task.x]),
        torch.autograd.grad(total(expected), [task.w, task.x]),
        strict=True,
    ):
        close(a, b)
        assert not a[3].any()  # the steps from 8 on: none of them takes it


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_in_pieces_the_order_goes_on(adjoint: Any) -> None:
    task = Task()
    batches, optimizer = rd.Minibatches(task.data, ORDER), rd.SGD(LR, MOMENTUM)
    theta, state = rd.unroll(
        weighted, task.params, batches, optimizer, steps=4, adjoint=adjoint, seed=0, return_state=True
    )
    theta = rd.unroll(weighted, theta, batches, optimizer, steps=STEPS - 4, adjoint=adjoint, state=state)
    whole = task.unroll(adjoint)
    assert all(torch.equal(theta[name], whole[name]) for name in whole)
    for a, b in zip(task.gradients(theta), task.gradients(task.loop()), strict=True):
        close(a, b)


def test_a_batch_may_be_changed_by_the_loss() -> None:
    """It is a copy: the data stay as they are, as in a loop."""
    task = Task()
    task.x = task.x.detach()
    task.data, task.leaves = (task.w, task.x, task.y), [task.w, *task.params.values()]

    def loss(p: Theta, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        batch[1].mul_(0.5)
        return weighted(p, batch)

    task.loss = loss
    before = task.x.clone()
    expected = task.gradients(task.loop())
    for adjoint in EVERY:
        for a, b in zip(task.gradients(task.unroll(adjoint)), expected, strict=True):
            close(a, b)
    assert torch.equal(task.x, before)


# --- what changes meanwhile


@pytest.mark.parametrize("adjoint", FIXED, ids=repr)
def test_in_place_changes_of_the_data_are_refused(adjoint: Any) -> None:
    task = Task()
    theta = task.unroll(adjoint)
    with torch.no_grad():
        task.x[4] += 1
    with pytest.raises(rd.ReversalError, match="in batches or hyper was changed in place"):
        task.gradients(theta)


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_data_changed_behind_torchs_back(adjoint: Any) -> None:
    """Where the batches are gathered again that is an error; a graph that is kept has its own."""
    task = Task()
    expected = task.gradients(task.unroll(adjoint))
    theta = task.unroll(adjoint)
    task.x.data[2] += 1
    if adjoint in (EVERY[1], EVERY[-1]):
        assert all(torch.equal(a, b) for a, b in zip(task.gradients(theta), expected, strict=True))
        return
    with pytest.raises(rd.ReversalError):
        task.gradients(theta)


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
def test_the_order_is_what_it_was(adjoint: Any) -> None:
    task, order = Task(), ORDER.clone()
    expected = task.gradients(task.unroll(adjoint))
    batches = rd.Minibatches(task.data, order)
    order.zero_()
    theta = rd.unroll(weighted, task.params, batches, rd.SGD(LR, MOMENTUM), steps=STEPS, adjoint=adjoint)
    batches.order.zero_()
    assert all(torch.equal(a, b) for a, b in zip(task.gradients(theta), expected, strict=True))
    with pytest.raises(ValueError, match="data or order was changed"):
        rd.unroll(weighted, task.params, batches, rd.SGD(LR, MOMENTUM), steps=STEPS, adjoint=adjoint)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda batches: pickle.loads(pickle.dumps(batches))])
def test_copies_serve_as_well(copied: Any) -> None:
    task = Task()
    batches = copied(rd.Minibatches((task.w.detach(), task.x.detach(), task.y), ORDER))
    theta = rd.unroll(weighted, task.params, batches, rd.SGD(LR, MOMENTUM), steps=STEPS)
    assert all(torch.equal(theta[name], p) for name, p in task.unroll().items())


def test_data_of_another_length_are_refused_at_the_unroll() -> None:
    data = {"x": torch.ones(3)}
    batches = rd.Minibatches(data, torch.tensor([[0, 2]]))
    data["x"] = torch.ones(2)
    with pytest.raises(ValueError, match="data or order was changed"):
        rd.unroll(lambda p, b: p["w"].sum(), {"w": torch.ones(1)}, batches, rd.SGD(0.1), steps=1)


# --- bad input

X, Y, ONE = torch.ones(6, 2), torch.arange(6), torch.tensor([[0, 1]])


class Subclass(Tensor):
    pass


def in_inference_mode(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "one tensor": (lambda: (X, ONE), TypeError, r"data must be a tuple.* got Tensor of shape \[6, 2\].*\(t,\)"),
    "no tensors": (lambda: ((), ONE), ValueError, r"data is empty.*\[n, \.\.\.\]"),
    "no tensors, dict": (lambda: ({}, ONE), ValueError, "data is empty"),
    "a list in it": (lambda: ((X, [1]), ONE), TypeError, "data must be .*got tuple with a list in it"),
    "nested": (lambda: ({"x": (X,)}, ONE), TypeError, "data must be .*got dict with a tuple in it"),
    "number": (lambda: (3, ONE), TypeError, "data must be .*got int"),
    "0-dim": (lambda: ((X, torch.ones(())), ONE), ValueError, r"data\[1\] has shape \[\].*number of examples"),
    "no examples": (lambda: ((X[:0],), ONE), ValueError, r"data\[0\] has shape \[0, 2\].*at least 1"),
    "lengths": (lambda: ((X, Y[:4]), ONE), ValueError, r"data\[1\] holds 4 examples.*data\[0\] holds 6"),
    "lengths, dict": (lambda: ({"x": X, "y": Y[:4]}, ONE), ValueError, r"data\['y'\] holds 4.*data\['x'\] holds 6"),
    "devices": (lambda: ((X, Y.to("meta")), ONE), ValueError, r"data\[1\] is on device meta"),
    "sparse": (lambda: ((X.to_sparse(),), ONE), ValueError, r"data\[0\] has layout.*to_dense"),
    "subclass": (lambda: ((X.as_subclass(Subclass),), ONE), TypeError, r"data\[0\] is a Subclass"),
    "inference": (lambda: ((in_inference_mode(X),), ONE), rd.UnsupportedError, r"data\[0\] was made in .*inference"),
    "order, list": (lambda: ((X,), [[0, 1]]), TypeError, "order must be a tensor, got list"),
    "order, dtype": (lambda: ((X,), ONE.int()), TypeError, r"order has dtype torch.int32; accepted is torch.int64"),
    "order, floats": (lambda: ((X,), ONE.double()), TypeError, "order has dtype torch.float64"),
    "order, one row": (lambda: ((X,), ONE[0]), ValueError, r"order has shape \[2\]; accepted is \[T, B\]"),
    "order, no steps": (lambda: ((X,), ONE[:0]), ValueError, r"order has shape \[0, 2\]"),
    "order, no examples": (lambda: ((X,), ONE[:, :0]), ValueError, r"order has shape \[1, 0\]"),
    "order, large": (
        lambda: ((X,), torch.tensor([[0, 5], [1, 6]])),
        ValueError,
        r"order\[1, 1\] is 6; accepted are 0 to 5, because data hold 6",
    ),
    "order, negative": (lambda: ((X,), torch.tensor([[0, -2]])), ValueError, r"order\[0, 1\] is -2; accepted are"),
    "order, gap": (
        lambda: ((X,), torch.tensor([[0, 1, 2], [0, -1, 2]])),
        ValueError,
        r"order\[1, 1\] is -1, but an example comes after it",
    ),
    "order, empty row": (lambda: ((X,), torch.tensor([[0], [-1]])), ValueError, r"order\[1\] begins with -1.*at least"),
    "order, meta": (lambda: ((X,), ONE.to("meta")), ValueError, "order is on device meta"),
    "order, sparse": (lambda: ((X,), ONE.to_sparse()), ValueError, "order has layout"),
    "order, subclass": (lambda: ((X,), ONE.as_subclass(Subclass)), TypeError, "order is a Subclass"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    given, error, message = BAD[case]
    with pytest.raises(error, match=f"^Minibatches: {message}"):
        rd.Minibatches(*given())


def test_a_dict_that_cannot_be_put_together_again_is_named() -> None:
    class Odd(dict):  # type: ignore[type-arg]
        def __init__(self, x: Tensor) -> None:
            super().__init__(x=x)

    with pytest.raises(TypeError, match="Minibatches: data is a Odd"):
        rd.Minibatches(Odd(X), ONE)


# --- cost


class Seen(TorchDispatchMode):
    """The operators that read or made a tensor of n rows, but for views, by name; and all of them."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.dense, self.every = n, Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.every[name] += 1
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, found)) if isinstance(t, Tensor)]
        made = [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor)]
        gathers = name == "aten::index_select" and made[0].numel() < self.n
        in_place = name in ("aten::index_add_", "aten::index_copy_")
        if any(t.numel() >= self.n for t in tensors) and not (gathers or in_place or func.is_view):
            self.dense[name] += 1
        return found


@pytest.mark.parametrize("adjoint", FIXED, ids=repr)
def test_no_steps_work_grows_with_the_data(adjoint: Any) -> None:
    """A thousand examples and a million: what is done to whole data is done once, however many steps there are."""

    def seen(n: int, steps: int) -> Seen:
        w, x = torch.ones(n, requires_grad=True), torch.ones(n, 2, requires_grad=True)
        start = {"a": torch.tensor([0.1, 0.2], requires_grad=True)}

        def loss(p: Theta, batch: tuple[Tensor, Tensor]) -> Tensor:
            return (batch[0] * torch.tanh(batch[1] @ p["a"])).mean()

        order = torch.tensor([[0, n - 1, 5, 7], [3, 3, n - 2, -1]]).repeat(5, 1)
        batches = rd.Minibatches((w, x), order)
        with Seen(n) as found:
            theta = rd.unroll(loss, start, batches, rd.SGD(0.1, 0.5), steps=steps, adjoint=adjoint, seed=0)
            torch.autograd.grad(theta["a"].sum(), [w, x])
        return found

    few, many = seen(1_000_000, 4), seen(1_000_000, 9)
    assert few.dense == many.dense
    # 5 steps more: two tensors gathered, again on the way back without graphs; and two gradients at 3 of the 5
    gathers = many.every["aten::index_select"] - few.every["aten::index_select"]
    assert gathers == {EVERY[0]: 26, EVERY[1]: 16, EVERY[2]: 36, EVERY[3]: 26}[adjoint]
    assert seen(1_000, 9).every == many.every


def test_different_examples_are_added_in_no_order() -> None:
    """torch's index_add adds in any order on CUDA, whose bits are others each time."""
    for order, adds in ((ORDER[[0, 2, 3]], 0), (ORDER[[1]], 2 * 3)):
        task = Task()
        with Seen(10**9) as seen:
            task.gradients(task.unroll(steps=3, order=order))
        assert seen.every["aten::index_add_"] == adds


@pytest.mark.parametrize("several", [False, True])
def test_products_are_added_to_their_rows(several: bool) -> None:
    """With many cotangents too, which come as one more dimension in front."""
    lead = (2,) if several else ()
    for batches, index in (
        (rd.Minibatches((randn(N, 3),), ORDER), rows),
        ((randn(N, 3),), lambda k: torch.tensor(k % N)),
    ):
        data = Data(batches, None, taken=1)
        for k in range(STEPS):
            bar, product = randn(*lead, N, 3, seed=5), randn(*lead, *index(k + 1).shape, 3, seed=6)  # type: ignore[operator]
            expected = bar.clone()
            for one, many in zip(expected, product, strict=True) if several else [(expected, product)]:
                for i, value in enumerate(index(k + 1).reshape(-1)):  # type: ignore[operator]
                    one[value] += many.reshape(-1, 3)[i]
            data.add_to(bar, k, product, dim=int(several))
            torch.testing.assert_close(bar, expected)


def test_a_batch_counts_with_the_graph_that_holds_it() -> None:
    """A table's rows are there anyway."""
    x = torch.zeros(4, 1000, dtype=torch.float64)
    layout = Layout(("w",), (torch.Size([1]),), torch.float64, torch.device("cpu"))

    def nbytes(batches: Any) -> int:
        determinism = Determinism.capture(layout.device, 0)
        gradient = Gradient(lambda p, b: (p["w"] * b[0]).square().sum(), layout, Data(batches, None), determinism, 1)
        with determinism.passage():
            return gradient.linearize(0, torch.ones(1, dtype=torch.float64)).nbytes

    assert nbytes(rd.Minibatches((x,), torch.tensor([[0, 1]]))) - nbytes((x.reshape(2, 2, 1000),)) >= 2 * 8 * 1000


# --- compiled, and on a device


def test_compiled_functions_get_the_gathered_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compiled, "best_times", lambda first, second: (1.0, 2.0))  # compiled is kept
    for kind in ("weighted", "dict", "hyper"):
        task = Task(kind)
        for a, b in zip(task.gradients(task.unroll(compile=True)), task.gradients(task.loop()), strict=True):
            close(a, b)


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("default")  # of the compiler's own imports
@pytest.mark.filterwarnings("error::revdistill.CompileWarning")
def test_smaller_batches_are_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "best_times", lambda first, second: (1.0, 2.0))  # compiled is kept
    task = Task()
    found = task.gradients(task.unroll(rd.Reversible(graph_bytes=0), compile=True))
    for a, b in zip(found, task.gradients(task.loop()), strict=True):
        close(a, b)


@pytest.mark.standin
@pytest.mark.parametrize("adjoint", [FIXED[0], FIXED[-1]], ids=repr)
def test_on_a_device_no_step_waits(counts: standin.Counts, adjoint: Any) -> None:
    """The order may stay on the CPU, or be there."""
    task = Task()
    expected = task.gradients(task.loop(6))
    waits = []
    for steps, order in ((6, ORDER), (6, standin.put(ORDER)), (STEPS, ORDER)):
        there = Task()
        there.w, there.x, there.y = (standin.put(t) for t in (there.w, there.x, there.y))
        there.params = {name: standin.put(p) for name, p in there.params.items()}
        there.data, there.leaves = (there.w, there.x, there.y), [there.w, there.x, *there.params.values()]
        batches = rd.Minibatches(there.data, order)
        counts.clear()
        theta = rd.unroll(weighted, there.params, batches, rd.SGD(LR, MOMENTUM), steps=steps, adjoint=adjoint)
        found = there.gradients(theta)
        waits.append(counts.waits.total())
        if steps == 6:
            for a, b in zip(found, expected, strict=True):
                close(standin.take(a), b)
    assert waits[0] == waits[1] == waits[2]


@pytest.mark.standin
def test_what_is_on_another_device_is_named(counts: standin.Counts) -> None:
    x, there = torch.ones(6, 2), standin.put(torch.ones(6, 2))
    for given, message in (
        (((x, there), ONE), r"data\[1\] is on standin:0, but Minibatches: data\[0\] is on cpu"),
        (((x,), standin.put(ONE)), r"order is on standin:0, but data are on cpu; leave it on the CPU"),
    ):
        with pytest.raises(ValueError, match=message):
            rd.Minibatches(*given)
    with pytest.raises(ValueError, match=r"batches.data\[0\] is on standin:0, but params are on cpu"):
        rd.unroll(lambda p, b: p["w"].sum(), {"w": x}, rd.Minibatches((there,), ONE), rd.SGD(0.1), steps=1)
