"""Adam and AdamW as lists of moves (Kingma & Ba 2015; Loshchilov & Hutter 2019).

    m <- beta1 m,  s <- beta2 s
    m <- m + (1 - beta1) g,  s <- s + (1 - beta2) g^2    g = gradient, in Adam + weight_decay theta
    theta <- (1 - lr weight_decay) theta                 AdamW's
    theta <- theta - lr u,  u = (m / c1) / (sqrt(s / c2) + eps),  c = 1 - beta^(k + 1)

u is a function of the new m and s: on the way back it is known before theta is, so the step can be undone explicitly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

import torch
from torch import Tensor

from revdistill.engine.integers.fixedpoint import Wide
from revdistill.engine.integers.radix import FINE, WIDE
from revdistill.engine.integers.select import root as correctly_rounded_root
from revdistill.engine.integers.state import State
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.clipping import Clipping
from revdistill.engine.optimizers.hyperparameters import (
    Hyperparameter,
    Table,
    Value,
    above_zero,
    below_one,
    combined,
    is_zero,
    quantised,
    resolve,
)
from revdistill.engine.optimizers.moves import Add, Decay, Factor, Move, RunningMaximum
from revdistill.engine.optimizers.optimizer import Optimizer
from revdistill.engine.optimizers.schedules import check_cycled
from revdistill.engine.optimizers.sources import (
    GRADIENT,
    SLACK,
    THETA,
    Bars,
    Penalised,
    Read,
    Source,
    Square,
    Step,
    Values,
)
from revdistill.engine.optimizers.start import AT_REST, Start
from revdistill.engine.optimizers.update import Update


@dataclass(frozen=True, repr=False)
class Adam(Optimizer):
    """torch.optim.Adam's update, with weight_decay as an L2 penalty: g <- gradient + weight_decay theta.

    As in torch the bias corrections of step k are 1 - beta^(k + 1) with the beta of that step. Where the second moment
    is 0, its root has derivative 0 (autograd through torch's formula gives NaN).

    Cost: `Reversible` keeps 56 bytes per parameter (theta, m and s in two words each, a head for either) and
    log2(1/beta1) + log2(1/beta2) bits per parameter and step, 0.153 by default. |gradient| stays below 16,384
    (RangeError).

    Args:
        lr: a float, a tensor of shape () or [T] (T steps), or a dict from each parameter's name to one of these
            (parameter groups); also a tensor [T, E] for parameters stacked over E networks. Tensors may require grad.
            At least 0. Schedules as in `SGD`.
        betas: a pair, each as lr, but not [T, E]; from 0 to below 1. They act as the nearest n / 2^30.
        eps: as betas, above 0.
        weight_decay: as betas, at least 0.
        eps_root: added to s / c2 under the root (optax.adam's): above 0 it makes the hypergradient smooth where second
            moments are near 0. As eps, but 0 is accepted, and is torch's Adam.
        max_norm: as in `SGD`.
        amsgrad: u has the largest s so far in place of s (Reddi et al. 2018). The maximum forgets what it replaces, so
            `Reversible` refuses it; the default is then `Checkpoint`.

    Raises:
        ValueError, TypeError: when unrolled; name the argument, what came and what is accepted.
    """

    lr: Hyperparameter
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999)
    eps: Hyperparameter = 1e-8
    weight_decay: Hyperparameter = 0.0
    amsgrad: bool = False
    eps_root: Hyperparameter = 0.0
    max_norm: Value | None = None
    decoupled: ClassVar[bool] = False
    slot_names: ClassVar[Mapping[str, str]] = {"m": "exp_avg", "s": "exp_avg_sq", "s_max": "max_exp_avg_sq"}

    @property
    def counts_steps(self) -> bool:
        """Its bias corrections do."""
        return True

    def resolve(self, layout: Layout, steps: int, start: Start = AT_REST) -> Update:
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas must be a pair (beta1, beta2), got {self.betas!r}")
        if not isinstance(self.amsgrad, bool):
            raise TypeError(f"amsgrad must be a bool, got {type(self.amsgrad).__name__}")
        numbers = partial(resolve, layout=layout, steps=steps, stackable=False, taken=start.taken)
        check_cycled(self.lr, self.betas[0], "betas=(scheduler, beta2)")
        lr = numbers("lr", self.lr, stackable=True)
        beta1, beta2 = (below_one("betas", numbers(f"betas[{i}]", beta)) for i, beta in enumerate(self.betas))
        eps, weight_decay = above_zero("eps", numbers("eps", self.eps)), numbers("weight_decay", self.weight_decay)
        eps_root = numbers("eps_root", self.eps_root)
        penalty = weight_decay if weight_decay.matters() and not self.decoupled else None

        rest1, rest2 = (combined(lambda beta: 1 - beta, beta) for beta in (beta1, beta2))
        first, last = start.taken + 1, start.taken + steps
        exponents = torch.arange(first, last + 1, dtype=torch.float64, device=layout.device)[:, None]
        c1, c2 = (combined(lambda beta: 1 - beta**exponents, beta) for beta in (beta1, beta2))
        tables = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        tables |= {"eps_root": eps_root} if eps_root.matters() else {}
        tables |= {"1-beta1": rest1, "1-beta2": rest2, "c1": c1, "c2": c2}

        moves: list[Move] = [
            Decay("m", "beta1", beta1, layout, WIDE),
            Decay("s", "beta2", beta2, layout, WIDE),
            Add("m", Read(GRADIENT), Factor(tables={"1-beta1": rest1})),
        ]
        if penalty is not None:
            moves.append(Add("m", Read(THETA), Factor(tables={"1-beta1": rest1, "weight_decay": penalty})))
        moves.append(Add("s", Square(Penalised(penalty)), Factor(tables={"1-beta2": rest2})))
        second = "s"
        if self.amsgrad:
            second = "s_max"
            moves.append(RunningMaximum(second, "s", "amsgrad=True"))
        if self.decoupled and not is_zero(self.weight_decay):
            keep = quantised(combined(lambda lr, decay: 1 - lr * decay, lr, weight_decay), FINE)
            if not all(v >= 0 for row in keep.host for v in row):
                raise ValueError("lr * weight_decay must be at most 1 at every step, or theta would change its sign")
            tables["keep"] = keep
            moves.append(Decay(THETA, "keep", keep, layout, FINE))
        direction = _Direction(beta1, beta2, c1, c2, eps, second, tables.get("eps_root"), _largest_ratio(start, second))
        moves.append(Add(THETA, direction, Factor(-1.0, {"lr": lr})))
        clipping = Clipping.of(self.max_norm, layout, steps, start.taken)
        return Update(layout, tables, tuple(moves), dict.fromkeys(("m", "s", "s_max"), Wide()), clipping)


@dataclass(frozen=True, repr=False)
class AdamW(Adam):
    """torch.optim.AdamW's update: Adam, and theta <- (1 - lr weight_decay) theta, a factor that acts as the nearest n /
    2^30.

    Arguments, errors and cost as `Adam`; with weight_decay `Reversible` keeps 8 bytes per parameter more, for theta's
    own head.
    """

    weight_decay: Hyperparameter = 0.01
    decoupled: ClassVar[bool] = True


@dataclass(frozen=True)
class _Direction(Source):
    """u = (m / c1) / (sqrt(s / c2 + eps_root) + eps).

    second: the name of s, or of its running maximum, which is no smaller; eps_root: None where it is 0; ratio: the
    largest |m| / sqrt(second) at the start.
    """

    beta1: Table
    beta2: Table
    c1: Table
    c2: Table
    eps: Table
    second: str
    eps_root: Table | None = None
    ratio: float = 0.0

    @property
    def reads(self) -> tuple[str, ...]:
        return ("m", self.second)

    @property
    def tables(self) -> Mapping[str, Table]:
        own = {} if self.eps_root is None else {"eps_root": self.eps_root}
        return {"c1": self.c1, "c2": self.c2, "eps": self.eps, **own}

    def value(self, values: Values, step: Step) -> Tensor:
        c2, s = step.of(self.c2), values[self.second]
        if self.eps_root is not None:
            s = s + step.of(self.eps_root) * c2
        per_root_c2 = 1 / _sqrt(c2)
        return values["m"] / ((step.root(s) * per_root_c2 + step.of(self.eps)) * step.of(self.c1))

    def exact(self, k: int, state: State, gradient: Tensor | None) -> Tensor:
        per_root_c2 = 1 / _sqrt(self.c2.value(k))
        m, s = state.floats("m"), state.floats(self.second)
        if self.eps_root is not None:
            s = s + self.eps_root.value(k) * self.c2.value(k)  # under the root, times c2
        return state.backend.ratio(m, s, self.c1.value(k), per_root_c2, self.eps.value(k))

    def vjp(self, k: int, values: Values, bars: Bars, bar: Tensor, factor: float | Tensor) -> Tensor | None:
        """With D = sqrt(s / c2) + eps: m_bar += u_bar / (c1 D), D_bar = -u_bar u / D; from D_bar to s, c2 and eps.

        By hand: with autograd over `value` a hypergradient of tiny networks takes longer, by more than 3 %.
        """
        u_bar = (bar * factor).to(bar.dtype)
        c1, c2, eps = self.c1.value(k), self.c2.value(k), self.eps.value(k)
        eps_root = 0.0 if self.eps_root is None else self.eps_root.value(k)
        s = values[self.second] if self.eps_root is None else values[self.second].double() + eps_root * c2
        root = correctly_rounded_root(s)
        per_root_c2 = 1 / _sqrt(c2)
        scaled = root * per_root_c2
        denominator = scaled + eps
        divisor = denominator * c1
        u = values["m"] / divisor
        bars.flat["m"].add_((u_bar / divisor).to(bar.dtype))
        denominator_bar = (-u_bar * u / denominator).to(bar.dtype)
        s_bar = torch.where(root > 0, denominator_bar / root, 0.0) * (per_root_c2 / 2)
        bars.flat[self.second].add_(s_bar.to(bar.dtype))
        parts: list[tuple[str, Table, Tensor, Tensor]] = [
            ("c1", self.c1, -u_bar * u, torch.ones_like(bar) * (1 / c1)),
            ("c2", self.c2, denominator_bar, scaled * (-0.5 / c2)),
            ("eps", self.eps, denominator_bar, torch.ones_like(bar)),
        ]
        if self.eps_root is not None:  # root(s + eps_root c2) has a derivative by either
            parts.append(("c2", self.c2, s_bar, torch.ones_like(bar) * eps_root))
            parts.append(("eps_root", self.eps_root, s_bar, torch.ones_like(bar) * c2))
        for name, table, a, b in parts:
            if name in bars.tables:
                table.accumulate(k, a.to(bar.dtype), b.to(bar.dtype), bars.tables[name])
        return u

    def bound(self, k: int, bounds: Mapping[str, float]) -> float:
        return self._bounds[k]

    @cached_property
    def _bounds(self) -> list[float]:
        """A bound on |u| at each step, whatever the gradients are: |m| <= ratio sqrt(s + lost) + error + carried.

        By the inequality of Cauchy and Schwarz m' = beta1 m + (1 - beta1) g and s' = beta2 s + (1 - beta2) g^2 make
        ratio'^2 = ratio^2 beta1^2 / beta2 + (1 - beta1)^2 / (1 - beta2). error, lost: what rounding added to m and took
        from s. What m was at the start goes into ratio; but where a maximum stands for s, which is 0 perhaps, it is
        carried: beta1^k |m| <= carried sqrt(maximum).
        """
        found = []
        lost = error = 0.0
        ratio, carried = (self.ratio * self.ratio, 0.0) if self.second == "s" else (0.0, self.ratio)
        for k in range(len(self.c1.host)):
            (low1, high1), (low2, high2) = (_ends(table.row(k)) for table in (self.beta1, self.beta2))
            ratio = ratio * high1 * high1 / low2 if low2 else math.inf
            ratio += (1 - low1) * (1 - low1) / (1 - high2)
            lost = high2 * lost + 2 * Wide.resolution
            error = high1 * error + 3 * Wide.resolution
            c1, c2, eps = min(self.c1.row(k)), max(self.c2.row(k)), min(self.eps.row(k))
            carried *= high1
            size = math.sqrt(ratio) + carried
            found.append((math.sqrt(c2) * size + (size * math.sqrt(lost) + error) / eps) / c1 * SLACK)
        return found


def _largest_ratio(start: Start, second: str) -> float:
    """|m| / sqrt(s), of all parameters the largest; inf where s is 0 and m is not."""
    if not {"m", second} <= start.slots.keys():
        return 0.0
    m, s = start.slots["m"].detach().double().abs(), start.slots[second].detach().double()
    ratio = torch.where(m > 0, m / s.sqrt(), 0.0)
    return float(ratio.max()) * SLACK if len(ratio) else 0.0


def _ends(row: list[float]) -> tuple[float, float]:
    return min(row), max(row)


def _sqrt(value: float | Tensor) -> float | Tensor:
    return math.sqrt(value) if isinstance(value, float) else value.sqrt()
