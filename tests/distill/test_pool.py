"""A pool of networks of different ages: whose turn it is, and what it has learned, against a plain loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revdistill as rd
from revdistill.distill import checkpoint as checkpoints
from revdistill.distill.config import Config
from revdistill.distill.distillation import Distillation
from revdistill.distill.distiller import Distiller
from revdistill.outer.data import load
from revdistill.outer.random_streams import NETWORKS, POOL, POOL_AGE, generator, mix
from revdistill.outer.ranks import Processes

WINDOW, STEPS, MEMBERS = 2, 6, 2
CONFIG = Config(
    dataset="blobs",
    architectures=("LinearNet", "NonLinearNet"),
    steps=3,
    epochs=2,
    inits=1,
    outer_steps=9,
    batch_size=64,
    window=WINDOW,
    pool=MEMBERS,
    momentum=0.8,
    clip=0.0,
    lr=0.1,
    outer_lr=0.02,
)
BLOBS = load("blobs")
SHAPES: dict[str, Callable[[], nn.Module]] = {
    "LinearNet": lambda: nn.Linear(2, 4),
    "NonLinearNet": lambda: nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 4)),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.8, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.0, betas=(0.8, 0.999), weight_decay=0.01),
}


@dataclass
class Plain:
    """What torch.optim trains."""

    age: int
    nets: list[nn.Module]
    optimizers: list[torch.optim.Optimizer]

    def train(self, steps: int, x: Tensor, y: Tensor, lr: Tensor) -> None:
        for k in range(self.age, self.age + steps):
            for net, optimizer in zip(self.nets, self.optimizers, strict=True):
                optimizer.param_groups[0]["lr"] = float(lr[k])
                optimizer.zero_grad()
                F.cross_entropy(net(x[k % 3]), y[k % 3]).backward()
                optimizer.step()
        self.age += steps


def fresh(distiller: Distiller, optimizer: str, k: int) -> Plain:
    nets = [SHAPES[name]() for name in CONFIG.architectures]
    for i, (net, stack) in enumerate(zip(nets, distiller.stacks, strict=True)):
        drawn = stack.sample(mix(0, NETWORKS, k, i))
        with torch.no_grad():
            for own, p in zip(net.parameters(), drawn.values(), strict=True):
                own.copy_(p[0])
    return Plain(0, nets, [OPTIMIZERS[optimizer](net.parameters()) for net in nets])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_step_is_a_plain_loops(optimizer: str) -> None:
    """The member drawn, its age, the loss on real data after its next steps, and its parameters; on changing data."""
    rates = {"sgd": 0.1, "adam": 0.02}
    distiller = Distiller(replace(CONFIG, optimizer=optimizer, weight_decay=0.01, lr=rates[optimizer]), BLOBS)
    assert distiller.pool is not None
    members: list[Plain | None] = [None] * MEMBERS
    renewed, ages = 0, set()
    for k in range(CONFIG.outer_steps):
        made = distiller.synthetic
        given = made.x.detach().clone(), made.labels(), made.lr().detach().clone()
        number = int(torch.randint(MEMBERS, (), generator=generator(0, POOL, k)))
        member = members[number]
        if member is None or member.age + WINDOW > STEPS:
            oldest = STEPS - WINDOW if member is None else WINDOW - 1
            age = int(torch.randint(oldest + 1, (), generator=generator(0, POOL_AGE, k)))
            renewed += member is not None
            member = fresh(distiller, optimizer, k)
            member.train(age, *given)
        ages.add(member.age)
        member.train(WINDOW, *given)
        members[number] = member
        x, y = distiller._batches(k)
        loss = torch.stack([F.cross_entropy(net(x), y) for net in member.nets]).mean().item()
        assert distiller.step().loss == pytest.approx(loss, rel=1e-4)
        found = distiller.pool.members[number]
        assert found is not None
        assert found.age == member.age
        for net, params in zip(member.nets, found.params, strict=True):
            for own, p in zip(net.parameters(), params.values(), strict=True):
                torch.testing.assert_close(p[0], own.detach(), rtol=1e-3, atol=1e-4)
    assert renewed
    assert {0, 2} < ages
    assert [m and m.age for m in distiller.pool.members] == [m and m.age for m in members]


def test_the_hypergradient_is_autograds() -> None:
    """Through a member's next steps from where it is, momentum and all, in float64; nothing before them counts."""
    distiller = Distiller(replace(CONFIG, pool=1, outer_steps=40), BLOBS)
    assert distiller.pool is not None
    for _ in range(20):
        (member,) = distiller.pool.members
        if member is not None and 0 < member.age <= STEPS - WINDOW:
            break
        distiller.step()
    assert member is not None
    first = member.age
    leaves = {n: leaf.detach().double().requires_grad_() for n, leaf in distiller.synthetic.leaves.items()}
    x, y = distiller._batches(distiller.outer_step)
    losses = []
    for name, params, slots in zip(CONFIG.architectures, member.params, member.slots, strict=True):
        theta = [p[0].double() for p in params.values()]
        v = [b[0].double() for b in slots["momentum_buffer"].values()]
        theta = [t.requires_grad_() for t in theta]

        def logits(theta: list[Tensor], x: Tensor, hidden: bool) -> Tensor:
            x = x @ theta[0].T + theta[1]
            return x.relu() @ theta[2].T + theta[3] if hidden else x

        hidden = name == "NonLinearNet"
        for k in range(first, first + WINDOW):
            inner = F.cross_entropy(logits(theta, leaves["x"][k % 3], hidden), distiller.synthetic.labels()[k % 3])
            grads = torch.autograd.grad(inner, theta, create_graph=True)
            v = [0.8 * b + g for b, g in zip(v, grads, strict=True)]
            theta = [t - F.softplus(leaves["raw_lr"][k]) * b for t, b in zip(theta, v, strict=True)]
        losses.append(F.cross_entropy(logits(theta, x.double(), hidden), y))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    distiller.step()
    for leaf, grad in zip(distiller.synthetic.leaves.values(), expected, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), grad, rtol=1e-3, atol=1e-6)
    assert int((expected[1] != 0).sum()) == WINDOW


def own_network(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """With a layer whose name is no name for a dataset in a file."""
    return nn.Sequential(nn.Linear(input_shape[0], classes), Named(classes))


class Named(nn.ModuleDict):
    """One layer, called a/b."""

    def __init__(self, classes: int) -> None:
        super().__init__({"a/b": nn.Linear(classes, classes)})

    def forward(self, x: Tensor) -> Tensor:
        return self["a/b"](x)  # type: ignore[no-any-return]


def test_resuming_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pool, and of clipping at a multiple of the running mean."""
    names = ("LinearNet", f"{__name__}:own_network")
    config = replace(CONFIG, architectures=names, optimizer="adam", lr=0.02, clip_mean=1.01, outer_steps=8)
    monkeypatch.setattr("revdistill.distill.distillation.RESTARTS", 1)
    whole = Distillation(tmp_path / "whole", Distiller(config, BLOBS)).run()
    step = Distiller.step

    class Killed(BaseException):
        pass

    def dying(self: Distiller) -> Any:
        if self.outer_step == 5:
            raise Killed
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "step", dying)
        with pytest.raises(Killed):
            Distillation(tmp_path / "part", Distiller(config, BLOBS), save_every=0.0).run()
    resumed = Distillation(tmp_path / "part", Distiller(config, BLOBS), resume=True)
    assert resumed.distiller.pool is not None
    assert any(member is not None and member.age for member in resumed.distiller.pool.members)
    result = resumed.run()
    assert all(np.array_equal(getattr(result, name), getattr(whole, name)) for name in ("x", "y", "lr", "momentum"))
    assert result.evaluation == whole.evaluation


def test_a_member_that_diverges_is_renewed() -> None:
    distiller = Distiller(replace(CONFIG, pool=1), BLOBS)
    assert distiller.pool is not None
    distiller.step()
    before = {name: leaf.detach().clone() for name, leaf in distiller.synthetic.leaves.items()}
    (old,) = distiller.pool.members
    assert old is not None
    with torch.no_grad():
        distiller.synthetic.leaves["raw_lr"].fill_(1e12)
    for k in (1, 2):  # the member's own steps, and then those that a new one makes before or in its turn
        assert distiller.step().diverged
        assert distiller.outer_step == k + 1
        assert distiller.pool.members == [None]
    with torch.no_grad():
        distiller.synthetic.leaves["raw_lr"].copy_(before["raw_lr"])
    assert distiller.step().diverged is None
    (new,) = distiller.pool.members
    assert new is not None
    for a, b in zip(old.params, new.params, strict=True):
        assert not any(torch.equal(a[name], b[name]) for name in a)


class Two(Processes):
    """As torchrun would have started them."""

    def __init__(self) -> None:
        super().__init__()
        self.started = True


def test_what_a_pool_does_not_go_with() -> None:
    for changes, message in (
        ({"window": None}, "pool is 2; accepted is 0 without a window: give window as well"),
        ({"grow": 0.5}, "pool is 2; accepted is 0 with grow"),
        ({"pool": -1}, "pool is -1; accepted is an integer from 0 to"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(CONFIG, **changes)
    with pytest.raises(ValueError, match="pool keeps networks in one process; leave it out under torchrun"):
        Distiller(CONFIG, BLOBS, Two())


def test_checkpoints(tmp_path: Path) -> None:
    """Those of earlier releases are read; a pool that is not this run's is refused, and changes nothing."""
    new = ("pack", "bases", "smooth", "zca", "clip_mean", "window_every", "pool")
    path = tmp_path / "checkpoint.h5"
    before = Distiller(replace(CONFIG, pool=0), BLOBS)
    before.step()
    checkpoints.save(path, before)
    with h5py.File(path, "a") as file:
        config = json.loads(file.attrs["config"])
        file.attrs["config"] = json.dumps({name: value for name, value in config.items() if name not in new})
    again = Distiller(checkpoints.read_config(path), BLOBS)
    checkpoints.restore(path, again)
    assert before.step() == again.step()
    pooled = Distiller(replace(CONFIG, clip_mean=2.0), BLOBS)
    for _ in range(3):
        pooled.step()
    checkpoints.save(path, pooled)
    whole = path.read_bytes()
    with h5py.File(path) as file:
        kept = sorted(name for name in file if name.startswith("pool."))
    for name, values in (
        ("pool.ages", np.array([1])),
        ("pool.ages", np.array([1, STEPS + 1])),
        ("pool.ages", np.array([0.5, 1])),
        (kept[0], np.zeros((1, 7), np.float32)),
        (kept[0], None),
        ("norm_mean", -1.0),
    ):
        path.write_bytes(whole)
        with h5py.File(path, "a") as file:
            if isinstance(values, float):
                file.attrs[name] = values
            else:
                del file[name]
                if values is not None:
                    file[name] = values
        other = Distiller(replace(CONFIG, clip_mean=2.0), BLOBS)
        leaves = [leaf.detach().clone() for leaf in other.synthetic.leaves.values()]
        with pytest.raises(rd.ArtifactError, match=name):
            checkpoints.restore(path, other)
        assert all(torch.equal(a, b) for a, b in zip(leaves, other.synthetic.leaves.values(), strict=True))
        assert other.pool is not None
        assert other.pool.members == [None] * MEMBERS
