"""Exact reversible unrolling; knows nothing of distillation, datasets, files or the command line."""

from revdistill.engine.adjoints.adjoint import Adjoint, UnrollStats
from revdistill.engine.adjoints.backprop import Backprop
from revdistill.engine.adjoints.checkpoint import Checkpoint
from revdistill.engine.adjoints.norms import BackwardNorms
from revdistill.engine.adjoints.reversible import Reversible
from revdistill.engine.adjoints.store_all import StoreAll
from revdistill.engine.compiling import CompileWarning
from revdistill.engine.errors import (
    ArtifactError,
    NonFiniteError,
    RangeError,
    RankError,
    RevdistillError,
    ReversalError,
    UnsupportedError,
)
from revdistill.engine.integers.fixedpoint import FixedPoint
from revdistill.engine.jacobian import jacobian
from revdistill.engine.loss.from_module import from_module, stack_modules
from revdistill.engine.loss.minibatches import Minibatches
from revdistill.engine.optimizer_state import OptimizerState
from revdistill.engine.optimizers.adam import Adam, AdamW
from revdistill.engine.optimizers.optimizer import Optimizer
from revdistill.engine.optimizers.rmsprop import RMSprop
from revdistill.engine.optimizers.sgd import SGD
from revdistill.engine.unroll import unroll

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Adjoint",
    "ArtifactError",
    "Backprop",
    "BackwardNorms",
    "Checkpoint",
    "CompileWarning",
    "FixedPoint",
    "Minibatches",
    "NonFiniteError",
    "Optimizer",
    "OptimizerState",
    "RMSprop",
    "RangeError",
    "RankError",
    "Reversible",
    "ReversalError",
    "RevdistillError",
    "StoreAll",
    "UnrollStats",
    "UnsupportedError",
    "from_module",
    "jacobian",
    "stack_modules",
    "unroll",
]
