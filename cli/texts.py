"""What is said of a check, in sentences."""

from __future__ import annotations

from revdistill.attribute.check import Check

LOW = 0.8  # an LDS below which scores are said to tell little
_HELPS = (
    f"an LDS below {LOW} says that the scores tell little of what leaving examples out does: a network with GELU or "
    "softplus in the place of ReLU (--arch), a smaller --lr, fewer --epochs and a larger --eps make training smoother"
)


def check_lines(check: Check) -> list[str]:
    """How well the scores predict true retrainings, and what helps where they do not."""
    low, high = check.interval
    low_mean, high_mean = check.mean_query_interval
    lines = [
        f"LDS {check.mean:.3f} ({low:.3f} to {high:.3f}), mean over {len(check.lds)} queries; of their mean loss "
        f"{check.mean_query:.3f} ({low_mean:.3f} to {high_mean:.3f}): {check.actual.shape[1]} trainings, each without "
        f"{100 * check.drop:.3g} % of the examples",
        f"smoothness {check.smoothness:.2f} (1: leaving examples out goes as the derivative says, 0: as chance does)",
    ]
    advice = check.advice or (_HELPS if check.mean < LOW else None)
    return lines + ([advice] if advice else [])
