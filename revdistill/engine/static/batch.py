"""A batch in static memory, into which each step's is copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revdistill.engine.loss.tree import PLAIN, check_form, form_of, leaves, rebuild, structure_of
from revdistill.engine.static.rows import NoRowsError


class StaticBatch:
    """Made like one batch, which others must be like.

    Args:
        like: tuples, lists and dicts of tensors on the device, and of numbers and texts that are every step's.
        device: of the training.

    Attributes:
        value: the same with tensors of its own in the place of the tensors.
        form: what a batch must be like, to be compared.

    Raises:
        NoRowsError: it holds anything else.
    """

    def __init__(self, like: Any, device: torch.device) -> None:
        try:
            check_form(like, "the batch")
        except TypeError as error:
            raise NoRowsError(str(error)) from error
        for where, leaf in leaves(like, "the batch"):
            if isinstance(leaf, Tensor):
                if leaf.device != device or leaf.layout != torch.strided:
                    raise NoRowsError(f"{where} is on {leaf.device}, {leaf.layout}")
            elif not isinstance(leaf, PLAIN):
                raise NoRowsError(f"{where} is a {type(leaf).__name__}")
        self.form = form_of(like)
        self._leaves = [
            torch.empty_like(t, requires_grad=False).copy_(t) if isinstance(t, Tensor) else t
            for _, t in leaves(like, "")
        ]
        self.value = rebuild(structure_of(like), self._leaves)

    def fits(self, batch: Any) -> bool:
        """Whether another batch can be copied in."""
        return form_of(batch) == self.form

    def copy_(self, batch: Any) -> None:
        """Take another batch's numbers."""
        for mine, (_, other) in zip(self._leaves, leaves(batch, ""), strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(other)
