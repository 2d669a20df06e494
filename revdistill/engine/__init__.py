"""Exact reversible unrolling; knows nothing of distillation, datasets, files or the command line."""

from revdistill.engine.adjoints.norms import BackwardNorms
from revdistill.engine.adjoints.recordings import UnrollStats
from revdistill.engine.adjoints.reversible import Backprop, Checkpoint, Reversible, StoreAll
from revdistill.engine.errors import (
    ArtifactError,
    NonFiniteError,
    RangeError,
    RevdistillError,
    ReversalError,
    UnsupportedError,
)
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.loss.compiling import CompileWarning
from revdistill.engine.loss.from_module import from_module, stack_modules
from revdistill.engine.optimizers.adam import Adam, AdamW
from revdistill.engine.optimizers.sgd import SGD
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
