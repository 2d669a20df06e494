"""Differentiate through a whole training run, exactly, in the memory of one step."""

import importlib
from typing import TYPE_CHECKING, Any

from revdistill._checkout import find_the_command
from revdistill.attribute.attribution import Attribution
from revdistill.attribute.metagradient import attribute
from revdistill.engine import (
    SGD,
    Adam,
    AdamW,
    ArtifactError,
    Backprop,
    BackwardNorms,
    Checkpoint,
    CompileWarning,
    Minibatches,
    NonFiniteError,
    OptimizerState,
    RangeError,
    RankError,
    RevdistillError,
    ReversalError,
    Reversible,
    RMSprop,
    StoreAll,
    UnrollStats,
    UnsupportedError,
    from_module,
    jacobian,
    stack_modules,
    unroll,
)
from revdistill.outer.orders import epochs

if TYPE_CHECKING:
    from revdistill import distributed
    from revdistill.outer.tensorboard import TensorBoard
    from revdistill.tune.schedule import Schedule, ScheduleLR, schedule_lr

__version__ = "0.2.0"  # setup.cfg reads it here; CITATION.cff and CHANGELOG.md say the same

find_the_command()

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "ArtifactError",
    "Attribution",
    "Backprop",
    "BackwardNorms",
    "Checkpoint",
    "CompileWarning",
    "Minibatches",
    "NonFiniteError",
    "OptimizerState",
    "RMSprop",
    "RangeError",
    "RankError",
    "ReversalError",
    "RevdistillError",
    "Reversible",
    "StoreAll",
    "UnrollStats",
    "Schedule",
    "ScheduleLR",
    "TensorBoard",
    "UnsupportedError",
    "attribute",
    "distributed",
    "epochs",
    "from_module",
    "jacobian",
    "schedule_lr",
    "stack_modules",
    "unroll",
]


def __getattr__(name: str) -> Any:
    """What reads files is imported when it is asked for: the engine alone needs no h5py."""
    if name in ("Schedule", "ScheduleLR", "schedule_lr"):
        from revdistill.tune import schedule

        return getattr(schedule, name)
    if name == "TensorBoard":
        from revdistill.outer import tensorboard

        return tensorboard.TensorBoard
    if name == "distributed":
        return importlib.import_module("revdistill.distributed")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What users call, and nothing that is imported for it."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__") and name.endswith("__"))})
