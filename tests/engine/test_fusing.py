"""All moves of a step in one kernel, interpreted on the CPU, against the moves themselves; and what it compiles to."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from revdistill.engine.integers import select
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.integers.fused import Fused
from revdistill.engine.integers.history import DeviceHistory
from revdistill.engine.integers.loops import LOOPS
from revdistill.engine.integers.snapshot import Snapshot
from revdistill.engine.integers.state import THETA, State
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.moves import Decay
from revdistill.engine.optimizers.update import Update
from revdistill.engine.static import fusing
from revdistill.engine.static.fusing import FusedMoves, flat_head, moves_of
from revdistill.engine.static.made import Moves
from revdistill.engine.static.rows import DeviceNumbers, NoRowsError
from tests.engine import interpreted, ptx
from tests.engine.small import CE, data, total
from tests.engine.test_moves import LAYOUT, OPTIMIZERS, STEPS, groups

pytestmark = pytest.mark.imitated

CPU = torch.device("cpu")
MADE = 3  # steps; the first one eagerly, as a replayed training's is
FLOATS = [torch.float32, torch.float64]
STACK = Layout(("w", "b"), (torch.Size([3, 2]), torch.Size([3, 1])), torch.float64, CPU, 3)
OWN = {
    "groups that all shorten": lambda: rd.SGD(
        groups(0.1, 0.3), groups(0.7, 0.9), dampening=0.2, weight_decay=groups(0.03, 0.1)
    ),
    "dampening": lambda: rd.SGD(0.1, 0.9, dampening=0.3, weight_decay=0.05),
    "amsgrad with eps_root": lambda: rd.AdamW(0.01, amsgrad=True, eps_root=1e-7, weight_decay=0.1),
}
ALL = OPTIMIZERS | OWN
NO_ROWS = {"sgd, groups"}  # a momentum is 0 in one group only


def stacked() -> Update:
    rates = torch.linspace(0.1, 0.3, STEPS * 3, dtype=torch.float64).reshape(STEPS, 3)
    update: Update = rd.SGD(rates, 0.9).resolve(STACK, STEPS)
    return update


def update_of(name: str) -> Update:
    update: Update = stacked() if name == "stack" else ALL[name]().resolve(LAYOUT, STEPS)
    return update


def gradients(numel: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(numel, generator=draw, dtype=torch.float64) * 10.0 ** (2 - 3 * k)).to(dtype) for k in range(MADE)
    ]


def begun(update: Update, gradient: Tensor) -> State:
    """After a first step, made eagerly."""
    draw = torch.Generator().manual_seed(0)
    theta = FixedPoint().from_float(torch.randn(update.layout.numel, generator=draw, dtype=torch.float64))
    state = update.initial_state(theta, FixedPoint(), DeviceHistory(), LOOPS)
    for move in update.moves:
        move.forward(0, state, gradient)
    return state


def contents(state: State) -> dict[str, Tensor]:
    heads = {f"head of {name}": flat_head(stores) for name, stores in state.stores.items()}
    return {name: t.clone() for name, t in (state.numbers | heads).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def spill(update: Update, k: int, state: State) -> None:
    for move in update.moves:
        for v, store, n in move.parts(k, state) if isinstance(move, Decay) else ():
            store.make_room(v, n)


def unspill(update: Update, k: int, state: State) -> None:
    for move in reversed(update.moves):
        for v, store, n in reversed(move.parts(k, state)) if isinstance(move, Decay) else ():
            store.take_back(v, n)


ROWS = [*(name for name in ALL if name not in NO_ROWS), "stack"]


@pytest.mark.parametrize(("name", "dtype"), [(name, FLOATS[i % 2]) for i, name in enumerate(ROWS)])
def test_steps_are_made_and_undone_to_the_bit(name: str, dtype: torch.dtype) -> None:
    update = update_of(name)
    g = gradients(update.layout.numel, dtype)
    expected, state = begun(update, g[0]), begun(update, g[0])
    numbers = DeviceNumbers(update, STEPS, CPU)
    state.backend = interpreted.fused()
    moves, past = numbers.update, [contents(expected)]
    forward = FusedMoves(moves.moves, state, back=False)
    theta, notes = torch.empty(update.layout.numel, dtype=dtype), (torch.tensor(7), torch.tensor(7.0).double())
    for k in range(1, MADE):
        for move in update.moves:
            move.forward(k, expected, g[k])
        past.append(contents(expected))
        numbers.go_to(k)
        numbers.begin()
        spill(update, k, state)
        forward.run(g[k], theta, notes)
        assert_same(contents(state), past[-1])
        assert torch.equal(theta, expected.floats(THETA, dtype))
        assert int(notes[0]) == LOOPS.fingerprint(g[k])
        assert float(notes[1]) == LOOPS.largest(g[k])
    reasons = [move.irreversible for move in update.moves if move.irreversible]
    if reasons:
        with pytest.raises(ValueError, match=reasons[0]):
            FusedMoves(moves.moves[::-1], state, back=True).run(g[-1])
        return
    blind, seeing = (FusedMoves(part[::-1], state, back=True) for part in (moves.blind, moves.seeing))
    for k in reversed(range(1, MADE)):
        numbers.go_to(k)
        numbers.begin()
        blind.run(None, theta)
        assert torch.equal(theta, state.floats(THETA, dtype))
        seeing.run(g[k])
        unspill(update, k, state)
        assert_same(contents(state), past[k - 1])


@pytest.mark.parametrize("name", sorted(NO_ROWS))
def test_the_others_have_no_rows(name: str) -> None:
    with pytest.raises(NoRowsError):
        DeviceNumbers(update_of(name), STEPS, CPU)


def made(name: str = "adamw") -> tuple[FusedMoves, State]:
    update = update_of(name)
    state = begun(update, gradients(update.layout.numel, torch.float32)[0])
    numbers = DeviceNumbers(update, STEPS, CPU)
    numbers.go_to(1)
    numbers.begin()
    spill(update, 1, state)
    state.backend = interpreted.fused()
    return FusedMoves(numbers.update.moves, state, back=False), state


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # numpy's of integers, as the moves go on
@pytest.mark.parametrize("entry", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_notes_tell_of_what_is_no_number(entry: float, dtype: torch.dtype) -> None:
    moves, _ = made("sgd, no momentum")
    gradient, notes = gradients(10, dtype)[1], (torch.tensor(0), torch.tensor(0.0).double())
    gradient[6] = entry
    moves.run(gradient, notes=notes)
    assert int(notes[0]) == LOOPS.fingerprint(gradient)
    assert float(notes[1]) == math.inf if math.isinf(entry) else math.isnan(float(notes[1]))


def test_the_kernel_is_made_once_and_can_be_read() -> None:
    (first, _), (second, _) = made(), made()
    sources = [moves._source(torch.float32, True, True) for moves in (first, second)]
    assert sources[0][0] == sources[1][0]
    kernels = interpreted.kernels()
    function = fusing._compiled(sources[0][0], kernels)
    assert fusing._compiled(sources[1][0], kernels) is function
    text = inspect.getsource(function.fn)
    assert '"""RowDecay m, RowDecay s, Add m, Add s, RowDecay theta, Add theta."""' in text
    assert "q_m_high, q_m_low, head_m = multiplied_wide(q_m_high, q_m_low, head_m, row" in text
    assert "q_theta, head_theta = multiplied(q_theta, head_theta, row" in text
    loads = [line.split(" = ")[0].strip() for line in text.splitlines() if " = tl.load(" in line]
    assert len(loads) == len(set(loads))


def test_numbers_that_float32_has_not_come_from_memory() -> None:
    """Triton may take a literal for a float32."""
    moves, _ = made("dampening")
    source, arguments = moves._source(torch.float32, False, False)
    assert arguments["constants_at"].tolist() == [1 - 0.3]
    assert "0.7" not in source
    assert "constants_at" not in made("sgd")[0]._source(torch.float32, False, False)[1]


def test_a_launch_that_fails_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: str, kernels: object) -> Any:
        raise OSError("no compiler")

    g = gradients(10, torch.float32)[1]
    (moves, state), (whole, expected) = made(), made()
    theta, notes = torch.empty(10), (torch.tensor(7), torch.tensor(7.0).double())
    whole.run(g)
    monkeypatch.setattr(fusing, "_compiled", fails)
    with pytest.warns(rd.CompileWarning, match=r"one kernel for all moves of a step cannot be used \(OSError: no comp"):
        moves.run(g, theta, notes)
    assert_same(contents(state), contents(expected))
    assert torch.equal(theta, expected.floats(THETA, torch.float32))
    assert (int(notes[0]), float(notes[1])) == (LOOPS.fingerprint(g), LOOPS.largest(g))
    moves.run(g)  # without a second warning
    Moves.run(whole, g)
    assert_same(contents(state), contents(expected))


def test_a_gradient_that_is_needed_is_asked_for() -> None:
    moves, state = made()
    before = Snapshot(state, with_slots=True)
    with pytest.raises(ValueError, match="gradient: needed by these moves or for notes, got None"):
        moves.run(None)
    assert not before.differs(state)


def test_operands_of_another_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient may be one number for all; what is wrong is named; memory that moved is found."""
    (moves, state), (others, expected) = made("sgd"), made("sgd")
    one = torch.tensor(0.5).expand(10)
    moves.run(one, torch.empty(10))
    others.run(one.contiguous())
    assert_same(contents(state), contents(expected))
    with pytest.raises(ValueError, match=r"gradient: needs the shape of theta's numbers, got \[9\]"):
        moves.run(one[:9])
    for out in (torch.empty(20)[::2], torch.empty(9)):
        with pytest.raises(ValueError, match="theta_out: needs 10 numbers without gaps, got shape"):
            moves.run(one, out)
    for name, q in state.numbers.items():
        state.numbers[name] = q.clone()
    (store,) = state.stores["v"]
    before, store.head = store.head, store.head.clone()
    kept = before.clone()
    moves.run(one)
    others.run(one.contiguous())
    assert_same(contents(state), contents(expected))
    assert torch.equal(before, kept)


def test_who_has_no_kernels_makes_moves_one_by_one() -> None:
    update = update_of("sgd")
    state = begun(update, gradients(10, torch.float32)[0])
    moves = DeviceNumbers(update, STEPS, CPU).update.moves
    assert type(moves_of(moves, state, back=False)) is Moves
    with pytest.raises(ValueError, match="fused moves need the backend Fused, got Loops"):
        FusedMoves(moves, state, back=False)
    state.backend = interpreted.fused()
    assert type(moves_of(moves, state, back=True)) is FusedMoves
    assert type(moves_of((), state, back=True)) is Moves


def test_kernels_compile_to_exact_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For GPUs that are not there; the step forward with all that may be asked of it, and the step back."""
    interpreted.needs_triton()
    cases: dict[str, ptx.Case] = {}
    types = {torch.int64: "*i64", torch.float32: "*fp32", torch.float64: "*fp64"}
    texts = []
    for name in ("sgd", "adamw"):
        moves, state = made(name)
        for back in (False, True):
            way = FusedMoves(moves._moves[::-1] if back else moves._moves, state, back=back)
            source, arguments = way._source(torch.float32, True, not back)
            called = {"gradient_at": "*fp32", "theta_out_at": "*fp32", "numel": "i64"}
            called |= {} if back else {"fingerprint_at": "*i64", "largest_at": "*i64"}
            kernel = f"moves{len(texts)}"
            texts.append(source.replace("def moves(", f"@triton.jit\ndef {kernel}("))
            arguments_types = {argument: types[t.dtype] for argument, t in arguments.items()}
            case = kernel, arguments_types | called, {"BLOCK": fusing.BLOCK}, [ptx.TARGETS[back]]
            cases[f"{name} {'back' if back else 'forward'}"] = case
    (tmp_path / "written.py").write_text("\n\n".join(["from revdistill.engine.integers.kernels import *", *texts]))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = ptx.compiled("written", cases, tmp_path)
    assert len(found) == 4
    for name, text in found.items():
        roots = ["sqrt.rn.f64", "div.rn.f64"] if "adamw" in name else ["div.rn.f64"]
        ptx.assert_exact(text, expected=[*roots, "mul.rn.f64", "cvt.rzi.s64.f64", "cvt.rn.f32.f64"])


def test_heads_that_do_not_lie_in_a_row_are_refused() -> None:
    update = update_of("groups that all shorten")
    stores = begun(update, gradients(10, torch.float32)[0]).stores["v"]
    flat_head(stores).copy_(torch.arange(10))
    assert torch.cat([store.head for store in stores]).tolist() == list(range(10))
    stores[1].head = stores[1].head.clone()
    with pytest.raises(ValueError, match="heads of one tensor's bit stores do not lie in a row"):
        flat_head(stores)


def test_a_whole_unroll_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eagerly each operation is one, replayed each step; both ways have the CPU's bits."""
    launches, launched = [], FusedMoves._launched
    monkeypatch.setattr(FusedMoves, "_launched", lambda *args: launches.append(launched(*args)) or launches[-1])
    torch.manual_seed(2)
    loss, params = rd.from_module(nn.Sequential(nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3)), CE)
    batches = data(16)  # each as aligned as a new tensor is: the CPU's products have other bits elsewhere

    def run(**kwargs: Any) -> tuple[dict[str, Tensor], Tensor]:
        lr = torch.full((6,), 0.01, dtype=torch.float64, requires_grad=True)
        theta = rd.unroll(loss, params, batches, rd.AdamW(lr), steps=6, seed=1, **kwargs)
        (found,) = torch.autograd.grad(total(theta), lr)
        return {name: p.detach() for name, p in theta.items()}, found

    expected, gradient = run()
    for kwargs in ({}, {"compile": "graphs"}):
        backend = Fused(interpreted.kernels(), 64, 64)
        with select.using(backend):
            theta, found = run(**kwargs)
        assert_same(theta, expected)
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=0)
        assert not backend.given_up
        assert all(launches)
        assert bool(launches) == bool(kwargs)
