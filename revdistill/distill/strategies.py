"""Step sizes for training on distilled data, longer than they were learned for.

The study's strategies: what to do with the T = s x epochs learned rates when a network is trained for 50 epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Rates = list[float]
LONG = 50  # epochs


def raw(lr: Sequence[float], batches: int) -> Rates:
    """The learned steps as they are."""
    return list(lr)


def strategy1(lr: Sequence[float], batches: int) -> Rates:
    """Ignore the learned rates: 0.3, then x 1.1 per epoch for 10 epochs (peak 0.778), then x 0.95 per epoch (end
    0.100).

    As in the study's own list the change comes one step late: step 0 has 0.3, steps 1 to s have 0.33, and so on.
    """
    rates, rate = [0.3], 0.3
    for epoch in range(LONG):
        rate *= 1.1 if epoch < 10 else 0.95
        rates += [rate] * batches
    return rates[: LONG * batches]


def strategy2(lr: Sequence[float], batches: int) -> Rates:
    """Repeat the learned epochs up to 50 epochs, rates x 0.9 per repetition."""
    rates: Rates = []
    factor = 1.0
    while len(rates) < LONG * batches:
        rates += [rate * factor for rate in lr]
        factor *= 0.9
    return rates[: max(LONG * batches, len(lr))]


def strategy3(lr: Sequence[float], batches: int) -> Rates:
    """After the learned epochs keep repeating the last epoch's rates, x 0.98 per epoch, up to 50 epochs."""
    rates, last = list(lr), list(lr[-batches:])
    factor = 1.0
    while len(rates) < LONG * batches:
        factor *= 0.98
        rates += [rate * factor for rate in last]
    return rates


STRATEGIES: dict[str, Callable[[Sequence[float], int], Rates]] = {
    "raw": raw,
    "strategy1": strategy1,
    "strategy2": strategy2,
    "strategy3": strategy3,
}


def momentum_for(rates: Rates, momentum: Sequence[float]) -> list[float]:
    """The learned momenta, the last of them again and again: the strategies say nothing of momentum."""
    if len(rates) <= len(momentum):
        return list(momentum[: len(rates)])
    return list(momentum) + [momentum[-1]] * (len(rates) - len(momentum))


def plan(strategy: str, lr: Sequence[float], momentum: Sequence[float], batches: int) -> tuple[Rates, list[float]]:
    """What every step of training has, by one of the strategies.

    Strategy 1 has rates for plain gradient descent; with momentum they are scaled by 1 - momentum, so that steps have
    the same length.

    Args:
        strategy: a name of STRATEGIES.
        lr: the learned step sizes.
        momentum: the learned momenta.
        batches: s.

    Returns:
        The step sizes and the momenta.
    """
    rates = STRATEGIES[strategy](lr, batches)
    momenta = momentum_for(rates, momentum)
    if strategy == "strategy1":
        rates = [rate * (1 - m) for rate, m in zip(rates, momenta, strict=True)]
    return rates, momenta
