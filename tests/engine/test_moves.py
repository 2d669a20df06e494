"""The moves of every optimizer: their order, what is undone before the gradient is known, and each against itself:
forward, inverse, value in floats, derivative, bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import revdistill as rd
from revdistill.engine.integers.fixedpoint import LOW_BITS, FixedPoint
from revdistill.engine.integers.history import DeviceHistory
from revdistill.engine.integers.loops import LOOPS
from revdistill.engine.integers.state import State
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.hyperparameters import resolve
from revdistill.engine.optimizers.moves import Add, Decay, Move, RunningMaximum
from revdistill.engine.optimizers.sources import GRADIENT, THETA, Bars, Differentiable, Read
from revdistill.engine.optimizers.update import Update
from tests.engine.small import CE, data, mlp

STEPS, SEEDS = 12, range(4)
LAYOUT = Layout(("a", "b"), (torch.Size([4]), torch.Size([2, 3])), torch.float64, torch.device("cpu"))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def schedule(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, STEPS, dtype=torch.float64).requires_grad_()


def groups(a: Any, b: Any) -> dict[str, Any]:
    return {"a": a, "b": b}


# Everything that an optimizer can be asked for, once with a gradient for each hyperparameter and once in groups.
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: rd.SGD(0.1, 0.9),
    "sgd, decay": lambda: rd.SGD(number(0.1), schedule(0.4, 0.9), dampening=0.3, weight_decay=number(0.05)),
    "sgd, no momentum": lambda: rd.SGD(schedule(0.1, 0.2), 0.0),
    "sgd, groups": lambda: rd.SGD(
        groups(schedule(0.1, 0.2), 0.3), groups(0.0, number(0.9)), dampening=0.2, weight_decay=groups(0.0, number(0.1))
    ),
    "nesterov": lambda: rd.SGD(0.1, 0.9, nesterov=True),
    "nesterov, decay": lambda: rd.SGD(schedule(0.1, 0.2), number(0.8), nesterov=True, weight_decay=schedule(0.1, 0.0)),
    "adam": lambda: rd.Adam(0.01),
    "adam, decay": lambda: rd.Adam(
        number(0.01), (schedule(0.7, 0.9), number(0.99)), schedule(1e-3, 1e-2), schedule(0.1, 0.2)
    ),
    "adam, groups": lambda: rd.Adam(
        groups(0.01, schedule(0.1, 0.2)), (groups(0.5, number(0.9)), 0.99), groups(1e-3, number(0.1)), groups(0.0, 0.1)
    ),
    "amsgrad": lambda: rd.Adam(number(0.01), (number(0.9), number(0.7)), number(1e-3), amsgrad=True),
    "adamw": lambda: rd.AdamW(number(0.01), (0.9, 0.999), number(1e-3), number(0.1)),
    "adamw, groups": lambda: rd.AdamW(
        groups(0.01, schedule(0.1, 0.2)), (0.8, groups(0.9, number(0.99))), 1e-3, groups(number(0.3), 0.0)
    ),
    "rmsprop": lambda: rd.RMSprop(number(0.01), number(0.9), number(1e-3), number(0.1)),
    "rmsprop, momentum": lambda: rd.RMSprop(0.01, 0.99, momentum=0.9),
    "rmsprop, centered": lambda: rd.RMSprop(
        schedule(0.01, 0.02), number(0.9), schedule(0.1, 0.2), number(0.1), number(0.5), centered=True
    ),
    "rmsprop, groups": lambda: rd.RMSprop(
        groups(0.01, number(0.1)), groups(0.9, schedule(0.8, 0.9)), groups(0.1, number(0.2)), momentum=groups(0.5, 0.9)
    ),
}
IRREVERSIBLE = {
    "nesterov": "nesterov=True",
    "nesterov, decay": "nesterov=True",
    "amsgrad": "amsgrad=True",
    "rmsprop": "momentum=0",
}
every = pytest.mark.parametrize("name", OPTIMIZERS)


def update_of(name: str) -> Update:
    update: Update = OPTIMIZERS[name]().resolve(LAYOUT, STEPS)
    return update


# The order of the moves


def decay(target: str = "v") -> Decay:
    table = resolve("momentum", 0.9, LAYOUT, STEPS, stackable=False)
    return Decay(target, "momentum", table, LAYOUT)


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ((Add("v", Read(GRADIENT)), decay()), "v must decay before anything else is done to it"),
        ((Add(THETA, Read("v")), decay(THETA)), "theta must decay before"),
        ((decay(), decay()), "v must decay before"),
        ((Add(THETA, Read("v")), Add("v", Read(GRADIENT))), r"reads \['v'\], which a later one changes"),
        ((Add("w", Read("v")), decay("v")), r"reads \['v'\], which a later one changes"),
        ((RunningMaximum("peak", "s", ""), Add("s", Read(GRADIENT))), r"reads \['s'\], which a later one changes"),
        ((Add(THETA, Read(GRADIENT)), Add("v", Read(THETA))), "reads theta after an earlier one has changed it"),
        ((decay(THETA), Add("v", Read(THETA))), "reads theta after an earlier one has changed it"),
        ((decay(THETA), Add(THETA, Read(THETA))), "reads theta after an earlier one has changed it"),
    ],
)
def test_an_order_that_derivatives_could_not_be_taken_in_is_refused(moves: tuple[Move, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Update(LAYOUT, {}, moves)


def test_an_order_that_is_right_is_taken() -> None:
    moves = (decay(), Add("v", Read(THETA)), decay(THETA), Add(THETA, Read("v")))
    update = Update(LAYOUT, {}, moves)
    assert update.slots == ("v",)
    assert update.before_the_step == moves[:1]


SPLITS = {
    "sgd": (["Decay v", "Add v"], ["Add theta"]),
    "sgd, decay": (["Decay v", "Add v", "Add v"], ["Add theta"]),
    "nesterov": (["Decay v", "Add v", "Add theta"], ["Add theta"]),
    "nesterov, decay": (["Decay v", "Add v", "Add v", "Add theta", "Add theta"], ["Add theta"]),
    "adam": (["Decay m", "Decay s", "Add m", "Add s"], ["Add theta"]),
    "adam, decay": (["Decay m", "Decay s", "Add m", "Add m", "Add s"], ["Add theta"]),
    "adamw": (["Decay m", "Decay s", "Add m", "Add s"], ["Decay theta", "Add theta"]),
    "amsgrad": (["Decay m", "Decay s", "Add m", "Add s"], ["RunningMaximum s_max", "Add theta"]),
    "rmsprop": (["Decay s", "Add s", "Add theta"], []),
    "rmsprop, momentum": (["Decay s", "Add s", "Decay b", "Add b"], ["Add theta"]),
    "rmsprop, centered": (["Decay s", "Add s", "Decay a", "Add a", "Decay b", "Add b"], ["Add theta"]),
}


@pytest.mark.parametrize("name", SPLITS)
def test_what_is_undone_before_the_gradient_is_known(name: str) -> None:
    update = update_of(name)
    found = [[f"{type(m).__name__} {m.target}" for m in moves] for moves in (update.seeing, update.blind)]
    assert tuple(found) == SPLITS[name]
    assert update.seeing + update.blind == update.moves
    assert not any({GRADIENT, THETA} & set(move.reads) for move in update.blind)


@every
def test_a_step_without_a_way_back_names_what_the_user_gave(name: str) -> None:
    reason = update_of(name).no_way_back
    assert (reason is None) == (name not in IRREVERSIBLE)
    if reason is None:
        return
    assert reason.startswith(f"{IRREVERSIBLE[name]}: its ")
    loss, params = rd.from_module(mlp(), CE)
    with pytest.raises(rd.UnsupportedError, match=f"{IRREVERSIBLE[name]}: its .*rd.Checkpoint"):
        rd.unroll(loss, params, data(5), OPTIMIZERS[name](), steps=STEPS, adjoint=rd.Reversible())


def test_a_move_that_the_user_did_not_name_is_described() -> None:
    update = Update(LAYOUT, {}, (decay(), Add(THETA, Read(GRADIENT))))
    assert update.no_way_back is not None
    assert update.no_way_back.startswith("a change of theta needs the gradient")


# Each move by itself


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradient_of(k: int, seed: int) -> Tensor:
    """Elements that grow or shrink from step to step, each by its own factor, and change their sign."""
    draw = drawn(1000 * seed + k)
    growth = torch.linspace(0.3, 2.0, LAYOUT.numel, dtype=torch.float64)
    sign = torch.randint(0, 2, (LAYOUT.numel,), generator=draw) * 2 - 1 if seed % 2 else 1
    return growth**k * (1 + 0.1 * torch.rand(LAYOUT.numel, generator=draw, dtype=torch.float64)) * sign


def reached(update: Update, steps: int, seed: int) -> State:
    """A state that training reaches: words in the bit stores' heads, s no smaller than the gradients make it."""
    start = FixedPoint().from_float(torch.randn(LAYOUT.numel, dtype=torch.float64, generator=drawn(seed)))
    state = update.initial_state(start, FixedPoint(), DeviceHistory(), LOOPS)
    for k in range(steps):
        for move in update.moves:
            move.forward(k, state, gradient_of(k, seed))
    return state


def anywhere(update: Update, seed: int) -> State:
    """Numbers drawn from the whole range, up to 16 or so in their unit; second moments at least 0."""
    state, draw = reached(update, 3, seed), drawn(seed + 100)
    for name, q in state.numbers.items():
        low = 0 if name in ("s", "s_max") else -(2**48)
        if q.ndim == 1:
            q.copy_(torch.randint(low, 2**48, q.shape, generator=draw))
            continue
        q[0].copy_(torch.randint(low >> 10, 2**38, q[0].shape, generator=draw))
        q[1].copy_(torch.randint(0, 2**LOW_BITS, q[1].shape, generator=draw))
    return state


def everything(state: State) -> dict[str, Any]:
    """All that a state is made of."""
    parts = {name: q.tolist() for name, q in state.numbers.items()}
    stores = {name: [(s.head.tolist(), s._bound, len(s)) for s in stores] for name, stores in state.stores.items()}
    return parts | {f"stores of {name}": kept for name, kept in stores.items()}


@pytest.mark.parametrize("seed", SEEDS)
@every
def test_the_inverse_of_each_move_gives_back_every_bit(name: str, seed: int) -> None:
    update = update_of(name)
    state, gradient = anywhere(update, seed), gradient_of(3, seed)
    for move in update.moves:
        before = everything(state)
        move.forward(3, state, gradient)
        if move.irreversible is None:
            move.inverse(3, state, gradient)
            assert everything(state) == before
            move.forward(3, state, gradient)
        elif isinstance(move, RunningMaximum):
            with pytest.raises(NotImplementedError, match="amsgrad=True: its maximum forgets"):
                move.inverse(3, state, gradient)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in IRREVERSIBLE])
def test_whole_steps_go_back_without_the_gradient_and_then_with_it(name: str, seed: int) -> None:
    update = update_of(name)
    state, seen = anywhere(update, seed), []
    for k in range(STEPS):
        seen.append(everything(state))
        for move in update.moves:
            move.forward(k, state, gradient_of(k % 4, seed))
    for k in reversed(range(STEPS)):
        for move in reversed(update.blind):
            move.inverse(k, state, None)
        assert state.numbers[THETA].tolist() == seen[-1][THETA]
        for move in reversed(update.seeing):
            move.inverse(k, state, gradient_of(k % 4, seed))
        assert everything(state) == seen.pop()


def floats(state: State, gradient: Tensor) -> dict[str, Tensor]:
    return {name: state.floats(name) for name in state.numbers} | {GRADIENT: gradient}


@pytest.mark.parametrize("seed", SEEDS)
@every
def test_the_value_of_each_move_is_what_it_does_to_the_integers(name: str, seed: int) -> None:
    """To two units of the format, and float64's own precision."""
    update = update_of(name)
    for state, k in ((anywhere(update, seed), 3), (reached(update, 5, seed), 5), (reached(update, 0, seed), 0)):
        gradient = gradient_of(k, seed)
        for move in update.moves:
            before = floats(state, gradient)
            expected = move.value(before, Differentiable(k, torch.float64))
            move.forward(k, state, gradient)
            after = floats(state, gradient)
            size = before[move.target].abs() + expected.detach().abs()
            off = (after.pop(move.target) - expected.detach()).abs()
            assert (off <= 2 * state.formats[move.target].resolution + 1e-13 * size).all(), move
            assert all(torch.equal(x, before[other]) for other, x in after.items())


@pytest.mark.parametrize("seed", SEEDS)
@every
def test_the_derivative_of_each_move_is_autograds_through_its_value(name: str, seed: int) -> None:
    """With no more values than `vjp_reads` asks for."""
    update = update_of(name)
    learned = {n: t for n, t in update.tables.items() if t.values.requires_grad}
    for state, k in ((anywhere(update, seed), 3), (reached(update, 5, seed), 5)):
        gradient, draw = gradient_of(k, seed), drawn(seed)
        for move in update.moves:
            values = {n: x.clone().requires_grad_() for n, x in floats(state, gradient).items()}
            rows = {n: t.row_of(k, t.values.detach()).clone().requires_grad_() for n, t in learned.items()}
            bars = {n: torch.randn(LAYOUT.numel, dtype=torch.float64, generator=draw) for n in values}
            step = Differentiable(k, torch.float64, {id(t): rows[n] for n, t in learned.items()})
            inputs = values | rows
            through = torch.autograd.grad(
                move.value(values, step), list(inputs.values()), bars[move.target], allow_unused=True
            )
            expected = {
                n: torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(inputs, through, strict=True)
            }
            for n in values.keys() - {move.target}:  # what is read keeps its own; the target has a new value
                expected[n] = expected[n] + bars[n]

            mine = Bars(
                {n: b.clone() for n, b in bars.items()}, {n: torch.zeros_like(t.values) for n, t in learned.items()}
            )
            seen = move.vjp_reads(frozenset(learned))
            move.vjp(k, {n: x.detach().clone() for n, x in values.items() if n in seen}, mine)
            found = mine.flat | {n: t.row_of(k, mine.tables[n]) for n, t in learned.items()}
            assert found.keys() == expected.keys()
            for n, theirs in expected.items():
                tiny = 1e-12 * float(theirs.abs().max())  # where terms cancel
                assert torch.allclose(found[n], theirs, rtol=1e-9, atol=tiny), f"{n} by {move}"
            move.forward(k, state, gradient)


@pytest.mark.parametrize("seed", SEEDS)
@every
def test_the_bound_of_each_move_holds(name: str, seed: int) -> None:
    """From zero slots on, for gradients that grow, shrink and change their sign."""
    update = update_of(name)
    state = reached(update, 0, seed)
    for k in range(STEPS):
        gradient = gradient_of(k, seed)
        for move in update.moves:
            bounds = {n: float(x.abs().max()) for n, x in floats(state, gradient).items()}
            bound = move.bound(k, bounds, state.formats[move.target].resolution)
            move.forward(k, state, gradient)
            assert bound < state.formats[move.target].limit
            assert float(state.floats(move.target).abs().max()) <= bound, (move, k)
