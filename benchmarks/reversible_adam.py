"""Four ways to walk Adam back: by division in float32 and float64, in the fixed point of google-research's
`reversible_data_attribution` (2026), restated here, and ours. How far from its start does each end, at how many bits?

The restated arithmetic (its `retrain_with_quantize` and `GPUReversibleTransform`): theta, m and v are int64 at scale
10^12, the gradient is taken in float64; a decay by num / den moves the remainder by den into an int64 buffer and takes
the remainder by num out of it; a buffer is put away whole after as many steps as can in no case overflow it; v is
rounded up and starts at 1; the update is clamped to its Cauchy-Schwarz bound. Not restated: its scores (a first-order
recursion, terms clamped to five times the largest of the first 100 steps back, denominators kept above 1e-4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import gpt
import torch
from torch import Tensor

import revdistill as rd

BETAS, EPS, RATE, SCALE = (0.9, 0.999), 1e-8, 1e-3, 10**12
ACCURATE = 0.01  # a relative error of theta above this is called lost
WORD = 64
Gradient = Callable[[Tensor, int], Tensor]


class Remainders:
    """Multiplies int64 by num / den and undoes it: what is lost in rounding lies in a buffer of mixed radix."""

    def __init__(self, factor: float, parameters: int) -> None:
        fraction = Fraction(factor).limit_denominator(1000)
        self._num, self._den = fraction.numerator, fraction.denominator
        growth = self._den / self._num
        largest = (2**63 - 1 - self._den) // self._den
        # the buffer after k steps is at most sum_{j<=k} growth^j
        self.steps_a_word = int(math.log(1 + largest * (growth - 1) / growth) / math.log(growth))
        self._buffer = torch.zeros(parameters, dtype=torch.int64)
        self._words: list[Tensor] = []
        self._step = 0
        self.put_away = 0

    def decay(self, c: Tensor) -> Tensor:
        """c -> about c num / den."""
        buffer = self._buffer * self._den + c % self._den
        self._step += 1
        if self._step == self.steps_a_word:
            self._words.append(buffer)
            self.put_away += 1
            buffer, self._step = torch.zeros_like(buffer), 0
        c = c.div(self._den, rounding_mode="floor") * self._num + buffer % self._num
        self._buffer = buffer.div(self._num, rounding_mode="floor")
        return c

    def undo(self, c: Tensor) -> Tensor:
        """What `decay` was given."""
        buffer = self._buffer * self._num + c % self._num
        if self._step == 0:
            buffer, self._step = self._words.pop(), self.steps_a_word
        self._step -= 1
        c = c.div(self._num, rounding_mode="floor") * self._den + buffer % self._den
        self._buffer = buffer.div(self._den, rounding_mode="floor")
        return c


def bound(step: int) -> float:
    """The largest |m_hat| / sqrt(v_hat) after `step` steps (Cauchy-Schwarz)."""
    beta1, beta2 = BETAS
    r = beta1**2 / beta2
    weights = (1 - beta1) ** 2 / (1 - beta2) * (1 - r**step) / (1 - r)
    return math.sqrt(weights * (1 - beta2**step)) / (1 - beta1**step)


def direction(m: Tensor, v: Tensor, step: int) -> Tensor:
    """Adam's, after `step` steps."""
    return m / (1 - BETAS[0] ** step) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)


def by_division(theta: Tensor, gradient: Gradient, steps: int) -> tuple[list[Tensor], Callable[[], Any]]:
    """(the states theta_0 ... theta_T, an iterator back): floats; m and v are found again by dividing by their
    factor.
    """
    beta1, beta2 = BETAS
    m, v, passed = torch.zeros_like(theta), torch.zeros_like(theta), [theta]
    for k in range(steps):
        g = gradient(theta, k)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        theta = theta - RATE * direction(m, v, k + 1)
        passed.append(theta)

    def back() -> Any:
        there, first, second = theta, m, v
        for k in reversed(range(steps)):
            there = there + RATE * direction(first, second, k + 1)
            g = gradient(there, k)
            first = (first - (1 - beta1) * g) / beta1
            second = ((second - (1 - beta2) * g * g) / beta2).clamp_min(0)
            yield k, there

    return passed, back


def by_remainders(theta: Tensor, gradient: Gradient, steps: int) -> tuple[list[Tensor], Callable[[], Any], Any]:
    """The same in the restated fixed point; and the two stores of remainders."""
    beta1, beta2 = BETAS
    stores = Remainders(beta1, len(theta)), Remainders(beta2, len(theta))
    whole = (theta * SCALE).round().long()
    m, v, passed = torch.zeros_like(whole), torch.ones_like(whole), [whole.double() / SCALE]

    def update(m: Tensor, v: Tensor, step: int) -> Tensor:
        found = direction(m.double() / SCALE, v.double() / SCALE, step).clamp(-bound(step), bound(step))
        return (RATE * found * SCALE).round().long()

    def entered(g: Tensor) -> tuple[Tensor, Tensor]:
        return ((1 - beta1) * g * SCALE).round().long(), ((1 - beta2) * g * g * SCALE).ceil().long()

    for k in range(steps):
        to_m, to_v = entered(gradient(whole.double() / SCALE, k))
        m, v = stores[0].decay(m) + to_m, -stores[1].decay(-v) + to_v  # v's decay rounds up
        whole = whole - update(m, v, k + 1)
        passed.append(whole.double() / SCALE)

    def back() -> Any:
        there, first, second = whole, m, v
        for k in reversed(range(steps)):
            there = there + update(first, second, k + 1)
            to_m, to_v = entered(gradient(there.double() / SCALE, k))
            first, second = stores[0].undo(first - to_m), -stores[1].undo(-(second - to_v).clamp_min(0))
            yield k, there.double() / SCALE

    return passed, back, stores


def walk(passed: list[Tensor], back: Callable[[], Any]) -> dict[str, Any]:
    """The error of theta at the end of the way back, relative, and after how many steps back it was lost."""
    steps, lost, error = len(passed) - 1, None, math.inf
    for k, found in back():
        error = float((found - passed[k]).norm() / passed[k].norm())
        if lost is None and not error <= ACCURATE:
            lost = steps - k
        if not math.isfinite(error):
            break
    return {"error": error if math.isfinite(error) else None, "lost_after": lost}


def compare(run: gpt.Run) -> dict[str, Any]:
    """All four, on one run's network, chunks and order."""
    shapes = {name: p.shape for name, p in run.params.items()}
    start = torch.cat([p.reshape(-1) for p in run.params.values()])
    steps = run.size.steps

    def gradient(theta: Tensor, k: int) -> Tensor:
        leaf = theta.detach().requires_grad_()
        parts = leaf.split([math.prod(shape) for shape in shapes.values()])
        params = {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        loss = run.losses(params, run.train[run.order[k]]).mean()
        return torch.autograd.grad(loss, leaf)[0]

    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.float64):
        passed, back = by_division(start.to(dtype), gradient, steps)
        rows.append({"who": str(dtype)[6:], **walk(passed, back)})
    passed, back, stores = by_remainders(start.double(), gradient, steps)
    fixed = {
        "state_bytes": 5 * WORD // 8,  # theta, m, v and the two buffers
        "bits": WORD * sum(store.put_away for store in stores) / steps,
        "bits_in_the_long_run": sum(WORD / store.steps_a_word for store in stores),
        "bits_reserved": WORD * sum(max(4, -(-steps // store.steps_a_word) + 4) for store in stores) / steps,
    }
    rows.append({"who": "restated", **walk(passed, back), **fixed})
    rows.append({"who": "ours", **_ours(run)})
    return {
        "parameters": len(start),
        "steps": steps,
        "ideal": -sum(map(math.log2, BETAS)),
        "scale": SCALE,
        "rows": rows,
    }


def _ours(run: gpt.Run) -> dict[str, Any]:
    """Our way back raises unless every bit of the start returns."""
    steps, rows = run.size.steps, run.order
    weights = torch.ones(rows.shape, requires_grad=True)
    theta, stats = rd.unroll(
        run.weighted,
        run.params,
        (weights, run.train[rows]),
        rd.Adam(RATE, BETAS, eps=EPS),
        steps=steps,
        adjoint=rd.Reversible(graph_bytes=0),
        return_stats=True,
    )
    run.losses(theta, run.held_out).mean().backward()
    return {
        "error": 0.0,
        "lost_after": None,
        "state_bytes": stats.state_bytes / stats.parameters,
        "bits": stats.history_bits_per_parameter_step,
    }
