"""Every error the library raises on purpose, beside the ValueError and TypeError of a wrong argument."""

from __future__ import annotations


class RevdistillError(Exception):
    """Base of all errors below: catch this to catch anything the library reports on purpose."""


class ReversalError(RevdistillError):
    """The way back did not end bit-exactly at the start, so no hypergradient is returned."""


class RangeError(RevdistillError):
    """A value left the fixed-point range.

    Attributes: `parameter` (its name), `step` (inner step, from 0; -1 for the start), `value` (the offending float).
    """

    def __init__(self, message: str, *, parameter: str, step: int, value: float) -> None:
        super().__init__(message)
        self.parameter, self.step, self.value = parameter, step, value


class NonFiniteError(RevdistillError):
    """A loss, a gradient or a Hessian product is not finite.

    Attributes: `parameter` (its name, or None when only the loss is not finite), `step` (inner step, from 0).
    """

    def __init__(self, message: str, *, parameter: str | None, step: int) -> None:
        super().__init__(message)
        self.parameter, self.step = parameter, step


class UnsupportedError(RevdistillError):
    """A combination that cannot be had; the message names the alternative."""


class RankError(RevdistillError):
    """Another process of a torch.distributed group failed, or is gone, so that this one cannot go on.

    Attributes: `rank` (of the process that failed; None where it is not known).
    """

    def __init__(self, message: str, *, rank: int | None) -> None:
        super().__init__(message)
        self.rank = rank


class ArtifactError(RevdistillError):
    """A file that is not a valid artifact, checkpoint or dataset; the message names the file and what is wrong
    with it.
    """
