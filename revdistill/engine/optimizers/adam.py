"""Adam and AdamW as lists of moves (Kingma & Ba 2015; Loshchilov & Hutter 2019).

    m <- beta1 m,  s <- beta2 s                          decays
    m <- m + (1 - beta1) g,  s <- s + (1 - beta2) g^2    kicks; g = gradient, in Adam + weight_decay theta
    theta <- (1 - lr weight_decay) theta                 AdamW's decay of theta, a drift
    theta <- theta - lr u,  u = (m / c1) / (sqrt(s / c2) + eps),  c = 1 - beta^(k + 1)

u is a function of the new m and s: on the way back it is known before theta is, so the step can be undone explicitly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from revdistill.engine.integers import loops
from revdistill.engine.integers.radix import FINE, WIDE
from revdistill.engine.integers.wide import Wide
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.hyperparameters import Schedule, Table, combined, quantised, resolve
from revdistill.engine.optimizers.moves import GRADIENT, THETA, Add, Bars, Decay, Factor, Lookup, Peak, Update
from revdistill.engine.optimizers.sgd import Optimizer

_SLACK = 1.0 + 1e-6  # bounds are floats, and so are the values that they bound


@dataclass(frozen=True)
class Adam(Optimizer):
    """torch.optim.Adam's update, with weight_decay as an L2 penalty: g <- gradient + weight_decay theta.

    lr, betas (each of the two), eps, weight_decay: a float, a tensor of shape () or [T] (T steps), or a dict from each
    parameter's name to one of these (parameter groups); lr also a tensor [T, E] for parameters stacked over E networks.
    Tensors may require grad. lr and weight_decay at least 0, eps above 0, betas at least 0 and below 1; they act as the
    nearest n / 2^30.

    As in torch the bias corrections of step k are 1 - beta^(k + 1) with the beta of that step. Where the second moment
    is 0, its root has derivative 0 (autograd through torch's formula gives NaN).

    amsgrad: u has the largest s so far in place of s (Reddi et al. 2018). The maximum forgets what it replaces, so
    `Reversible` refuses it; the default is then `Checkpoint`.

    Cost: `Reversible` keeps 56 bytes per parameter (theta, m and s in two words each, a head for either) and
    log2(1/beta1) + log2(1/beta2) bits per parameter and step, 0.153 by default. |gradient| stays below 16,384
    (RangeError).

    Errors (when unrolled): ValueError and TypeError name the argument, what came and what is accepted.
    """

    lr: Schedule
    betas: tuple[Schedule, Schedule] = (0.9, 0.999)
    eps: Schedule = 1e-8
    weight_decay: Schedule = 0.0
    amsgrad: bool = False
    decoupled: ClassVar[bool] = False

    def resolve(self, layout: Layout, steps: int) -> Update:
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas must be a pair (beta1, beta2), got {self.betas!r}")
        if not isinstance(self.amsgrad, bool):
            raise TypeError(f"amsgrad must be a bool, got {type(self.amsgrad).__name__}")
        numbers = partial(resolve, layout=layout, steps=steps, stackable=False)
        lr = resolve("lr", self.lr, layout, steps, stackable=True)
        beta1, beta2 = (_below_one(numbers(f"betas[{i}]", beta)) for i, beta in enumerate(self.betas))
        eps, weight_decay = numbers("eps", self.eps), numbers("weight_decay", self.weight_decay)
        if not all(map(all, eps.host)):
            raise ValueError("eps must be above 0 at every step")
        has_decay = weight_decay.values.requires_grad or not weight_decay.is_zero()
        penalty = weight_decay if has_decay and not self.decoupled else None

        rest1, rest2 = (combined(lambda beta: 1 - beta, beta) for beta in (beta1, beta2))
        exponents = torch.arange(1, steps + 1, dtype=torch.float64, device=layout.device)[:, None]
        c1, c2 = (combined(lambda beta: 1 - beta**exponents, beta) for beta in (beta1, beta2))
        tables = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        tables |= {"1-beta1": rest1, "1-beta2": rest2, "c1": c1, "c2": c2}

        kicks = [Add("m", GRADIENT, Factor(1.0, 1.0, ("1-beta1",), (rest1,)))]
        if penalty is not None:
            kicks.append(Add("m", THETA, Factor(1.0, 1.0, ("1-beta1", "weight_decay"), (rest1, weight_decay))))
        kicks.append(Add("s", _Square.name, Factor(1.0, 1.0, ("1-beta2",), (rest2,))))
        shrink = []
        if has_decay and self.decoupled:
            keep = quantised(combined(lambda lr, decay: 1 - lr * decay, lr, weight_decay), FINE)
            if not all(v >= 0 for row in keep.host for v in row):
                raise ValueError("lr * weight_decay must be at most 1 at every step, or theta would change its sign")
            tables["shrink"] = keep
            shrink = [Decay(THETA, "shrink", keep, keep.segments(layout), FINE)]
        return Update(
            layout=layout,
            tables=tables,
            decays=(
                Decay("m", "beta1", beta1, beta1.segments(layout), WIDE),
                Decay("s", "beta2", beta2, beta2.segments(layout), WIDE),
            ),
            kicks=tuple(kicks),
            drifts=(Add(THETA, _Direction.name, Factor(-1.0, -1.0, ("lr",), (lr,))),),
            for_kicks=(_Square(penalty),),
            for_drifts=(_Direction(beta1, beta2, c1, c2, eps, "peak" if self.amsgrad else "s"),),
            peaks=(Peak("peak", "s"),) if self.amsgrad else (),
            shrink=tuple(shrink),
            wide=frozenset({"m", "s", "peak"}),
        )


@dataclass(frozen=True)
class AdamW(Adam):
    """torch.optim.AdamW's update: Adam, and theta <- (1 - lr weight_decay) theta, a factor that acts as the nearest n /
    2^30.

    Arguments, errors and cost as `Adam`; with weight_decay `Reversible` keeps 8 bytes per parameter more, for theta's
    own head.
    """

    weight_decay: Schedule = 0.01
    decoupled: ClassVar[bool] = True


def _below_one(beta: Table) -> Table:
    if any(v >= 1 for row in beta.host for v in row):
        raise ValueError(f"betas must be at least 0 and below 1, got {max(map(max, beta.host)):g}")
    largest = 1 - 1 / FINE.radix
    capped = combined(lambda values: values.clamp(max=largest), beta)
    return quantised(capped, FINE)


@dataclass(frozen=True)
class _Square:
    """(gradient + weight_decay theta)^2"""

    weight_decay: Table | None
    name: ClassVar[str] = "square"

    @property
    def inputs(self) -> tuple[str, ...]:
        return (GRADIENT,) if self.weight_decay is None else (GRADIENT, THETA)

    def _root(self, values: dict[str, Tensor], at: Lookup) -> Tensor:
        gradient = values[GRADIENT]
        return gradient if self.weight_decay is None else gradient + values[THETA] * at(self.weight_decay)

    def value(self, values: dict[str, Tensor], at: Lookup) -> Tensor:
        return self._root(values, at).square()

    def adjoint(self, k: int, values: dict[str, Tensor], bars: Bars) -> None:
        """g_bar += 2 g square_bar; theta_bar += weight_decay 2 g square_bar; weight_decay_bar += <2 g square_bar,
        theta>.
        """
        bar = bars.flat[self.name]
        root_bar = self._root(values, lambda table: table.at(k)).to(bar.dtype).mul(bar).mul_(2)
        bars.flat[GRADIENT].add_(root_bar)
        if self.weight_decay is None:
            return
        if "weight_decay" in bars.tables:
            self.weight_decay.accumulate(k, root_bar, values[THETA], bars.tables["weight_decay"])
        bars.flat[THETA].add_(root_bar * self.weight_decay.at(k))

    def largest(self, k: int, bounds: dict[str, float]) -> float:
        root = bounds[GRADIENT]
        if self.weight_decay is not None:
            root += self.weight_decay.largest(k) * bounds[THETA]
        return root * root * _SLACK


@dataclass(frozen=True)
class _Direction:
    """u = (m / c1) / (sqrt(s / c2) + eps); second: the name of s, or of its peak, which is no smaller."""

    beta1: Table
    beta2: Table
    c1: Table
    c2: Table
    eps: Table
    second: str
    name: ClassVar[str] = "direction"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("m", self.second)

    def value(self, values: dict[str, Tensor], at: Lookup) -> Tensor:
        m, s, c1, eps = values["m"], values[self.second], at(self.c1), at(self.eps)
        # Multiplied by, never divided by: where it is a number CUDA would divide as it likes (see `scaling`), and its
        # bits would be others than the CPU's.
        per_root_c2 = 1 / _sqrt(at(self.c2))
        alone = m.dtype == torch.float64 and m.device.type == "cpu" and not (m.requires_grad or s.requires_grad)
        if alone and isinstance(c1, float) and isinstance(per_root_c2, float) and isinstance(eps, float):
            out = torch.empty_like(m)
            loops.direction(m.numpy(), s.numpy(), out.numpy(), c1, per_root_c2, eps)
            return out
        return m / ((_root(s) * per_root_c2 + eps) * c1)

    def adjoint(self, k: int, values: dict[str, Tensor], bars: Bars) -> None:
        """With D = sqrt(s / c2) + eps: m_bar += u_bar / (c1 D), D_bar = -u_bar u / D; from D_bar to s, c2 and eps."""
        bar, u = bars.flat[self.name], values[self.name]
        c1, c2, eps = self.c1.at(k), self.c2.at(k), self.eps.at(k)
        root = _root(values[self.second])
        per_root_c2 = 1 / _sqrt(c2)
        scaled = root * per_root_c2
        denominator = scaled + eps
        bars.flat["m"].add_((bar / (denominator * c1)).to(bar.dtype))
        denominator_bar = (-bar * u / denominator).to(bar.dtype)
        s_bar = torch.where(root > 0, denominator_bar / root, 0.0) * (per_root_c2 / 2)
        bars.flat[self.second].add_(s_bar.to(bar.dtype))
        for name, table, a, b in (
            ("c1", self.c1, -bar * u, torch.ones_like(bar) * (1 / c1)),
            ("c2", self.c2, denominator_bar, scaled * (-0.5 / c2)),
            ("eps", self.eps, denominator_bar, torch.ones_like(bar)),
        ):
            if name in bars.tables:
                table.accumulate(k, a, b.to(bar.dtype), bars.tables[name])

    def largest(self, k: int, bounds: dict[str, float]) -> float:
        return self._bounds[k]

    @cached_property
    def _bounds(self) -> list[float]:
        """A bound on |u| at each step, whatever the gradients are: |m| <= ratio sqrt(s + lost) + error.

        By the inequality of Cauchy and Schwarz m' = beta1 m + (1 - beta1) g and s' = beta2 s + (1 - beta2) g^2 make
        ratio'^2 = ratio^2 beta1^2 / beta2 + (1 - beta1)^2 / (1 - beta2). error, lost: what rounding added to m and took
        from s.
        """
        found = []
        ratio = lost = error = 0.0
        for k in range(len(self.c1.host)):
            (low1, high1), (low2, high2) = (_ends(table.row(k)) for table in (self.beta1, self.beta2))
            ratio = ratio * high1 * high1 / low2 if low2 else math.inf
            ratio += (1 - low1) * (1 - low1) / (1 - high2)
            lost = high2 * lost + 2 * Wide.resolution
            error = high1 * error + 3 * Wide.resolution
            c1, c2, eps = min(self.c1.row(k)), max(self.c2.row(k)), min(self.eps.row(k))
            size = math.sqrt(ratio)
            found.append((math.sqrt(c2) * size + (size * math.sqrt(lost) + error) / eps) / c1 * _SLACK)
        return found


def _ends(row: list[float]) -> tuple[float, float]:
    return min(row), max(row)


def _root(s: Tensor) -> Tensor:
    """sqrt(s), with derivative 0 where s is 0; correctly rounded, as in loops and on CUDA, and not always by torch on a
    CPU.
    """
    if not s.requires_grad:
        return torch.from_numpy(np.sqrt(s.numpy())) if s.device.type == "cpu" else s.sqrt()
    positive = s > 0
    return torch.where(positive, torch.where(positive, s, 1.0).sqrt(), 0.0)


def _sqrt(value: float | Tensor) -> float | Tensor:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)
