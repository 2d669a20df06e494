"""What must be the same on all ranks: what goes in, theta along the way, and what the way back begins with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.errors import ReversalError, UnsupportedError
from revdistill.engine.integers.fingerprint import fingerprint_of
from revdistill.engine.ranks.group import Ranks

STEPS = 64  # between two comparisons of theta
_HALF = 2**32
# Of what other numbers of threads, or other processors, make of the same sums.
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-9}


def halves(number: int) -> tuple[float, float]:
    """64 bits as two numbers that float64 holds."""
    number %= 2**64
    return float(number // _HALF), float(number % _HALF)


def whole(high: float, low: float) -> int:
    """The inverse of `halves`, for numbers from 0."""
    return int(high) * _HALF + int(low)


def others(rows: Tensor) -> list[int]:
    """The ranks that have another row than rank 0. rows: [ranks, n]."""
    return [r for r in range(1, len(rows)) if not torch.equal(rows[r], rows[0])]


def check_same(ranks: Ranks, given: Mapping[str, Any]) -> None:
    """Check that all ranks were given the same.

    Args:
        ranks: that meet here.
        given: by the argument's name something that JSON takes: what is compared.

    Raises:
        ValueError: names the argument and the ranks.
    """
    ranks.meet("the arguments")
    rows = [json.loads(text) for text in ranks.texts(json.dumps(given))]
    for name, mine in rows[0].items():
        for r, row in enumerate(rows):
            if row.get(name) != mine:
                raise ranks.for_all(
                    ValueError(_NOT_SAME.format(name, r) + _in_words(mine, row.get(name)) + _REMEDY.get(name, ""))
                )


def seed_of_first(ranks: Ranks, seed: int, *, given: bool) -> int:
    """Rank 0's seed, at a meeting. given: whether the user gave it. Raises: ValueError where others were given."""
    rows = ranks.meet("the seed", -1, *halves(seed), given)
    seeds = [whole(high, low) if is_given else None for high, low, is_given in rows[:, :3].tolist()]
    if any(other != seeds[0] for other in seeds):
        rank = next(r for r, other in enumerate(seeds) if other != seeds[0])
        raise ranks.for_all(ValueError(_NOT_SAME.format("seed", rank) + f": {seeds[0]} and {seeds[rank]}"))
    return whole(*rows[0, :2].tolist())


_NOT_SAME = "{} must be the same on all ranks of the group, but is not on ranks 0 and {}"


_REMEDY = {
    "params": "; seed torch alike on all ranks before the module is made, or send rank 0's parameters to the others by "
    "torch.distributed.broadcast",
}


def _in_words(a: Any, b: Any) -> str:
    plain = all(v is None or isinstance(v, (bool, int, float, str)) for v in (a, b))
    return f": {a!r} and {b!r}" if plain else ""


def compare_theta(ranks: Ranks, k: int, numbers: Tensor, step: int) -> None:
    """Check that theta is the same on all ranks.

    Args:
        ranks: that meet here.
        k: the step.
        numbers: int64, of theta.
        step: its number in the whole training, for the message.

    Raises:
        ReversalError: it is not.
    """
    rows = ranks.meet("a comparison of theta", k, *halves(fingerprint_of(numbers)))
    found = others(rows)
    if found:
        raise ranks.for_all(
            ReversalError(
                f"theta on ranks {found} is not what it is on rank 0 after {step} steps: the ranks have drifted apart, "
                "and the hypergradient would be none of one training. Nothing on a rank may change theta but the "
                "steps, and all must have the same torch and the same kind of processor"
            )
        )


def of_first(ranks: Ranks, bars: Sequence[Tensor]) -> list[Tensor]:
    """Rank 0's dL/d(the unroll's results), where the others' are the same up to rounding.

    Args:
        ranks: that meet here.
        bars: float, of the same shapes on all ranks.

    Returns:
        The same bits on all ranks.

    Raises:
        UnsupportedError: they differ by more.
    """
    mixed = 0
    for bar in bars:
        mixed = (mixed * 1_000_003 + fingerprint_of(bar)) % 2**64
    numbers = sum(bar.numel() for bar in bars)
    met = ranks.meet("the start of the backward pass", -1, *halves(mixed), float(numbers))
    other = others(met[:, 2:])
    if other:
        raise ranks.for_all(
            ValueError(
                "outputs and chunk_size must be the same on all ranks of the group: rank 0 goes back with "
                f"{int(met[0, 2])} numbers at once, rank {other[0]} with {int(met[other[0], 2])}"
            )
        )
    if not others(met):
        return list(bars)
    found = [ranks.first(bar) for bar in bars]
    apart = max(difference(bar, its) for bar, its in zip(bars, found, strict=True))
    worst = ranks.meet("the start of the backward pass", -1, apart)[:, 0]
    allowed = ROUNDING[bars[0].dtype]
    if not bool((worst <= allowed).all()):
        rank = int(worst.nan_to_num(nan=float("inf")).argmax())
        raise ranks.for_all(
            UnsupportedError(
                f"dL/dtheta is not the same on ranks 0 and {rank} (relative difference {float(worst[rank]):.1e}): what "
                "is computed from the result of an unroll with group= must be the same on all ranks. Where each rank "
                "computes a part of the outer loss, let theta go through rd.distributed.copy and the sum of the parts "
                "through rd.distributed.sum"
            )
        )
    return found


def difference(bar: Tensor, its: Tensor) -> float:
    """The largest of the rows' relative differences: a short row has its own."""
    lengths = torch.linalg.vector_norm(its, dim=-1, dtype=torch.float64)
    differences = torch.linalg.vector_norm(bar - its, dim=-1, dtype=torch.float64)
    found = torch.where(differences > 0, differences / lengths, differences)  # NaN stays, and of 0 it is infinite
    return float(found.max())
