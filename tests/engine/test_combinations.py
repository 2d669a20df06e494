"""Any arguments together: value and hypergradient are those of a loop in float64 that is written here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import revdistill as rd
from tests.engine.reference import quantised

Params = dict[str, Tensor]
F64 = torch.float64
OPTIMIZERS = {"sgd": rd.SGD, "adam": rd.Adam, "adamw": rd.AdamW, "rmsprop": rd.RMSprop}
ADJOINTS: list[Any] = [
    rd.Reversible(),
    rd.Reversible(graph_bytes=0),
    rd.Reversible(history="host", graph_bytes=4000),
    rd.Checkpoint(every=2),
    rd.StoreAll(),
    rd.Backprop(),
]
SLOTS = {"sgd": ["v"], "adam": ["m", "s"], "adamw": ["m", "s"], "rmsprop": ["s", "b"]}
THEIRS = {"v": "momentum_buffer", "m": "exp_avg", "b": "momentum_buffer", "s_max": "max_exp_avg_sq", "a": "grad_avg"}


@dataclass
class Drawn:
    """What an unroll is given. networks: stacked, or 1; begun: the averages at the start, by the engine's names."""

    kind: str
    steps: int
    taken: int
    networks: int
    unused: bool
    params: Params
    batches: tuple[Tensor, ...]
    hyper: Tensor
    settings: dict[str, Any]
    begun: dict[str, Params]
    options: dict[str, Any]
    leaves: list[Tensor] = field(default_factory=list)

    def loss(self, p: Params, batch: tuple[Tensor, ...], hyper: Tensor) -> Tensor:
        value = hyper * (torch.tanh(batch[0] * p["w"]) + p["b"]).square().mean() * max(1, self.networks)
        return value if self.unused else value + 0.1 * (p["u"] - p["w"].mean(-1)).square().sum()

    @property
    def has_way_back(self) -> bool:
        momentum = self.settings.get("momentum", 0.0)
        still = self.kind == "rmsprop" and isinstance(momentum, float) and not momentum
        return not (self.settings.get("nesterov") or self.settings.get("amsgrad") or still)


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    kind, steps = draw(st.sampled_from(sorted(OPTIMIZERS))), draw(st.integers(1, 5))
    networks, taken = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([0, 3]))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    leaves: list[Tensor] = []

    def wanting(t: Tensor, p: bool = True) -> Tensor:
        if p and draw(st.booleans()):
            leaves.append(t.requires_grad_())
        return t

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=F64, generator=noise)

    def one(low: float, high: float, zero: bool) -> float:
        drawn_zero = zero and draw(st.integers(0, 3)) == 0
        return 0.0 if drawn_zero else low + (high - low) * float(torch.rand((), generator=noise))

    def value(low: float, high: float, *, zero: bool = False, stackable: bool = False) -> Any:
        form = draw(st.sampled_from(["float", "[]", "[T]", "[T, E]", "function"]))
        if form == "[]":
            return wanting(torch.tensor(one(low, high, zero), dtype=F64))
        if form == "[T]":
            return wanting(torch.tensor([one(low, high, zero) for _ in range(steps)], dtype=F64))
        if form == "[T, E]" and stackable and networks > 1:
            return wanting(torch.tensor([[one(low, high, zero) for _ in range(2)] for _ in range(steps)], dtype=F64))
        if form == "function":
            numbers = [one(low, high, zero) for _ in range(taken + steps)]
            return numbers.__getitem__
        return one(low, high, zero)

    def groups(*range_: float, **options: bool) -> Any:
        return (
            {n: value(*range_, **options) for n in params}
            if draw(st.integers(0, 3)) == 0
            else value(*range_, **options)
        )

    shape = (networks,) if networks > 1 else ()
    params = {n: wanting(randn(*shape, *own)) for n, own in (("w", (2,)), ("u", ()), ("b", (2,)))}
    own: dict[str, Any] = {"lr": groups(0.01, 0.1, stackable=True)}
    if draw(st.booleans()):
        own["weight_decay"] = groups(0.01, 0.3, zero=True)
    if draw(st.integers(0, 2)) == 0:
        own["max_norm"] = value(0.05, 1.0, stackable=True)
    slots = list(SLOTS[kind])
    if kind == "sgd":
        own["nesterov"] = draw(st.integers(0, 3)) == 0
        own["momentum"] = groups(0.3, 0.95)
        own["dampening"] = 0.0 if own["nesterov"] else 0.3
    elif kind == "rmsprop":
        own |= {"alpha": groups(0.5, 0.99), "eps": groups(0.05, 0.2), "centered": draw(st.booleans())}
        has_momentum = draw(st.integers(0, 3)) > 0
        own["momentum"] = groups(0.3, 0.95) if has_momentum else 0.0
        slots = [*(["s", "a"] if own["centered"] else ["s"]), *(["b"] if has_momentum else [])]
    else:
        own |= {
            "betas": (groups(0.3, 0.95), groups(0.5, 0.99)),
            "eps": groups(0.01, 0.1),
            "eps_root": groups(0.01, 0.1),
        }
        own |= {"amsgrad": draw(st.integers(0, 3)) == 0}
        own |= {} if "weight_decay" in own else {"weight_decay": 0.01}
        slots += ["s_max"] if own["amsgrad"] else []
    unused = draw(st.integers(0, 3)) == 0
    begun: dict[str, Params] = {}
    if draw(st.booleans()):
        for slot in slots:
            start = {n: randn(*p.shape) * 0.3 for n, p in params.items()}
            if slot.startswith("s"):
                start = {n: t.abs() + 0.3 for n, t in start.items()}
            start["u"] = torch.zeros_like(start["u"]) if unused else start["u"]
            begun[slot] = {n: wanting(t) for n, t in start.items()}
    options: dict[str, Any] = {"return_state": True}
    if begun or taken:
        names = {"adam": "exp_avg_sq", "adamw": "exp_avg_sq", "rmsprop": "square_avg"}
        of = {names[kind] if slot == "s" else THEIRS[slot]: values for slot, values in begun.items()}
        options["state"] = rd.OptimizerState(taken, of)
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, steps))
    if draw(st.booleans()):
        options["save_at"] = draw(st.lists(st.integers(taken, taken + steps), min_size=1, max_size=3))
    if draw(st.booleans()):
        options["average"] = draw(st.sampled_from([0.5, randn(steps + 1)]))
    batches = (wanting(randn(draw(st.sampled_from([1, 3])), 4, 1, 2) if networks > 1 else randn(2, 4, 2)),)
    hyper = wanting(torch.tensor(1.3, dtype=F64))
    return Drawn(kind, steps, taken, networks, unused, params, batches, hyper, own, begun, options, leaves)


def expected(case: Drawn) -> list[Params]:
    """theta (at save_at), the average where there is one, and the slots, by name."""
    first = max(0, case.steps - case.options.get("window", case.steps))
    own, theta = case.settings, dict(case.params)
    names = [*SLOTS[case.kind], *(["a"] if own.get("centered") else []), *(["s_max"] if own.get("amsgrad") else [])]
    zeros = {n: torch.zeros_like(p) for n, p in theta.items()}
    slots = {slot: dict(case.begun.get(slot, zeros)) for slot in names}
    decay, saved, iterates = case.options.get("average"), {}, [theta]
    for i in range(case.steps):
        if i == first and i:
            theta = {n: p.detach() for n, p in theta.items()}
            slots = {slot: {n: t.detach() for n, t in of.items()} for slot, of in slots.items()}
            iterates = [{n: p.detach() for n, p in t.items()} for t in iterates[:-1]] + [theta]
        saved[i + case.taken] = theta
        theta, slots = one_step(case, i, theta, slots, (lambda t: t) if i >= first else torch.Tensor.detach)
        iterates.append(theta)
    saved[case.steps + case.taken] = theta
    for i in range(first):
        saved[i + case.taken] = iterates[i]
    results = [theta]
    if "save_at" in case.options:
        results = [{n: torch.stack([saved[k][n] for k in case.options["save_at"]]) for n in theta}]
    if decay is not None:
        weights = decay
        if isinstance(decay, float):
            later = [(1 - decay) * decay ** (case.steps - k) for k in range(1, case.steps + 1)]
            weights = torch.tensor([decay**case.steps, *later])
        results.append({n: sum(float(w) * t[n] for w, t in zip(weights, iterates, strict=True)) for n in theta})  # type: ignore[misc]
    return [*results, *(slots[name] for name in sorted(slots))]


def one_step(
    case: Drawn, i: int, theta: Params, slots: dict[str, Params], seen: Callable[[Tensor], Tensor]
) -> tuple[Params, dict[str, Params]]:
    own, k = case.settings, i + case.taken
    leaves = {n: p if p.requires_grad else p.detach().requires_grad_() for n, p in theta.items()}
    batch = seen(case.batches[0][k % len(case.batches[0])])
    value = case.loss(leaves, (batch,), seen(case.hyper))
    found = torch.autograd.grad(value, list(leaves.values()), create_graph=True, allow_unused=True)
    gradients = {n: g for n, g in zip(theta, found, strict=True) if g is not None}

    def at(given: Any, name: str, p: Tensor) -> Any:
        given = given[name] if isinstance(given, dict) else given
        if not isinstance(given, Tensor):
            return given(k) if callable(given) else given
        given = seen(given)
        row = given[i] if given.ndim else given
        return row.reshape(-1, *[1] * (p.ndim - 1)) if row.ndim else row

    if "max_norm" in own:
        squares = [g.square().reshape(case.networks, -1).sum(1) for g in gradients.values()]
        norms = torch.stack(squares).sum(0).sqrt()
        for n, g in gradients.items():
            bound, norm = at(own["max_norm"], n, g), norms.reshape(-1, *[1] * (g.ndim - 1)) if g.ndim else norms[0]
            gradients[n] = g * (bound / (norm + 1e-6)).clamp(max=1.0)
    after, new = dict(theta), {slot: dict(of) for slot, of in slots.items()}
    for n, g in gradients.items():
        p = theta[n]
        lr, decay = at(own["lr"], n, p), at(own.get("weight_decay", 0.0), n, p)
        eps = at(own.get("eps"), n, p)
        if case.kind == "adamw":
            p = p * quantised(torch.as_tensor(1 - lr * decay, dtype=F64), 2**30)
        else:
            g = g + decay * p
        if case.kind == "sgd":
            mu = quantised(at(own["momentum"], n, p))
            damped = bool(i or (case.begun and (case.taken or any(t.any() for t in case.begun["v"].values()))))
            v = new["v"][n] = mu * slots["v"][n] + (1 - own["dampening"] * damped) * g
            change = g + mu * v if own["nesterov"] else v
        elif case.kind == "rmsprop":
            alpha, mu = quantised(at(own["alpha"], n, p), 2**30), quantised(at(own["momentum"], n, p))
            s = new["s"][n] = alpha * slots["s"][n] + (1 - alpha) * g * g
            if own["centered"]:
                a = new["a"][n] = alpha * slots["a"][n] + (1 - alpha) * g
                s = torch.where(s > a * a, s - a * a, 0.0)
            change = new["b"][n] = mu * slots["b"][n] + g / (root(s) + eps)
        else:
            beta1, beta2 = (quantised(at(beta, n, p), 2**30) for beta in own["betas"])
            m = new["m"][n] = beta1 * slots["m"][n] + (1 - beta1) * g
            s = new["s"][n] = beta2 * slots["s"][n] + (1 - beta2) * g * g
            if own["amsgrad"]:
                s = new["s_max"][n] = torch.where(s >= slots["s_max"][n], s, slots["s_max"][n])
            corrected = s / (1 - beta2 ** (k + 1)) + at(own["eps_root"], n, p)
            change = m / (1 - beta1 ** (k + 1)) / (root(corrected) + eps)
        after[n] = p - lr * change
    return after, new


def root(x: Tensor) -> Tensor:
    """With derivative 0 at 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(drawn(), st.sampled_from(ADJOINTS))
def test_any_arguments_together(case: Drawn, adjoint: Any) -> None:
    if isinstance(adjoint, rd.Reversible) and not case.has_way_back:
        adjoint = None

    def loss(p: Params, batch: tuple[Tensor, ...], hyper: Tensor) -> Tensor:
        return case.loss(p, batch, hyper)

    loss.networks = case.networks  # type: ignore[attr-defined]
    optimizer = OPTIMIZERS[case.kind](**case.settings)
    *results, state = rd.unroll(
        loss, case.params, case.batches, optimizer, steps=case.steps, hyper=case.hyper, adjoint=adjoint, **case.options
    )
    ours = {name: slot for slot, name in optimizer.slot_names.items()}
    slots = {ours[name]: of for name, of in state.slots.items()}
    found, right = [*results, *(slots[name] for name in sorted(slots))], expected(case)
    if case.kind == "rmsprop" and "b" not in slots:
        names = [*(["a"] if case.settings["centered"] else []), "b", "s"]
        right.pop(names.index("b") - len(names))
    weights = torch.Generator().manual_seed(0)
    values = [torch.zeros((), dtype=F64), torch.zeros((), dtype=F64)]
    for a, b in zip(found, right, strict=True):
        for n in case.params:
            torch.testing.assert_close(a[n], b[n], rtol=1e-8, atol=1e-9, check_dtype=False)
            w = torch.randn(a[n].shape, dtype=F64, generator=weights)
            values = [value + (w * t[n] + 0.1 * t[n].square()).sum() for value, t in zip(values, (a, b), strict=True)]
    gradients = [
        torch.autograd.grad(v, case.leaves, allow_unused=True) if v.requires_grad else [None] * len(case.leaves)
        for v in values
        if case.leaves
    ]
    for leaf, *both in zip(case.leaves, *gradients, strict=bool(case.leaves)):
        a, b = (torch.zeros_like(leaf) if g is None else g for g in both)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
