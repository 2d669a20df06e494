"""rd.jacobian: many outputs of one unroll by one way back, each as one backward of a plain loop has it."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from revdistill.engine.cotangents import Batching, Identity
from tests.engine.problems import ADAMW_SETTINGS, PROBLEMS, SETTINGS, STEPS, WITHOUT_WAY_BACK, optimizer_of
from tests.engine.reference import train
from tests.engine.test_adjoints import SEED, TOLERANCE, make, seed_like_the_engine, worst_error

K = 3
OTHERS = [rd.Reversible(), rd.Checkpoint(every=5), rd.StoreAll(), rd.Backprop()]


def outputs_of(theta: dict[str, Tensor]) -> Tensor:
    """[K]: each with a gradient of its own, and one that does not see every parameter."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for q in range(K):
        seen = list(theta.values())[: 1 if q == 1 else None]
        draws = [torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype) for p in seen]
        rows.append(sum(((p * w).sum() + q * p.square().sum() for p, w in zip(seen, draws, strict=True))))
    return torch.stack(rows)


def rows_by_autograd(theta: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = []
    for output in outputs_of(theta):
        found = torch.autograd.grad(output, list(leaves.values()), allow_unused=True, retain_graph=True)
        rows.append([torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), found, strict=True)])
    return {name: torch.stack(column) for name, column in zip(leaves, zip(*rows, strict=True), strict=True)}


def check(problem: str, setting: str, adjoint: Any, **options: Any) -> None:
    case, settings, leaves = make(problem, setting)
    expected = rows_by_autograd(
        train(case, settings, STEPS, seed_like_the_engine, decoupled=setting in ADAMW_SETTINGS), leaves
    )
    leaves = {name: t for name, t in leaves.items() if expected[name].any()}
    optimizer = optimizer_of(setting, settings)
    theta = rd.unroll(
        case.loss,
        case.params,
        case.batches,
        optimizer,
        steps=STEPS,
        hyper=case.hyper,
        adjoint=adjoint,
        seed=SEED,
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one by one")
        found = rd.jacobian(outputs_of(theta), leaves, chunk_size=2)
    assert worst_error(found, {name: expected[name] for name in leaves}) <= TOLERANCE


ALL = list(itertools.product(PROBLEMS, SETTINGS))
FEW = [(problem, setting) for problem, setting in ALL if setting == "adamw groups" or problem == "tanh_mlp"]


@pytest.mark.parametrize(
    ("problem", "setting"), [pytest.param(*case, marks=() if case in FEW else pytest.mark.slow) for case in ALL]
)
def test_each_row_is_autograds(problem: str, setting: str) -> None:
    check(problem, setting, rd.Checkpoint() if setting in WITHOUT_WAY_BACK else rd.Reversible(graph_bytes=0))


@pytest.mark.parametrize("adjoint", OTHERS, ids=lambda adjoint: type(adjoint).__name__)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_of_every_adjoint(problem: str, adjoint: Any) -> None:
    check(problem, "groups", adjoint)


@pytest.mark.filterwarnings("default")  # of torch's compiler
@pytest.mark.parametrize("setting", ["plain", "adam"])
def test_compiled(setting: str) -> None:
    check("tanh_mlp", setting, rd.Reversible(), compile=True)


def small(**options: Any) -> tuple[dict[str, Tensor], Any]:
    """An unroll's leaves, and a function that makes it anew."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    loss, params = rd.from_module(net, nn.functional.cross_entropy)
    x = torch.randn(6, 4, 4, dtype=torch.float64, requires_grad=True)
    y = torch.arange(24).reshape(6, 4) % 3
    lr = torch.full((9,), 0.3, dtype=torch.float64, requires_grad=True)
    options.setdefault("optimizer", lambda lr: rd.SGD(lr, 0.8))
    optimizer = options.pop("optimizer")

    def run(**more: Any) -> Any:
        return rd.unroll(loss, params, (x, y), optimizer(lr), steps=9, seed=0, **options, **more)

    return {"x": x, "lr": lr, **params}, run


def same_as_single_rows(leaves: dict[str, Tensor], run: Any, result: Any = lambda theta: theta) -> None:
    found = rd.jacobian(outputs_of(result(run())), leaves)
    for q in range(K):
        single = torch.autograd.grad(outputs_of(result(run()))[q], list(leaves.values()), allow_unused=True)
        for (name, t), g in zip(leaves.items(), single, strict=True):
            torch.testing.assert_close(found[name][q], torch.zeros_like(t) if g is None else g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"save_at": [9, 0, 4, 4]},
        {"clip_back": 0.05},
        {"optimizer": lambda lr: rd.SGD(lr, 0.8, max_norm=torch.tensor(0.2, requires_grad=True))},
        {"optimizer": lambda lr: rd.Adam(lr, eps=1e-3, max_norm=0.2)},
    ],
    ids=["save_at", "clip_back", "max_norm", "adam max_norm"],
)
def test_with_options(options: dict[str, Any]) -> None:
    leaves, run = small(**options)
    same_as_single_rows(leaves, run)


def test_of_a_window() -> None:
    leaves, run = small(window=4)
    same_as_single_rows({name: leaves[name] for name in ("x", "lr")}, run)


def test_of_averages_and_states() -> None:
    leaves, run = small(average=0.7, return_state=True)

    def all_of(result: Any) -> dict[str, Tensor]:
        theta, average, state = result
        slots = {f"{slot}.{name}": t for slot, tensors in state.slots.items() for name, t in tensors.items()}
        return {f"average.{name}": t for name, t in average.items()} | theta | slots

    same_as_single_rows(leaves, run, all_of)


def test_through_one_unroll_and_another() -> None:
    leaves, run = small()

    def both(first: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = lambda params, batch: (params["w"] * batch[0]).sum().square()  # noqa: E731
        w = torch.cat([p.flatten() for p in first.values()])
        second = rd.unroll(loss, {"w": w}, (w.detach().flip(0)[None],), rd.SGD(0.001, 0.5), steps=4)
        return second | first

    same_as_single_rows(leaves, run, both)


def test_what_does_not_go_through_the_unroll_counts_too() -> None:
    leaves, run = small()
    found = rd.jacobian(outputs_of(run()) + leaves["x"].sum() * torch.arange(K), leaves["x"])
    without = rd.jacobian(outputs_of(run()), leaves["x"])
    torch.testing.assert_close(found - without, torch.arange(K).double().view(K, 1, 1, 1).expand_as(found))
    assert rd.jacobian(leaves["lr"] * 2, leaves["lr"]).equal(2 * torch.eye(9, dtype=torch.float64))


def test_vmap_and_the_older_vmap() -> None:
    leaves, run = small()
    x = leaves["x"]
    expected = rd.jacobian(outputs_of(run()), x)
    outputs = outputs_of(run())
    with pytest.raises(rd.UnsupportedError, match=r"rd\.jacobian"):
        torch.autograd.grad(outputs, x, torch.eye(K, dtype=torch.float64), is_grads_batched=True, retain_graph=True)
    (found,) = torch.func.vmap(lambda v: torch.autograd.grad(outputs, x, v))(torch.eye(K, dtype=torch.float64))
    assert found.equal(expected)
    outputs = outputs_of(run())
    twice = torch.eye(K, dtype=torch.float64).view(1, K, K).expand(2, K, K)
    nested = torch.func.vmap(torch.func.vmap(lambda v: torch.autograd.grad(outputs, x, v)[0]))(twice)
    torch.testing.assert_close(nested, expected.expand(2, *expected.shape), rtol=1e-12, atol=1e-15)


def test_once_and_no_derivative_of_it() -> None:
    leaves, run = small()
    outputs = outputs_of(run())
    rd.jacobian(outputs, leaves["x"])
    with pytest.raises(rd.UnsupportedError, match="already gone back"):
        rd.jacobian(outputs, leaves["x"])
    outputs = outputs_of(run())
    back = torch.func.vmap(lambda v: torch.autograd.grad(outputs, leaves["x"], v, create_graph=True)[0])
    found = back(torch.eye(K, dtype=torch.float64))
    with pytest.raises(rd.UnsupportedError, match="differentiated again"):
        found.sum().backward()


def test_the_largest_norms_are_told() -> None:
    told: list[tuple[int, float]] = []
    leaves, run = small(on_step_back=lambda k, norm: told.append((k, norm)), return_stats=True)
    theta, stats = run()
    rd.jacobian(outputs_of(theta), leaves["x"])
    together, told[:] = list(told), []
    rows: list[list[float]] = []
    amplifications = []
    for q in range(K):
        theta, single = run()
        outputs_of(theta)[q].backward()
        rows.append([norm for _, norm in told])
        amplifications.append(single.amplification)
        told.clear()
    assert [k for k, _ in together] == list(reversed(range(9)))
    assert [norm for _, norm in together] == pytest.approx([max(column) for column in zip(*rows, strict=True)])
    assert stats.amplification == pytest.approx(max(amplifications))
    leaves, run = small(clip_back=0.1, adjoint=rd.Backprop())
    with pytest.raises(rd.UnsupportedError, match="Backprop"):
        rd.jacobian(outputs_of(run()), leaves["x"])


class _NotBatched(torch.autograd.Function):
    """2 x^2, whose backward asks for a number: torch.func.vmap cannot go through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x * x

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return bar * 4 * x if float(bar.detach().abs().max()) >= 0 else bar


def test_an_operator_without_a_batching_rule() -> None:
    """In the loss, and in the outputs: one by one, and said."""
    w = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    def run() -> Tensor:
        loss = lambda params, batch: _NotBatched.apply(params["w"] - batch[0]).sum()  # noqa: E731
        theta = rd.unroll(loss, {"w": w}, (torch.ones(1, 2, dtype=torch.float64),), rd.SGD(0.05, 0.5), steps=4)
        return _NotBatched.apply(theta["w"])

    with pytest.warns(UserWarning, match="one by one"):
        found = rd.jacobian(run(), w)
    for q in range(2):
        assert torch.autograd.grad(run()[q], w)[0].equal(found[q])


def test_such_an_operator_before_the_unroll() -> None:
    """What the unroll is of was computed by it, through one unroll and two: nothing is walked back twice."""
    leaves, run = small()
    base = leaves["x"].detach().requires_grad_()
    loss = lambda params, batch: (params["w"] * batch[0]).square().sum()  # noqa: E731

    def both() -> Tensor:
        first = run()
        w = _NotBatched.apply(torch.cat([p.flatten() for p in first.values()]))
        data = _NotBatched.apply(base).flatten()[: len(w)]
        return outputs_of(rd.unroll(loss, {"w": w}, (data[None],), rd.SGD(0.01, 0.5), steps=3))

    with pytest.warns(UserWarning, match="one by one"):
        found = rd.jacobian(both(), (base, leaves["x"]))
    for q in range(K):
        single = torch.autograd.grad(both()[q], (base, leaves["x"]))
        torch.testing.assert_close([a[q] for a in found], list(single), rtol=1e-9, atol=1e-12)


class _AloneOnly(torch.autograd.Function):
    """x^2 with a backward of its own kind: whatever it raises of a batch, alone it is right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor | None:
        (x,) = ctx.saved_tensors
        assert not torch._C._functorch.is_batchedtensor(bar), "one at a time"
        return 2 * x * bar if bar.detach().any() else None


def test_a_backward_of_ones_own_that_takes_one_at_a_time() -> None:
    """And that gives nothing, where nothing comes: for the first output, not for the others."""
    w, b = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in "wb")

    def run() -> Tensor:
        loss = lambda params, batch: (_AloneOnly.apply(params["w"]).square() * batch[0]).sum()  # noqa: E731
        theta = rd.unroll(loss, {"w": w}, (torch.ones(1, 2, dtype=torch.float64),), rd.SGD(0.01, 0.5), steps=3)
        return torch.cat([b[:1], _AloneOnly.apply(theta["w"]), _AloneOnly.apply(b)])

    with pytest.warns(UserWarning, match="one by one"):
        found = rd.jacobian(run(), (w, b), chunk_size=2)
    for q in range(5):
        for t, rows in zip((w, b), found, strict=True):
            (single,) = torch.autograd.grad(run()[q], t, allow_unused=True)
            torch.testing.assert_close(rows[q], torch.zeros_like(t) if single is None else single)


def test_hooks_of_the_inputs_see_gradients_only() -> None:
    leaves, run = small()
    before = rd.jacobian(outputs_of(run()), leaves)
    hooks = [t.register_hook(lambda g: 2 * g) for t in leaves.values()]
    found = rd.jacobian(outputs_of(run()), leaves)
    for hook in hooks:
        hook.remove()
    for name in leaves:
        torch.testing.assert_close(found[name], 2 * before[name])


def test_checkpointed_dropout_is_batched() -> None:
    torch.manual_seed(0)
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)

    def loss(params: dict[str, Tensor], batch: tuple[Tensor]) -> Tensor:
        layer = lambda x: nn.functional.dropout(torch.tanh(x @ params["w"]), 0.5)  # noqa: E731
        return torch.utils.checkpoint.checkpoint(layer, batch[0], use_reentrant=False).square().sum()

    def run() -> Tensor:
        return rd.unroll(loss, {"w": w}, (x,), rd.SGD(0.05, 0.5), steps=5, seed=0)["w"].sum(0)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one by one")
        found = rd.jacobian(run(), x, chunk_size=3)
    for q in range(4):
        torch.testing.assert_close(found[q], torch.autograd.grad(run()[q], x)[0], rtol=1e-9, atol=1e-12)


def test_an_unroll_that_is_not_needed_may_be_used_up() -> None:
    leaves, run = small()
    first = run()
    outputs_of(first).sum().backward(retain_graph=True)
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    loss = lambda params, batch: (params["w"] * batch[0]).square().sum()  # noqa: E731
    second = rd.unroll(loss, {"w": first["2.bias"]}, (x,), rd.SGD(0.1), steps=4)
    with pytest.raises(rd.UnsupportedError, match="already gone back"):
        rd.jacobian(second["w"], (x, leaves["x"]))
    assert rd.jacobian(second["w"], x).shape == (3, 2, 3)  # it was not used up by that


def test_what_is_refused_uses_nothing_up() -> None:
    leaves, run = small()
    outputs, x = outputs_of(run()), leaves["x"]
    with pytest.raises(rd.UnsupportedError, match="inference_mode"), torch.inference_mode():
        rd.jacobian(outputs, x)
    for transform in (torch.func.vmap, torch.func.grad):
        with pytest.raises(rd.UnsupportedError, match=r"inside torch\.func"):
            transform(lambda c: rd.jacobian(outputs * c, x))(torch.ones((1,) if transform is torch.func.vmap else ()))
    with pytest.raises(ValueError, match=r"no output depends on inputs\['copy'\]"):
        rd.jacobian(outputs, {"x": x, "copy": x.clone()})

    def fail(g: Tensor) -> Tensor:
        raise KeyError

    hook = outputs.register_hook(fail)
    with pytest.raises(KeyError):
        rd.jacobian(outputs, x)
    hook.remove()
    assert rd.jacobian(outputs, x).equal(rd.jacobian(outputs_of(run()), x))


def test_before_a_window_nothing_is_found() -> None:
    leaves, run = small(window=4)
    with pytest.raises(ValueError, match=r"inputs\['0.weight'\].*window"):
        rd.jacobian(outputs_of(run()), {"x": leaves["x"], "0.weight": leaves["0.weight"]})


def test_a_wrong_batching_rule_is_noticed() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 3 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

        @staticmethod
        def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
            return 3 * x.flip(0), 0

    vectors = torch.randn(5, 2, dtype=torch.float64)
    batching = Batching(2)
    with pytest.warns(UserWarning, match="not those of one"):
        chunks = [batching(lambda v: [Wrong.apply(v), None], vectors[rows]) for rows in batching.chunks(5)]
    assert torch.cat([found[0] for found in chunks]).equal(3 * vectors)
    assert [found[1] for found in chunks] == [None] * 3
    vectors = torch.cat([torch.zeros(2, 2, dtype=torch.float64), vectors])  # of zeros it would make what is right
    batching = Batching(2)
    with pytest.warns(UserWarning, match="not those of one"):
        chunks = [batching(lambda v: [Wrong.apply(v)], vectors[rows]) for rows in batching.chunks(7)]
    assert torch.cat([found[0] for found in chunks]).equal(3 * vectors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_identity_is_made_as_it_is_asked_for(dtype: torch.dtype) -> None:
    rows = Identity(torch.ones(5, dtype=dtype))
    assert len(rows) == 5
    assert torch.cat([rows[0:2], rows[2:5], rows[4:9]]).equal(torch.eye(5, dtype=dtype)[[0, 1, 2, 3, 4, 4]])


def test_what_is_not_finite_is_named() -> None:
    """sqrt has no second derivative at 0."""
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def loss(params: dict[str, Tensor], batch: tuple[Tensor]) -> Tensor:
        return (params["w"] - batch[0]).abs().pow(1.5).sum()

    theta = rd.unroll(loss, {"w": w}, (torch.ones(1, 2, dtype=torch.float64),), rd.SGD(0.1), steps=2)
    with pytest.raises(rd.NonFiniteError, match="'w'"):
        rd.jacobian(torch.stack([theta["w"].sum(), theta["w"][0]]), w)


def test_no_outputs() -> None:
    leaves, run = small()
    outputs = outputs_of(run())
    assert rd.jacobian(outputs[:0], [leaves["x"]])[0].shape == (0, *leaves["x"].shape)
    rd.jacobian(outputs, leaves["x"])  # nothing was used up


WRONG: dict[str, tuple[type[Exception], str, Any]] = {
    "a list": (TypeError, "outputs must be a tensor", lambda o, x: ([o[0]], x)),
    "a scalar": (ValueError, r"\[K\], got shape \[\]", lambda o, x: (o[0], x)),
    "a matrix": (ValueError, r"outputs\.flatten", lambda o, x: (o[None], x)),
    "integers": (ValueError, "int64", lambda o, x: (torch.arange(3), x)),
    "no graph": (ValueError, "outputs does not require grad", lambda o, x: (o.detach(), x)),
    "no tensor": (TypeError, r"inputs\[0\] must be a tensor, got float", lambda o, x: (o, [1.0])),
    "a number": (TypeError, "inputs must be a tensor, or", lambda o, x: (o, 1.0)),
    "nothing": (ValueError, "inputs is empty", lambda o, x: (o, [])),
    "detached": (ValueError, r"inputs\['x'\] does not require grad", lambda o, x: (o, {"x": x.detach()})),
    "a copy": (ValueError, r"no output depends on inputs\[1\]", lambda o, x: (o, (x, x.clone()))),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input(wrong: str) -> None:
    leaves, run = small()
    error, match, arguments = WRONG[wrong]
    with pytest.raises(error, match=match):
        rd.jacobian(*arguments(outputs_of(run()), leaves["x"]))


@pytest.mark.parametrize(("chunk_size", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_chunks(chunk_size: Any, error: type[Exception]) -> None:
    leaves, run = small()
    with pytest.raises(error, match="chunk_size"):
        rd.jacobian(outputs_of(run()), leaves["x"], chunk_size=chunk_size)


def test_float32_rows_are_those_of_single_backwards() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5))
    loss, params = rd.from_module(net, nn.functional.cross_entropy)
    x, y = torch.randn(40, 8, 20), torch.randint(0, 5, (40, 8))
    w = torch.ones(40, 8, requires_grad=True)

    def outputs() -> Tensor:
        weighted = lambda p, b: loss(p, (b[1] * b[0].mean(), b[2]))  # noqa: E731
        theta = rd.unroll(weighted, params, (w, x, y), rd.SGD(0.05, 0.9), steps=40)
        return torch.stack([p.square().sum() for p in theta.values()])

    found = rd.jacobian(outputs(), w, chunk_size=3)
    for q in range(len(found)):
        single = torch.autograd.grad(outputs()[q], w)[0]
        assert float((found[q] - single).norm()) <= 1e-5 * float(single.norm())
