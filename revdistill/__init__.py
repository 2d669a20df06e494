"""Differentiate through a whole training run, exactly, in the memory of one step."""

from importlib.metadata import version

from revdistill.engine import (
    SGD,
    Adam,
    AdamW,
    ArtifactError,
    Backprop,
    BackwardNorms,
    Checkpoint,
    CompileWarning,
    NonFiniteError,
    RangeError,
    RevdistillError,
    ReversalError,
    Reversible,
    StoreAll,
    UnrollStats,
    UnsupportedError,
    from_module,
    stack_modules,
    unroll,
)

__version__ = version("revdistill")
__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "ArtifactError",
    "Backprop",
    "BackwardNorms",
    "Checkpoint",
    "CompileWarning",
    "NonFiniteError",
    "RangeError",
    "ReversalError",
    "RevdistillError",
    "Reversible",
    "StoreAll",
    "UnrollStats",
    "UnsupportedError",
    "from_module",
    "stack_modules",
    "unroll",
]
