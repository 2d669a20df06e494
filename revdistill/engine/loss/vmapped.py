"""torch's errors about what torch.func.vmap cannot evaluate, as UnsupportedErrors that say what to do instead."""

from __future__ import annotations

import re
import traceback
from types import CodeType

from revdistill.engine.errors import UnsupportedError
from revdistill.engine.loss.gradient import BACKWARD_INSIDE
from revdistill.engine.loss.operators import is_named

# What an error says, and what can be written instead. The first that fits.
_REMEDIES = (
    ((".item()", "control flow"), "keep the number a tensor, with torch.where in the place of if"),
    (
        ("inplace randomness",),
        "make the random numbers out of place (torch.randn(...), torch.rand_like(x), dropout without inplace=True)",
    ),
    (
        ("extra_args", "broadcast shape"),
        "write z = z + h in the place of z += h, or make what is written to from a tensor of the network: "
        "h.new_zeros(...)",
    ),
    (("dynamic shape", "masked_select"), "keep the shape: torch.where(mask, x, 0) in the place of x[mask]"),
    (("storage",), "stay in torch: no .numpy(), .tolist(), data_ptr() or copy.deepcopy"),
    (("requires_grad_()",), "take derivatives within the loss by torch.func.grad or torch.func.vjp"),
)
_BROADCAST = re.compile(r"^output with shape \[(.*)\] doesn't match the broadcast shape \[(.*)\]")


def name_vmap(error: RuntimeError, called: CodeType, networks: int) -> None:
    """Name what a loss does that torch.func.vmap cannot evaluate, where torch's error is about that.

    Args:
        error: what the evaluation raised.
        called: the code of the function that vmap called.
        networks: how many were evaluated at once.

    Raises:
        UnsupportedError: one network alone would not have raised the error.
    """
    text = str(error)
    if is_named(error) or not _is_of_vmap(text, networks) or _within_its_own(error, called, text):
        return
    if "backward() called" in text:
        raise UnsupportedError(BACKWARD_INSIDE) from error
    instead = next((f"{words}, or " for signs, words in _REMEDIES if any(sign in text for sign in signs)), "")
    raise UnsupportedError(
        f"torch.func.vmap cannot evaluate this loss for several networks at once (rd.stack_modules); {instead}train "
        f"each network by rd.from_module. torch said: {text.splitlines()[0]}"
    ) from error


def _is_of_vmap(text: str, networks: int) -> bool:
    """Whether it speaks of vmap, or of a tensor that stands for several and so has no memory of its own."""
    shapes = _BROADCAST.match(text)
    if shapes is not None:  # written into a tensor that all networks share: one alone fits
        return shapes[2] == f"{networks}, {shapes[1]}".removesuffix(", ")
    return any(sign in text for sign in ("vmap", "functorch", "BatchedTensor", "that doesn't have storage"))


def _within_its_own(error: RuntimeError, called: CodeType, text: str) -> bool:
    """Whether it came from within a transform that the loss itself calls, and so may be of that one."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    if called not in codes:
        return True  # the arguments do not fit
    transform = "_functorch/vmap.py" if "vmap" in text else "_functorch/"
    inside = codes[codes.index(called) + 1 :]
    return any(transform in code.co_filename.replace("\\", "/") for code in inside)
