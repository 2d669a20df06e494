"""How long dL/dtheta_k is at each step of the way back, and where it explodes."""

from __future__ import annotations


class BackwardNorms:
    """For rd.unroll(on_step_back=...): keeps the norm of dL/dtheta_k of each step of the last way back.

    norms: by step k; empty before the first backward pass.
    """

    def __init__(self) -> None:
        self.norms: dict[int, float] = {}
        self._last = 0

    def __call__(self, k: int, norm: float) -> None:
        if k >= self._last:  # another way back begins: each goes down
            self.norms = {}
        self.norms[k], self._last = norm, k

    def __repr__(self) -> str:
        if not self.norms:
            return "BackwardNorms(no way back yet)"
        at, first = self.explosion(), f"{self.norms[max(self.norms)]:.4g} at step {max(self.norms)}"
        exploding = "" if at is None else f", explodes from step {at} down"
        return f"BackwardNorms({first}, {self.norms[min(self.norms)]:.4g} at step {min(self.norms)}{exploding})"

    def explosion(self, factor: float = 1_000.0) -> int | None:
        """The step k, met first on the way back, where the norm passes `factor` times the smallest met before it; None
        if none.

        From there to step 0 the hypergradient is dominated by what grew: a smaller learning rate, a `window` that ends
        after k, or `clip_back` keeps the rest of it useful.
        """
        smallest = float("inf")
        for k in sorted(self.norms, reverse=True):
            if self.norms[k] > factor * smallest:
                return k
            if self.norms[k] > 0:
                smallest = min(smallest, self.norms[k])
        return None
