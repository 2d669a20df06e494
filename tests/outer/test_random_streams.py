"""Random draws: functions of seed, stream and step, whose bits are part of every result."""

from __future__ import annotations

import torch

from revdistill.outer import random_streams as streams
from revdistill.outer.data import load
from revdistill.outer.random_streams import Minibatches, evaluation_seed, generator, mix


def test_the_draws_are_those_of_every_run_so_far() -> None:
    """The numbers of the streams and their mix: another one would give resumed runs other bits."""
    distillation = (streams.MINIBATCHES, streams.NETWORKS, streams.FIXED_NETWORK)
    assert (*distillation, streams.NOISE, streams.HORIZON, streams.AUGMENTATION) == (1, 2, 3, 4, 5, 6)
    assert streams.HELD_OUT == 3
    assert (streams.EXAMPLES, streams.QUERIES, streams.FLIPS) == (7, 8, 9)
    assert mix(7, streams.NETWORKS, 5, 0) == 3798315720834711506
    assert float(torch.rand((), generator=generator(7, streams.NOISE, 5))) == 0.0004914402961730957
    assert evaluation_seed(7) == 2**40 + 7


def test_minibatches_are_epochs_of_the_training_data() -> None:
    data = load("moons")
    draw, again = Minibatches(data, 100, 3), Minibatches(data, 100, 3)
    per_epoch = len(data.x) // 100
    seen = torch.cat([draw(k)[0] for k in range(per_epoch)])
    assert len({tuple(row) for row in seen.tolist()}) == len(
        {tuple(r) for r in data.x.tolist()} & {tuple(r) for r in seen.tolist()}
    )
    assert torch.equal(draw(per_epoch + 1)[0], again(per_epoch + 1)[0])  # whatever was asked for before
    assert not torch.equal(draw(0)[0], draw(per_epoch)[0])
