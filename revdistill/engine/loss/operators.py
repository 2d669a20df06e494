"""torch's errors about operators that cannot be differentiated twice or repeated, as UnsupportedErrors that say why."""

from __future__ import annotations

import os

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.checkpointing import NOT_THE_SAME

CUBLAS_VARIABLE, CUBLAS_SETTINGS = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
CHANGED_IN_PLACE = (
    "the loss (or on_step) changes {} in place, so a second evaluation would see other values; compute new tensors "
    "instead"
)

COMPILED = (
    "{} torch.compile made, which has no second derivatives; call the original function, and give compile=True to "
    "rd.unroll"
)


def name_error(error: RuntimeError) -> None:
    """Name what an evaluation of the loss or its derivatives cannot do, where torch's error is about that.

    Args:
        error: what the evaluation raised.

    Raises:
        UnsupportedError: an operator has no second derivatives, does not repeat itself to the bit, has a sparse
            gradient, or an argument was changed in place, or activation checkpointing computed other values again or
            cannot.
    """
    reason = _reason(str(error))
    if reason is not None:
        raise UnsupportedError(f"{reason}. torch said: {error}") from error


def is_named(error: RuntimeError) -> bool:
    """Whether `name_error` names it."""
    return _reason(str(error)) is not None


def _reason(text: str) -> str | None:
    """Why the operator cannot serve and what to do; None for any other error."""
    if "CuBLAS" in text and CUBLAS_VARIABLE in text:
        return _why_cublas_refuses()
    if "does not have a deterministic implementation" in text:
        return (
            "the loss uses an operator that has no deterministic implementation on this device, so the way back could "
            "differ; replace it, or use adjoint=rd.Backprop(), which needs no second evaluation"
        )
    if (
        "differentiate twice" in text
        or ("derivative for" in text and "is not implemented" in text)
        or ("double backwards is not supported" in text)
    ):
        return (
            "the loss uses an operator without second derivatives, which a hypergradient needs; replace it by one "
            "built of differentiable operations (for cuDNN recurrent layers: torch.backends.cudnn.flags(enabled=False))"
        )
    if "does not currently support double backward" in text:
        return COMPILED.format("the loss calls a function that")
    if "support the deepcopy protocol" in text:
        return (
            "the loss copies params by copy.deepcopy, which torch does for leaves only; call the module with copies of "
            "them: torch.func.functional_call(net, {name: p.detach().clone() for name, p in "
            "net.named_parameters()}, ...)"
        )
    if "modified by an inplace operation" in text:
        return (
            "a tensor that the gradient is computed from was changed in place after the loss had used it: by the loss "
            "itself (compute new tensors instead), or between the forward and the backward pass, as load_state_dict, "
            "an optimizer's step and .copy_() do (change it after backward())"
        )
    if "backward an extra time" in text:
        return (
            "the loss uses selective activation checkpointing (create_selective_checkpoint_contexts), through which "
            "torch goes back once only, and a hypergradient goes back twice; checkpoint without context_fn, or not at "
            "all"
        )
    if text.startswith("torch.utils.checkpoint: "):
        return NOT_THE_SAME
    if "setup_context staticmethod" in text:
        return (
            "the loss calls a torch.autograd.Function under torch.func.vmap (rd.stack_modules), which it has no rule "
            "for; give it setup_context and generate_vmap_rule = True, or train each network by rd.from_module"
        )
    if "atching rule not implemented" in text:
        return (
            "the loss uses an operator that torch.func.vmap cannot call for several networks at once "
            "(rd.stack_modules); train each network by rd.from_module (spectral_norm: or put it in .eval())"
        )
    if "accessing `data` under vmap" in text:
        return (
            "the loss takes a tensor's .data under torch.func.vmap (rd.stack_modules), which does not allow it; take "
            "detach() to read it, or train each network by rd.from_module"
        )
    if "not implemented for sparse tensors" in text:
        return (
            "the loss has a sparse gradient, which has no way back; make it dense: "
            "torch.nn.Embedding(..., sparse=False)"
        )
    if "is a view and its base or another view of its base has been modified inplace" in text:
        return CHANGED_IN_PLACE.format("params or a batch")
    return None


def _why_cublas_refuses() -> str:
    accepted, found = " or ".join(CUBLAS_SETTINGS), os.environ.get(CUBLAS_VARIABLE)
    if found not in CUBLAS_SETTINGS:
        return (
            "matrix products on a GPU repeat themselves to the bit only where the environment variable "
            f"{CUBLAS_VARIABLE} is {accepted}, and here it is {found!r}; set it so before the process starts, or unset "
            "it (importing revdistill sets it)"
        )
    return (
        f"torch reads the environment variable {CUBLAS_VARIABLE} once, at the process's first matrix product on a GPU, "
        "and it was not set by then: import revdistill, which sets it, before anything is computed there, or start the "
        f"process with {CUBLAS_VARIABLE}={CUBLAS_SETTINGS[0]}"
    )
