"""The problems and optimizer settings that every adjoint is tested on, all in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revdistill as rd

STEPS, BATCHES, SIZE = 12, 5, 4


@dataclass
class Case:
    """loss, params and batches for one unroll; `leaves` are the tensors whose gradients are compared."""

    loss: Callable[..., Tensor]
    params: dict[str, Tensor]
    batches: tuple[Tensor, ...]
    hyper: Any = None
    leaves: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.leaves |= {f"params.{name}": p for name, p in self.params.items()}
        self.leaves |= {f"batches.{i}": t for i, t in enumerate(self.batches) if t.requires_grad}


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def quadratic() -> Case:
    matrix = _randn(3, 3)
    matrix = matrix @ matrix.T / 3 + torch.eye(3, dtype=torch.float64)
    x = _randn(BATCHES, 3).requires_grad_()

    def loss(params: dict[str, Tensor], batch: tuple[Tensor]) -> Tensor:
        residual = params["theta"] - batch[0]
        return 0.5 * residual @ matrix @ residual

    return Case(loss, {"theta": _randn(3).requires_grad_()}, (x,))


def _classifier(net: nn.Module, *input_shape: int, classes: int = 3) -> Case:
    loss, params = rd.from_module(net.double(), F.cross_entropy)
    x = _randn(BATCHES, SIZE, *input_shape).requires_grad_()
    y = torch.arange(BATCHES * SIZE).reshape(BATCHES, SIZE) % classes
    return Case(loss, params, (x, y))


def logistic_regression() -> Case:
    return _classifier(nn.Linear(4, 3), 4)


def tanh_mlp() -> Case:
    return _classifier(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), 4)


def silu_mlp() -> Case:
    # torch takes another silu kernel when a graph is asked for: the trap of evaluating the two ways differently
    return _classifier(nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3)), 4)


def group_norm_convnet() -> Case:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.Softplus(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return _classifier(net, 2, 4, 4)


def batch_norm_mlp() -> Case:
    return _classifier(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)), 4)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.out((x + mixed).mean(1))


def attention() -> Case:
    return _classifier(_Attention(), 5, 4)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x)[0][:, -1])


def gru() -> Case:
    return _classifier(_Recurrent(), 4, 3)


def dropout() -> Case:
    return _classifier(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.4), nn.Linear(16, 3)), 4)


def l2_hyper() -> Case:
    """A loss with hyperparameters of its own: a penalty per parameter and a temperature."""
    case = tanh_mlp()
    inner = case.loss
    hyper = {name: torch.full_like(p, 0.05).requires_grad_() for name, p in case.params.items()}
    hyper["temperature"] = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def loss(params: dict[str, Tensor], batch: Any, hyper: dict[str, Tensor]) -> Tensor:
        penalty = sum((hyper[name] * p.square()).sum() for name, p in params.items())
        return inner(params, batch) * hyper["temperature"] + penalty

    return Case(loss, case.params, case.batches, hyper, {f"hyper.{name}": t for name, t in hyper.items()})


def stacked() -> Case:
    nets = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double() for _ in range(3)]
    loss, params = rd.stack_modules(nets, F.cross_entropy)
    case = logistic_regression()
    return Case(loss, params, case.batches)


PROBLEMS: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        quadratic,
        logistic_regression,
        tanh_mlp,
        silu_mlp,
        group_norm_convnet,
        batch_norm_mlp,
        attention,
        gru,
        dropout,
        l2_hyper,
        stacked,
    )
}


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64, requires_grad=True)


def _schedule(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, STEPS, dtype=torch.float64).requires_grad_()


def _per_parameter(case: Case, values: Callable[[int], Any]) -> dict[str, Any]:
    return {name: values(i) for i, name in enumerate(case.params)}


def _groups(case: Case) -> dict[str, Any]:
    shared = _schedule(0.05, 0.1)
    return {
        "lr": _per_parameter(case, lambda i: shared if i % 2 else _tensor(0.07)),
        "momentum": _per_parameter(case, lambda i: 0.9 if i % 2 else _schedule(0.4, 0.8)),
        "weight_decay": _per_parameter(case, lambda i: _tensor(0.02) if i % 2 else 0.0),
        "dampening": 0.2,
    }


# name -> the arguments of rd.SGD (of rd.Adam or rd.AdamW below); tensors in it are compared too
SGD_SETTINGS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "plain": lambda case: {"lr": _schedule(0.05, 0.2), "momentum": _tensor(0.9)},
    "no momentum": lambda case: {"lr": _schedule(0.05, 0.2), "momentum": 0.0, "dampening": 0.3},
    "nesterov": lambda case: {
        "lr": _tensor(0.1),
        "momentum": _schedule(0.5, 0.9),
        "nesterov": True,
        "weight_decay": _tensor(0.01),
    },
    "weight decay": lambda case: {
        "lr": _tensor(0.1),
        "momentum": 0.8,
        "dampening": 0.1,
        "weight_decay": _schedule(0.0, 0.1),
    },
    "schedules": lambda case: {
        "lr": _schedule(0.2, 0.0),
        "momentum": torch.tensor([0.9, 0.5, 0.0, 1.0] * 3, dtype=torch.float64, requires_grad=True),
        "weight_decay": _schedule(0.05, 0.0),
        "dampening": 0.5,
    },
    "groups": _groups,
}


def _adam_groups(case: Case) -> dict[str, Any]:
    return {
        "lr": _per_parameter(case, lambda i: _schedule(0.02, 0.05) if i % 2 else _tensor(0.04)),
        "betas": (_per_parameter(case, lambda i: 0.9 if i % 2 else _schedule(0.5, 0.8)), _tensor(0.99)),
        "eps": _per_parameter(case, lambda i: 1e-3 if i % 2 else _tensor(0.01)),
        "weight_decay": _per_parameter(case, lambda i: _tensor(0.02) if i % 2 else 0.0),
    }


# eps of 1e-3 and more: where a parameter has no effect (a bias before BatchNorm) its gradient is rounding noise, which
# a smaller eps turns into steps. test_adam has the usual eps.
ADAM_SETTINGS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "adam": lambda case: {"lr": _schedule(0.01, 0.05), "betas": (_tensor(0.9), _tensor(0.999)), "eps": _tensor(1e-3)},
    "adam penalty": lambda case: {
        "lr": _tensor(0.03),
        "betas": (_schedule(0.7, 0.9), _schedule(0.9, 0.99)),
        "eps": _schedule(1e-3, 1e-2),
        "weight_decay": _schedule(0.1, 0.0),
    },
    "adam groups": _adam_groups,
    "amsgrad": lambda case: {
        "lr": _schedule(0.01, 0.05),
        "betas": (_tensor(0.8), _tensor(0.7)),
        "eps": _tensor(1e-3),
        "amsgrad": True,
    },
    "adam without memory": lambda case: {"lr": _tensor(0.02), "betas": (0.0, 0.0), "eps": 0.01},
    "adam eps_root": lambda case: {
        "lr": _tensor(0.03),
        "betas": (_tensor(0.8), _schedule(0.9, 0.99)),
        "eps": _tensor(1e-3),
        "eps_root": _schedule(1e-3, 1e-2),
    },
}
ADAMW_SETTINGS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "adamw": lambda case: {"lr": _schedule(0.01, 0.05), "weight_decay": _tensor(0.1), "eps": _tensor(1e-3)},
    "adamw schedules": lambda case: {
        "lr": _tensor(0.03),
        "betas": (_tensor(0.8), _schedule(0.8, 0.95)),
        "eps": 1e-3,
        "weight_decay": _schedule(0.0, 0.3),
    },
    "adamw groups": _adam_groups,
}
RMSPROP_SETTINGS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "rmsprop": lambda case: {
        "lr": _schedule(0.01, 0.03),
        "alpha": _tensor(0.9),
        "eps": _tensor(1e-2),
        "momentum": _tensor(0.8),
    },
    "rmsprop without momentum": lambda case: {
        "lr": _tensor(0.02),
        "alpha": _schedule(0.8, 0.95),
        "eps": 1e-2,
        "weight_decay": _tensor(0.1),
    },
    "rmsprop centered": lambda case: {
        "lr": _tensor(0.01),
        "alpha": _tensor(0.9),
        "eps": _schedule(0.05, 0.1),
        "momentum": _schedule(0.5, 0.9),
        "weight_decay": _schedule(0.1, 0.0),
        "centered": True,
    },
    "rmsprop groups": lambda case: {
        "lr": _per_parameter(case, lambda i: _schedule(0.01, 0.03) if i % 2 else _tensor(0.02)),
        "alpha": _per_parameter(case, lambda i: 0.9 if i % 2 else _schedule(0.8, 0.9)),
        "eps": _per_parameter(case, lambda i: 1e-2 if i % 2 else _tensor(0.02)),
        "momentum": _per_parameter(case, lambda i: _tensor(0.7) if i % 2 else 0.9),
        "weight_decay": _per_parameter(case, lambda i: _tensor(0.02) if i % 2 else 0.0),
    },
}
SETTINGS = SGD_SETTINGS | ADAM_SETTINGS | ADAMW_SETTINGS | RMSPROP_SETTINGS
WITHOUT_WAY_BACK = {"nesterov", "amsgrad", "rmsprop without momentum"}  # Reversible refuses these


def optimizer_of(setting: str, settings: dict[str, Any]) -> Any:
    """The optimizer that a setting is for."""
    if setting in SGD_SETTINGS:
        return rd.SGD(**settings)
    if setting in RMSPROP_SETTINGS:
        return rd.RMSprop(**settings)
    return rd.Adam(**settings) if setting in ADAM_SETTINGS else rd.AdamW(**settings)


def tensors_of(settings: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that require grad among an optimizer's arguments, by name."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, tuple):
            found |= tensors_of({f"{name}[{i}]": v for i, v in enumerate(value)})
            continue
        entries = value.items() if isinstance(value, dict) else [("", value)]
        found |= {f"{name}.{key}": t for key, t in entries if isinstance(t, Tensor) and t.requires_grad}
    return found
