"""An optimizer's state, to go on from: for a training in pieces, and for warm starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.integers.snapshot import Snapshot
from revdistill.engine.layout import Layout
from revdistill.engine.optimizers.optimizer import Optimizer
from revdistill.engine.optimizers.start import Start
from revdistill.engine.scalars import is_integer
from revdistill.engine.showing import Shown
from revdistill.engine.tensors import check_plain

_NOT_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")
_TORCHS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)
_MOST_STEPS = 2**53  # which floats count one by one


@dataclass(frozen=True, eq=False, repr=False)
class OptimizerState(Shown):
    """Where an optimizer is: `rd.unroll(..., return_state=True)` returns one, `rd.unroll(..., state=)` goes on from
    one.

    10 steps, and 10 more from the parameters and the state that they returned, are 20 steps bit for bit: the state also
    holds the integers behind both, which count as long as parameters and slots are what was returned, to the bit, and
    the adjoint's `fractional_bits` and the optimizer's kind and groups are the same. Otherwise the floats count. (SGD's
    dampening means nothing in a piece whose momentum is 0 throughout, as in torch.) Gradients flow through parameters
    and slots, so pieces may be chained in one graph.

    Args:
        step: how many steps were taken, at least 0. Adam's bias correction goes on from there, and so does the step k
            that batches(k), the row k % s of a table, the random numbers, on_step, save_at, schedules given as
            functions and messages see.
        slots: torch.optim's name of each running average ("momentum_buffer" of SGD; "exp_avg", "exp_avg_sq" and with
            amsgrad "max_exp_avg_sq" of Adam; "square_avg", centred "grad_avg" and with momentum "momentum_buffer" of
            RMSprop) -> name of a parameter -> tensor of its shape and dtype, which may require grad.
        seed: of the random numbers inside the loss; that of the unroll that it is passed to, by default.
    """

    step: int
    slots: Mapping[str, Mapping[str, Tensor]]
    seed: int | None = None
    _integers: Snapshot | None = field(default=None, repr=False)
    _unused: frozenset[str] = field(default=frozenset(), repr=False)

    def detach(self) -> OptimizerState:
        """The same state without its graph: to begin a piece that is gone back over alone, to copy, to keep."""
        slots = {slot: {name: t.detach() for name, t in of.items()} for slot, of in self.slots.items()}
        return replace(self, slots=slots)

    def passed_on(self, end: OptimizerState) -> OptimizerState:
        """`end`, which an unroll came to from here, with what it did not touch as it was.

        Args:
            end: its `_unused` are the parameters without a gradient in these steps.
        """
        if end.step == self.step:  # without a step no average has begun: SGD's first, for one, is still to come
            return replace(end, slots=end.slots if self.slots else {}, _unused=self._unused)
        kept = {slot: {name: of[name].clone() for name in end._unused} for slot, of in self.slots.items()}
        return replace(end, slots={slot: {**of, **kept.get(slot, {})} for slot, of in end.slots.items()})

    @classmethod
    def from_torch(
        cls, optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], *, step: int | None = None
    ) -> OptimizerState:
        """The state of a torch.optim optimizer that has been training these parameters.

        Args:
            optimizer: torch.optim's SGD, Adam, AdamW or RMSprop.
            params: name -> the very tensors that it trains, such as `from_module` returns.
            step: how many steps were taken; by default the count that the optimizer keeps (SGD keeps none).

        Returns:
            The state; parameters that the optimizer has not trained yet are at rest in it.

        Raises:
            TypeError: optimizer is none of these, or params no dict.
            ValueError: a parameter is not among the optimizer's, or their counts differ, or step is none or another.
        """
        if not isinstance(optimizer, _TORCHS):
            raise TypeError(
                "optimizer must be torch.optim's SGD, Adam, AdamW or RMSprop itself, got "
                f"{type(optimizer).__name__}; of another one that takes their steps make rd.OptimizerState(step, slots)"
            )
        if not isinstance(params, Mapping):
            raise TypeError(f"params must be a dict from name to tensor, got {type(params).__name__}")
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, p in params.items():
            if id(p) not in groups:
                raise ValueError(f"params[{name!r}] is not one of the tensors that the optimizer trains")
        if step is not None and not (is_integer(step) and step >= 0):
            raise ValueError(f"step must be an int of at least 0, got {step!r}")
        states = {name: optimizer.state.get(p, {}) for name, p in params.items()}
        counts = {name: int(state["step"]) for name, state in states.items() if "step" in state}
        if step is None and not counts:
            raise ValueError(
                f"{type(optimizer).__name__} has no count of its steps (SGD keeps none, others none before their "
                "first); give step="
            )
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"the parameters were trained for different numbers of steps, {counts}; the state has one count for all"
            )
        if step is not None and not {step}.issuperset(counts.values()):
            raise ValueError(
                f"step is {step}, but {type(optimizer).__name__} counts {next(iter(counts.values()))}, on which its "
                "next steps depend: leave step out (dataclasses.replace(state, step=...) makes another state of it)"
            )
        kept = [
            {key: value for key, value in state.items() if isinstance(value, Tensor) and key != "step"}
            for state in states.values()
        ]
        slots = {key: dict[str, Tensor]() for state in kept for key in state}
        for (name, p), state in zip(params.items(), kept, strict=True):
            for key, of in slots.items():  # what was never trained is at rest
                of[name] = state[key].detach().clone() if key in state else torch.zeros_like(p).detach()
        # A group of SGD's without momentum keeps nothing of what it has trained.
        keeps = {name: groups[id(p)].get("momentum") != 0 or name in counts for name, p in params.items()}
        unused = frozenset(n for n, state in zip(params, kept, strict=True) if slots and not state and keeps[n])
        return cls(next(iter(counts.values())) if step is None else int(step), slots, _unused=unused)


def check_state(state: Any, layout: Layout) -> None:
    """Raise TypeError or ValueError where rd.unroll's `state` will not do for parameters of this layout."""
    if not isinstance(state, OptimizerState):
        raise TypeError(f"state must be an rd.OptimizerState or None, got {type(state).__name__}")
    if not is_integer(state.step) or state.step < 0:
        raise ValueError(f"state.step must be an int of at least 0, got {state.step!r}")
    if state.step >= _MOST_STEPS:
        raise ValueError(f"state.step must be below 2^53, got {state.step}")
    if state.seed is not None and not (is_integer(state.seed) and state.seed >= 0):
        raise ValueError(f"state.seed must be an int of at least 0 or None, got {state.seed!r}")
    if not isinstance(state.slots, Mapping):
        raise TypeError(f"state.slots must be a dict, got {type(state.slots).__name__}")
    for slot, of in state.slots.items():
        if not isinstance(of, Mapping):
            raise TypeError(f"state.slots[{slot!r}] must be a dict from name to tensor, got {type(of).__name__}")
        if sorted(of) != sorted(layout.names):
            raise ValueError(
                f"state.slots[{slot!r}] has the names {sorted(of)}; they must be those of params, "
                f"{sorted(layout.names)}"
            )
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            t, label = of[name], f"state.slots[{slot!r}][{name!r}]"
            if not isinstance(t, Tensor):
                raise TypeError(f"{label} must be a tensor, got {type(t).__name__}")
            check_plain(label, t)
            if t.layout != torch.strided:
                raise ValueError(f"{label} has layout {t.layout}; accepted are dense tensors: call .to_dense()")
            if (t.shape, t.dtype, t.device) != (shape, layout.dtype, layout.device):
                raise ValueError(
                    f"{label} is {t.dtype} of shape {list(t.shape)} on {t.device}, but params[{name!r}] is "
                    f"{layout.dtype} of shape {list(shape)} on {layout.device}"
                )
            if not bool(torch.isfinite(t).all()):
                raise ValueError(f"{label} is not finite")
            if slot in _NOT_NEGATIVE and bool((t < 0).any()):
                raise ValueError(f"{label} is a mean of squares and must be at least 0")


def start_of(
    state: OptimizerState | None, optimizer: Optimizer, layout: Layout, unused: frozenset[str] = frozenset()
) -> Start:
    """Where the optimizer begins, its slots flat and by the engine's names, differentiable but for those of `unused`
    parameters.
    """
    if state is None:
        return Start()
    own = {theirs: ours for ours, theirs in optimizer.slot_names.items()}
    unknown = sorted(set(state.slots) - set(own))
    if unknown:
        raise ValueError(
            f"state.slots has {unknown}, but {type(optimizer).__name__} keeps {sorted(own)}: it is another optimizer's"
        )
    slots = {
        own[slot]: layout.flatten({name: t.detach() if name in unused else t for name, t in of.items()})
        for slot, of in state.slots.items()
    }
    return Start(state.step, slots)


def check_slots(start: Start, slots: tuple[str, ...], optimizer: Optimizer) -> None:
    """Raise ValueError where the state has other slots than the optimizer keeps as it is set."""
    if start.slots.keys() != set(slots) and start.slots:
        names = optimizer.slot_names
        raise ValueError(
            f"state.slots has {sorted(names[s] for s in start.slots)}, but {type(optimizer).__name__} as it is set "
            f"keeps {sorted(names[s] for s in slots)}"
        )
