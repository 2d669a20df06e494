"""Exact reversible unrolling; knows nothing of distillation, datasets, files or the command line."""

from revdistill.engine.adam import Adam, AdamW
from revdistill.engine.adjoints import Backprop, Checkpoint, Reversible, StoreAll
from revdistill.engine.compiling import CompileWarning
from revdistill.engine.errors import (
    ArtifactError,
    NonFiniteError,
    RangeError,
    RevdistillError,
    ReversalError,
    UnsupportedError,
)
from revdistill.engine.fixedpoint import FixedPoint
from revdistill.engine.modules import from_module, stack_modules
from revdistill.engine.norms import BackwardNorms
from revdistill.engine.optimizers import SGD
from revdistill.engine.recordings import UnrollStats
from revdistill.engine.unroll import unroll

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "ArtifactError",
    "Backprop",
    "BackwardNorms",
    "Checkpoint",
    "CompileWarning",
    "FixedPoint",
    "NonFiniteError",
    "RangeError",
    "Reversible",
    "ReversalError",
    "RevdistillError",
    "StoreAll",
    "UnrollStats",
    "UnsupportedError",
    "from_module",
    "stack_modules",
    "unroll",
]
