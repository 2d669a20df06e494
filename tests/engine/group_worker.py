"""What each rank of a group does in test_group: every case is noted, with what was raised, in a file of its own."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import revdistill as rd
from revdistill.engine.adjoints import sweep
from revdistill.engine.adjoints.trajectory import Trajectory
from revdistill.engine.integers.history import DeviceHistory
from revdistill.engine.optimizers.sources import THETA
from tests.engine import reference
from tests.engine.problems import SETTINGS, WITHOUT_WAY_BACK, l2_hyper, optimizer_of, tensors_of
from tests.engine.problems import STEPS as OF_SETTINGS

STEPS = 9
SOME_SETTINGS = (  # moves of all kinds, groups among them; the others are for those who have minutes
    "groups",
    "nesterov",
    "amsgrad",
    "adamw groups",
    "rmsprop centered",
)
Cases = dict[str, Callable[[], Any]]


class World:
    """The group, and this rank's share of batches."""

    def __init__(self) -> None:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.group = dist.group.WORLD

    def share(self, x: Tensor, of: int | None = None) -> Tensor:
        """[s, B / ranks, ...] of [s, B, ...]; that of another rank."""
        return x.chunk(self.size, 1)[self.rank if of is None else of]


def sha(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for t in tensors.values():
        digest.update(t.detach().numpy().tobytes())
    return digest.hexdigest()[:16]


def apart(found: Any, right: Any) -> float:
    """The largest relative difference of several tensors."""
    pairs = list(zip(found, right, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float(((a - b).norm() / b.norm().clamp(min=1e-12)).detach()) for a, b in pairs)


def outer(theta: Mapping[str, Tensor]) -> Tensor:
    return sum(((p - 0.1) ** 3).sum() + p.square().sum() for p in theta.values())  # type: ignore[return-value]


# --- the derivatives -------------------------------------------------------------------------------------------------


def derivatives(world: World, setting: str, every: bool) -> dict[str, float]:
    """Against a loop on whole batches, by autograd: every adjoint, or one; the state whole and in parts."""
    torch.manual_seed(3)
    case = l2_hyper()
    settings = SETTINGS[setting](case)
    leaves = {**case.leaves, **tensors_of(settings)}
    decoupled = setting.startswith("adamw")
    theta = reference.train(case, settings, OF_SETTINGS, lambda k: None, decoupled=decoupled)
    right = torch.autograd.grad(outer(theta), list(leaves.values()), allow_unused=True)
    found = {}
    adjoints: dict[str, Any] = {"Checkpoint": rd.Checkpoint(every=4), "StoreAll": rd.StoreAll(), "default": None}
    if setting not in WITHOUT_WAY_BACK and "no momentum" not in setting:
        adjoints["Reversible"] = rd.Reversible(graph_bytes=0)
    names = sorted(adjoints)
    some = {False: ["default"], True: [names[list(SETTINGS).index(setting) % len(names)]]}
    for shard in (False, True):
        for name in names if every else some[shard]:
            adjoint = adjoints[name]
            theta = rd.unroll(
                case.loss,
                case.params,
                tuple(map(world.share, case.batches)),
                optimizer_of(setting, settings),
                steps=OF_SETTINGS,
                hyper=case.hyper,
                adjoint=adjoint,
                group=world.group,
                shard=shard,
            )
            got = torch.autograd.grad(outer(theta), list(leaves.values()), allow_unused=True)
            pairs = [
                (world.share(a), world.share(b)) if leaf == "batches.0" else (a, b)
                for leaf, a, b in zip(leaves, got, right, strict=True)
                if b is not None
            ]
            found[f"{name}, shard={shard}"] = apart(*zip(*pairs, strict=True))
    return found


class Small:
    """A network, data and what is learned, in float64 unless asked otherwise."""

    def __init__(self, world: World, dtype: torch.dtype = torch.float64, batch: int = 8, dropout: bool = False) -> None:
        torch.manual_seed(5)
        self.world = world
        middle = [nn.Dropout(0.4)] if dropout else []
        self.net = nn.Sequential(nn.Linear(6, 7), nn.GELU(), *middle, nn.Linear(7, 3)).to(dtype)
        self.loss, self.params = rd.from_module(self.net, F.cross_entropy)
        self.params = {name: p.detach().clone().requires_grad_() for name, p in self.params.items()}
        self.x, self.y = torch.randn(3, batch, 6, dtype=dtype), torch.randint(3, (3, batch))
        self.lr = torch.full((STEPS,), 0.05, dtype=dtype, requires_grad=True)

    def unroll(self, *, whole: bool = False, share: int | None = None, steps: int = STEPS, **options: Any) -> Any:
        """This rank's part of it; whole: all of it, on this rank alone."""
        given = dict(options)
        loss, params = given.pop("loss", self.loss), given.pop("params", self.params)
        optimizer = given.pop("optimizer", None) or rd.SGD(self.lr, 0.9)
        if not whole:
            given.setdefault("group", self.world.group)
        x, y = (t if whole else self.world.share(t, share) for t in (self.x, self.y))
        x = x.clone().requires_grad_()
        found = rd.unroll(loss, params, given.pop("batches", (x, y)), optimizer, steps=steps, **given)
        return x, found


def extras(world: World, shard: bool) -> dict[str, Any]:
    """save_at, an average, a window, norms and clipping on the way back, clipping of gradients, callbacks."""
    small, found = Small(world), {}
    plain = list(small.params.values())
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "save_at": lambda: {"save_at": [0, 4, 4, 9]},
        "average": lambda: {"average": 0.8},
        "window": lambda: {"window": 4},
        "clip_back": lambda: {"clip_back": 0.01},
        "max_norm": lambda: {"optimizer": rd.SGD(small.lr, 0.9, max_norm=small.lr[0] * 8)},
        "Adam": lambda: {"optimizer": rd.Adam(small.lr * 0.1, max_norm=0.2)},
    }
    for name, options in made.items():
        results = []
        for whole in (True, False):
            seen, norms = list[Tensor](), rd.BackwardNorms()
            own = {} if whole else {"shard": shard}

            def note(k: int, theta: Mapping[str, Tensor], loss: Tensor, seen: list[Tensor] = seen) -> None:
                seen.append(torch.cat([loss[None], *(p.flatten() for p in theta.values())]))

            x, got = small.unroll(whole=whole, on_step=note, on_step_back=norms, **options(), **own)
            theta, average = got if name == "average" else (got, {})
            total = outer(theta) + (outer(average) if average else 0)
            inputs = [x, small.lr, *([] if name == "window" else plain)]
            grads = torch.autograd.grad(total, inputs)
            steps = torch.tensor([norms.norms[k] for k in sorted(norms.norms)])
            share = world.share(grads[0]) if whole else grads[0]
            results.append([*theta.values(), *average.values(), share, *grads[1:], torch.stack(seen), steps])
        found[name] = apart(results[1], results[0])
    return found


def many_outputs(world: World, shard: bool) -> dict[str, float]:
    """rd.jacobian, in chunks, and torch.func.vmap."""
    small, found = Small(world), []
    v = torch.randn(5, sum(p.numel() for p in small.params.values()), dtype=torch.float64)
    for whole in (True, False):
        own = {} if whole else {"shard": shard}
        rows = []
        for way in ("jacobian", "vmap"):
            x, theta = small.unroll(whole=whole, **own)
            flat = torch.cat([p.flatten() for p in theta.values()])
            outputs = (v @ flat).tanh()
            inputs = [x, small.lr, small.params["0.weight"]]
            if way == "jacobian":
                got = list(rd.jacobian(outputs, inputs, chunk_size=2))
            else:
                got = list(
                    torch.func.vmap(lambda e, o=outputs, i=inputs: torch.autograd.grad(o, i, e))(
                        torch.eye(5, dtype=torch.float64)
                    )
                )
            rows += [got[0].chunk(world.size, 2)[world.rank] if whole else got[0], *got[1:]]
        found.append(rows)
    return {"apart": apart(found[1], found[0])}


def attributions(world: World, shard: bool) -> dict[str, float]:
    """rd.attribute: each rank its own examples."""
    small = Small(world)
    n, each = 12, 12 // world.size
    loss, _ = rd.from_module(small.net, nn.CrossEntropyLoss(reduction="none"))
    x, y = torch.randn(n, 6, dtype=torch.float64), torch.randint(3, (n,))
    queries = (x[:4] + 0.3, y[:4])
    orders = [torch.stack([torch.randperm(each)[:2] for _ in range(STEPS)]) for _ in range(world.size)]
    together = torch.cat([order + r * each for r, order in enumerate(orders)], 1)
    options: dict[str, Any] = {"queries": queries, "seed": 0, "chunk_size": 3}
    optimizer = rd.SGD(0.05, 0.9)
    right = rd.attribute(loss, small.params, (x, y), optimizer, order=together, **options)
    mine = slice(world.rank * each, (world.rank + 1) * each)
    order = orders[world.rank]
    got = rd.attribute(
        loss, small.params, (x[mine], y[mine]), optimizer, order=order, group=world.group, shard=shard, **options
    )
    return {"apart": apart([got.scores, got.losses], [right.scores[:, mine], right.losses])}


# --- the bits --------------------------------------------------------------------------------------------------------


def bits(world: World) -> dict[str, Any]:
    """Of theta, in float32 where sums round, after 12 steps: compared by the test over ranks and over runs."""
    small, found = Small(world, torch.float32), {}
    small.lr = torch.full((12,), 0.05, requires_grad=True)
    turned = (world.rank + 1) % world.size
    for name, options in {
        "plain": {},
        "again": {},
        "other layout": {"share": turned},
        "shard": {"shard": True},
        "StoreAll": {"adjoint": rd.StoreAll()},
    }.items():
        x, theta = small.unroll(steps=12, **options)
        grads = torch.autograd.grad(outer(theta), [x, small.lr, *small.params.values()])
        found[name] = [sha(theta), sha(dict(enumerate(grads[1:])))]  # type: ignore[arg-type]
    return found


def pieces(world: World, shard: bool) -> dict[str, Any]:
    """Nine steps, and four and five; through a state that is passed on, differentiably."""
    small = Small(world, torch.float32)
    optimizer = rd.Adam(0.01)
    _, (whole, _) = small.unroll(optimizer=optimizer, shard=shard, return_state=True, seed=1)
    _, (theta, state) = small.unroll(optimizer=optimizer, shard=shard, return_state=True, seed=1, steps=4)
    _, (rest, _) = small.unroll(optimizer=optimizer, shard=shard, return_state=True, steps=5, params=theta, state=state)
    one, two = (torch.autograd.grad(outer(t), list(small.params.values())) for t in (whole, rest))
    return {"same": sha(whole) == sha(rest), "apart": apart(two, one)}


def random_numbers(world: World) -> dict[str, float]:
    """Of dropout: on every rank those of a process of its own that has the same seed."""
    small = Small(world, dropout=True)

    def each_share_alike(params: Any, batch: Any) -> Tensor:
        state, parts = torch.get_rng_state(), []
        for x, y in zip(batch[0].chunk(world.size), batch[1].chunk(world.size), strict=True):
            torch.set_rng_state(state)
            parts.append(small.loss(params, (x, y)))
        return torch.stack(parts).mean()

    _, right = small.unroll(whole=True, loss=each_share_alike, seed=4)
    _, theta = small.unroll(seed=4)
    _, drawn = small.unroll()  # rank 0's own seed, which it draws
    torch.manual_seed(5 + world.rank)
    _, other = small.unroll()
    return {"apart": apart(theta.values(), right.values()), "drawn": sha(drawn), "other": sha(other)}  # type: ignore[dict-item]


def scales(world: World, shard: bool) -> dict[str, float]:
    """Gradients from 1e-16 to 1e4, each of which Adam makes a step of the same length of."""
    small = Small(world)

    def loss(params: Any, batch: Any) -> Tensor:
        return small.loss(params, batch) * 1e-14 + 1e4 * (params["2.bias"] - 1).square().sum()

    found = []
    for whole in (True, False):
        optimizer = rd.Adam(small.lr * 0.1, eps=1e-18)
        x, theta = small.unroll(whole=whole, loss=loss, optimizer=optimizer, **({} if whole else {"shard": shard}))
        grads = torch.autograd.grad(outer(theta), [x, small.lr])
        found.append([*theta.values(), world.share(grads[0]) if whole else grads[0], grads[1]])
    return {"apart": apart(found[1], found[0])}


def missing_gradients(world: World) -> dict[str, float]:
    """A parameter that no rank uses rests; weight decay leaves it alone, as in torch.optim."""
    small = Small(world)
    params = {**small.params, "idle": torch.ones(3, dtype=torch.float64)}
    optimizer = rd.SGD(0.05, 0.9, weight_decay=0.1)
    rest = [small.unroll(params=params, optimizer=optimizer, **o)[1] for o in ({"whole": True}, {}, {"shard": True})]
    return {"apart": max(apart(got.values(), rest[0].values()) for got in rest[1:])}


def rounding(world: World) -> dict[str, Any]:
    """An outer loss that another number of threads sums up in another order: rank 0's counts."""
    small, found = Small(world, torch.float32), {}
    for shard in (False, True):
        _, theta = small.unroll(shard=shard)
        total = outer(theta) * (1 + 1e-6 * world.rank)
        found[str(shard)] = sha({"lr": torch.autograd.grad(total, small.lr)[0]})
    return found


# --- losses that exchange tensors ------------------------------------------------------------------------------------


class Alone:
    """What rd.distributed does, where one process has the whole batch."""

    copy = sum = gather = staticmethod(lambda x: x)


def batch_norm(params: Mapping[str, Tensor], batch: Any, over: Any, count: int) -> Tensor:
    """A layer that is normalised over the samples of all ranks: forward and back a sum."""
    x, y = batch
    h = x @ params["w"]
    mean = over.copy(over.sum(h.sum(0))) / count
    spread = over.copy(over.sum((h - mean).square().sum(0))) / count
    return F.cross_entropy(((h - mean) / (spread + 1e-3).sqrt()).tanh() @ params["v"], y)


def contrastive(params: Mapping[str, Tensor], batch: Any, over: Any, first: int) -> Tensor:
    """InfoNCE: each sample's two views against those of all ranks' samples. first: the number of this rank's first."""
    x, _ = batch
    a, b = (F.normalize((view @ params["w"]).tanh() @ params["v"], dim=1) for view in (x, x.roll(1, 1) + 0.1))
    return F.cross_entropy(a @ over.gather(b).T / 0.5, first + torch.arange(len(x)))


def exchanging(world: World, name: str, shard: bool) -> dict[str, float]:
    """Hypergradients, and those of many outputs, of a loss that is a function of all ranks' shares."""
    torch.manual_seed(8)
    made = {"w": torch.randn(6, 5, dtype=torch.float64) / 2, "v": torch.randn(5, 3, dtype=torch.float64) / 2}
    params = {n: p.requires_grad_() for n, p in made.items()}
    x, y = torch.randn(3, 8, 6, dtype=torch.float64), torch.randint(3, (3, 8))
    lr, v = torch.full((STEPS,), 0.1, dtype=torch.float64, requires_grad=True), torch.randn(4, 45, dtype=torch.float64)
    found = []
    for over in (Alone, rd.distributed):
        alone = over is Alone
        z, t = (x, y) if alone else (world.share(x), world.share(y))
        z = z.clone().requires_grad_()
        extra = 8 if name == "batch norm" else 0 if alone else world.rank * z.shape[1]
        function = batch_norm if name == "batch norm" else contrastive
        own = {} if alone else {"group": world.group, "shard": shard}
        for _ in range(2):
            theta = rd.unroll(
                lambda p, b, f=function, o=over, e=extra: f(p, b, o, e),
                params,
                (z, t),
                rd.SGD(lr, 0.9),
                steps=STEPS,
                **own,
            )
            flat = torch.cat([p.flatten() for p in theta.values()])
            if len(found) % 2:
                many = rd.jacobian((v @ flat).tanh(), [z, lr, *params.values()])
                found.append([many[0].chunk(world.size, 2)[world.rank] if alone else many[0], *many[1:]])
            else:
                one = torch.autograd.grad(outer(theta), [z, lr, *params.values()])
                found.append([flat, world.share(one[0]) if alone else one[0], *one[1:]])
    return {"one": apart(found[2], found[0]), "many": apart(found[3], found[1])}


def derivatives_of_exchanges(world: World) -> dict[str, float]:
    """First, second and third, and of several vectors at once, of the sum over ranks of the losses."""
    torch.manual_seed(9)
    w = torch.randn(6, 4, dtype=torch.float64)
    x = torch.randn(8, 6, dtype=torch.float64)
    u, v, rows = (
        torch.randn(6, 4, dtype=torch.float64),
        torch.randn(6, 4, dtype=torch.float64),
        torch.randn(3, 6, 4).double(),
    )
    own, found = x.chunk(world.size)[world.rank], []
    for over, part in ((Alone, x), (rd.distributed, own)):
        leaf = w.clone().requires_grad_()
        h = (part @ over.copy(leaf)).tanh()
        every = over.gather(h)
        statistic = over.copy(over.sum(h.exp().sum(0)))
        loss = (every @ h.T).square().sum() + (h * statistic.log()).sum()
        loss = loss + over.copy(over.sum((h**3).sum())) / (1 if over is Alone else world.size)
        (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (product,) = torch.autograd.grad((g * u).sum(), leaf, create_graph=True)
        (third,) = torch.autograd.grad((product * v).sum(), leaf, retain_graph=True)
        many = torch.func.vmap(lambda r, g=g, leaf=leaf: torch.autograd.grad(g, leaf, r, retain_graph=True)[0])(rows)
        found.append([t.detach() for t in (g, product, third, many)])
    # Theta goes through `copy`: each rank has the whole of what one process finds.
    return {"apart": apart(found[1], found[0])}


def parts_of_an_outer_loss(world: World, shard: bool) -> dict[str, float]:
    """Each rank computes a part of what is computed from theta: `copy` on theta, `sum` on the parts."""
    small, found = Small(world), []
    z = torch.randn(8, 6, dtype=torch.float64)
    for whole in (True, False):
        x, theta = small.unroll(whole=whole, **({} if whole else {"shard": shard}))
        seen = theta if whole else {n: rd.distributed.copy(p) for n, p in theta.items()}
        part = z if whole else z.chunk(world.size)[world.rank]
        total = torch.func.functional_call(small.net, seen, (part,)).square().sum()
        total = total if whole else rd.distributed.sum(total)
        grads = torch.autograd.grad(total, [x, small.lr, *small.params.values()])
        found.append([total.detach(), world.share(grads[0]) if whole else grads[0], *grads[1:]])
    return {"apart": apart(found[1], found[0])}


def parts_of_a_loss(world: World, shard: bool) -> dict[str, float]:
    """Theta goes through `copy` and the loss is the `sum` of parts: right where batches are not differentiated."""
    small, found = Small(world), []
    y = torch.randn(3, 8, 3, dtype=torch.float64)
    for over in (Alone, rd.distributed):
        alone = over is Alone

        def loss(params: Any, batch: Any, o: Any = over) -> Tensor:
            out = torch.func.functional_call(small.net, {n: o.copy(p) for n, p in params.items()}, (batch[0],))
            return o.sum((out - batch[1]).square().sum()) / 24

        data = small.x, y
        own = data if alone else tuple(map(world.share, data))
        _, theta = small.unroll(whole=alone, loss=loss, batches=own, **({} if alone else {"shard": shard}))
        grads = torch.autograd.grad(outer(theta), [small.lr, *small.params.values()])
        found.append([*theta.values(), *grads])
    return {"apart": apart(found[1], found[0])}


def copied_apart(world: World, back: bool) -> None:
    """What is copied differs between ranks: a number, or what each makes of a sum."""
    small, over = Small(world), rd.distributed

    def loss(params: Any, batch: Any) -> Tensor:
        x, y = (t.detach() for t in batch)
        if not back:
            return over.copy(over.sum(small.loss(params, (x, y))) * (1 + world.rank))
        return over.sum(small.loss({n: over.copy(p) for n, p in params.items()}, (x, y))) * (1 + world.rank)

    small.unroll(loss=loss)


def one_fails_before_an_exchange(world: World) -> None:
    small = Small(world)

    def loss(params: Any, batch: Any) -> Tensor:
        if world.rank == 1:
            raise ValueError("a word")
        return small.loss(params, batch) + 0 * rd.distributed.sum(params["0.bias"]).sum()

    small.unroll(loss=loss)


def other_shapes(world: World) -> None:
    """Of as many numbers."""
    small = Small(world)
    shape = (3, 2) if world.rank else (2, 3)
    small.unroll(loss=lambda p, b: rd.distributed.gather(p["0.bias"][:6].view(shape)).sum())


def other_operations(world: World) -> None:
    small = Small(world)
    exchange = rd.distributed.gather if world.rank else rd.distributed.sum
    small.unroll(loss=lambda p, b: exchange(p["0.bias"]).sum())


def copied_without_a_group(world: World) -> None:
    """Only its derivative is an exchange, which nobody would see."""
    small = Small(world)
    small.unroll(loss=lambda p, b: small.loss({n: rd.distributed.copy(t) for n, t in p.items()}, b), group=None)


def unseen_by_autograd(world: World, grouped: bool) -> None:
    """torch's own collective, on a tensor that requires grad; or through torch's Function, without a group."""
    from torch.distributed.nn.functional import all_reduce

    small = Small(world)

    def loss(params: Any, batch: Any) -> Tensor:
        value = small.loss(params, batch)
        if not grouped:
            return all_reduce(value) / world.size
        dist.all_reduce(value)
        return value / world.size

    small.unroll(loss=loss, **({} if grouped else {"group": None}))


# --- what goes wrong -------------------------------------------------------------------------------------------------


def one_fails(world: World, error: Exception, back: bool = False, **options: Any) -> None:
    """The last rank's loss raises at step 3, on the way forward or back."""
    small, calls = Small(world), [0]

    def loss(params: Any, batch: Any) -> Tensor:
        calls[0] += 1
        if world.rank == world.size - 1 and calls[0] == (STEPS + 3 if back else 4):
            raise error
        return small.loss(params, batch)

    x, theta = small.unroll(loss=loss, adjoint=rd.Reversible(graph_bytes=0), **options)
    torch.autograd.grad(outer(theta), [x])


def not_finite(world: World, **options: Any) -> None:
    small = Small(world)
    scale = 1.0 if world.rank == 0 else float("inf")
    small.unroll(loss=lambda p, b: small.loss(p, b) * scale, **options)


def out_of_range(world: World, shard: bool) -> None:
    """In shards, only the last rank has this bias."""
    small = Small(world)
    small.unroll(loss=lambda p, b: small.loss(p, b) + 1e6 * p["2.bias"].sum(), shard=shard)


def not_repeated(world: World, shard: bool) -> None:
    small, calls = Small(world), [0]

    def loss(params: Any, batch: Any) -> Tensor:
        calls[0] += 1
        return small.loss(params, batch) * (1 + (world.rank == 0) * (calls[0] == STEPS + 4) * 1e-3)

    x, theta = small.unroll(loss=loss, adjoint=rd.Reversible(graph_bytes=0), shard=shard)
    torch.autograd.grad(outer(theta), [x])


def other_arguments(world: World, name: str) -> None:
    small, other = Small(world), world.rank > 0
    given: dict[str, Any] = {
        "params": {"params": {n: p + 1e-9 * other for n, p in small.params.items()}},
        "rates": {"optimizer": rd.SGD(0.05 + 1e-9 * other)},
        "optimizer": {"optimizer": rd.Adam(0.05) if other else rd.RMSprop(0.05)},
        "steps": {"steps": 3 + other, "optimizer": rd.SGD(0.1)},
        "seed": {"seed": 3 + other},
        "hyper": {"hyper": torch.tensor(1.0 + other), "loss": lambda p, b, h: small.loss(p, b)},
        "adjoint": {"adjoint": rd.Checkpoint(every=2 + other)},
        "callback": {"shard": True, "on_step": print if other else None},
        "batches": {"batches": (small.x[:, :, 0], small.y[:, :3]) if other else (small.x, small.y)},
        "unused": {
            "loss": lambda p, b: small.loss(p, b) + 0 * (p["extra"].sum() if other else 0),
            "params": {**small.params, "extra": torch.ones(2, dtype=torch.float64)},
        },
        "nothing": {"params": 3},
        "backprop": {"adjoint": rd.Backprop()},
        "graphs": {"compile": "graphs"},
        "shard": {"shard": "yes" if other else True},
        "seed of one": {"seed": 3 if other else None},
        "grads": {"optimizer": rd.SGD(0.05), "params": {n: p.detach() for n, p in small.params.items()}},
        "few": {"shard": True, "params": {"0.weight": small.params["2.bias"][:2]}, "loss": lambda p, b: outer(p)},
    }[name]
    if name == "grads":
        x = world.share(small.x).clone().requires_grad_(other)
        given["batches"] = (x, world.share(small.y))
    small.unroll(**given)


def other_outer_loss(world: World, shard: bool, many: bool = False) -> None:
    small = Small(world)
    x, theta = small.unroll(shard=shard)
    if many:
        rd.jacobian(torch.stack([outer(theta) * (1 + world.rank), outer(theta)]), x)
    (outer(theta) * (1 + world.rank)).backward()


def other_outputs(world: World, name: str) -> None:
    """Another number of outputs, or of those that are gone back for at once."""
    small = Small(world)
    x, theta = small.unroll(shard=name == "chunks")
    flat = torch.cat([p.flatten() for p in theta.values()])
    count, chunk = (4, 2 + world.rank) if name == "chunks" else (2 + world.rank, 32)
    rd.jacobian(flat[:count], x, chunk_size=chunk)


def clipped_outputs(world: World) -> dict[str, float]:
    """Many outputs of clipped steps in parts, of which one rank has fewer numbers: all meet as often for the norm."""
    small, found = Small(world), []
    numel = sum(p.numel() for p in small.params.values())
    v = torch.randn(5, numel, dtype=torch.float64)
    assert numel % 2, "the last rank is to have fewer numbers"
    for whole in (True, False):
        with mock.patch.object(sweep, "_AT_ONCE", 3 * 8 * (numel // 2)):  # three of its rows, two of the other's
            _, theta = small.unroll(
                whole=whole, optimizer=rd.SGD(small.lr, 0.9, max_norm=0.1), **({} if whole else {"shard": True})
            )
            flat = torch.cat([p.flatten() for p in theta.values()])
            found.append(list(rd.jacobian((v @ flat).tanh(), [small.lr, small.params["0.weight"]])))
    return {"apart": apart(found[1], found[0])}


def tried_again(world: World) -> None:
    """A new error, raised while an earlier one is handled."""
    try:
        not_finite(world)
    except rd.NonFiniteError:
        one_fails(world, ValueError("a word"))


def changed_in_place(world: World) -> None:
    """A batch on one rank, between the passes."""
    small = Small(world)
    y = world.share(small.y).clone()
    _, theta = small.unroll(batches=(world.share(small.x), y))
    if world.rank:
        y.add_(0)
    torch.autograd.grad(outer(theta), small.lr)


def drawn_seeds(world: World) -> dict[str, Any]:
    """rd.attribute draws rank 0's too."""
    torch.manual_seed(world.rank)
    small = Small(world, dropout=True)
    loss, _ = rd.from_module(small.net, nn.CrossEntropyLoss(reduction="none"))
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randint(3, (4,))
    options: dict[str, Any] = {"order": torch.tensor([[0, 1], [2, 3]]), "queries": (x, y), "group": world.group}
    torch.manual_seed(world.rank)
    found = rd.attribute(loss, small.params, (x, y), rd.SGD(0.1), **options)
    return {"losses": sha({"losses": found.losses})}


def drift(world: World) -> None:
    """One bit of theta, on one rank, at step 60 of 66: found at step 64."""
    small, plain = Small(world), Trajectory.step
    small.lr = torch.full((66,), 0.05, requires_grad=True)

    def step(self: Any, k: int, **options: Any) -> Any:
        found = plain(self, k, **options)
        if k == 60 and world.rank == 1:
            self.state.numbers[THETA][3] += 1
        return found

    Trajectory.step = step  # type: ignore[method-assign]
    try:
        small.unroll(steps=66)
    finally:
        Trajectory.step = plain  # type: ignore[method-assign]


def other_start(world: World, shard: bool) -> None:
    """A bit of the velocity on the last rank, flipped between the passes: the end check there finds it."""
    small, seen = Small(world), []
    plain = Trajectory.__init__

    def note(self: Any, *given: Any, **options: Any) -> None:
        plain(self, *given, **options)
        seen.append(self)

    Trajectory.__init__ = note  # type: ignore[method-assign]
    try:
        x, theta = small.unroll(shard=shard, adjoint=rd.Reversible(graph_bytes=2**24))  # nothing is evaluated again
    finally:
        Trajectory.__init__ = plain  # type: ignore[method-assign]
    if world.rank == world.size - 1:
        seen[0].state.numbers["v"][0] += 1
    torch.autograd.grad(outer(theta), [x])


def full_disk(world: World) -> None:
    small, plain = Small(world), DeviceHistory.push

    def push(self: Any, words: Tensor) -> None:
        if world.rank == 0:
            raise OSError(28, "No space left on device")
        plain(self, words)

    DeviceHistory.push = push  # type: ignore[method-assign]
    try:
        small.unroll(optimizer=rd.SGD(0.05, 0.1), steps=40)
    finally:
        DeviceHistory.push = plain  # type: ignore[method-assign]


def other_order(world: World) -> None:
    """One rank goes back while another begins anew."""
    small = Small(world)
    x, theta = small.unroll()
    if world.rank:
        small.unroll()
    torch.autograd.grad(outer(theta), [x])


def still_fine(world: World) -> dict[str, float]:
    small = Small(world)
    (_, right), (_, theta) = small.unroll(whole=True), small.unroll()
    return {"apart": apart(theta.values(), right.values())}


def killed(world: World) -> None:
    """The last rank is gone at step 3. The others have some seconds to say so before torchrun ends them."""
    small, calls = Small(world), [0]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def loss(params: Any, batch: Any) -> Tensor:
        calls[0] += 1
        if world.rank == world.size - 1 and calls[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return small.loss(params, batch)

    small.unroll(loss=loss)


class OwnError(Exception):
    """Of a user's."""


def cases(world: World, part: str) -> Cases:
    both = (False, True)
    if part == "few":
        return {
            "bits": lambda: bits(world),
            "derivatives adam groups": lambda: derivatives(world, "adam groups", every=False),
            "attribution, shard=True": lambda: attributions(world, True),
            "one fails, shard=True": lambda: one_fails(world, ValueError("a word"), shard=True),
            "killed": lambda: killed(world),
        }
    every = part == "every"
    settings = SETTINGS if every else SOME_SETTINGS
    found: Cases = {f"derivatives {s}": lambda s=s: derivatives(world, s, every) for s in settings}  # type: ignore[misc]
    if every:
        for name, function in {"extras": extras, "many outputs": many_outputs, "attribution": attributions}.items():
            found[name] = lambda f=function: f(world, False)  # type: ignore[misc]
        return found
    found["extras"] = lambda: extras(world, True)
    found["many outputs"] = lambda: many_outputs(world, True)
    found["attribution"] = lambda: attributions(world, True)
    for shard in both:
        options: dict[str, Callable[..., Any]] = {
            "pieces": pieces,
            "scales": scales,
            "out of range": out_of_range,
            "not repeated": not_repeated,
            "other outer loss": other_outer_loss,
            "other start": other_start,
        }
        found |= {f"{n}, shard={shard}": lambda f=f, s=shard: f(world, s) for n, f in options.items()}  # type: ignore[misc]
        found[f"not finite, shard={shard}"] = lambda s=shard: not_finite(world, shard=s)  # type: ignore[misc]
    names = "params rates optimizer steps seed hyper adjoint callback batches unused nothing backprop graphs shard few"
    each = [*names.split(), "grads", "seed of one"]
    found |= {f"other {name}": lambda n=name: other_arguments(world, n) for name in each}  # type: ignore[misc]
    for name in ("batch norm", "contrastive"):
        for shard in both:
            found[f"{name}, shard={shard}"] = lambda n=name, s=shard: exchanging(world, n, s)  # type: ignore[misc]
    return found | {
        "bits": lambda: bits(world),
        "derivatives of exchanges": lambda: derivatives_of_exchanges(world),
        "parts of an outer loss": lambda: parts_of_an_outer_loss(world, False),
        "parts of an outer loss, shard": lambda: parts_of_an_outer_loss(world, True),
        "parts of a loss": lambda: parts_of_a_loss(world, False),
        "parts of a loss, shard": lambda: parts_of_a_loss(world, True),
        "copied apart": lambda: copied_apart(world, False),
        "copied apart, back": lambda: copied_apart(world, True),
        "one fails before an exchange": lambda: one_fails_before_an_exchange(world),
        "other shapes": lambda: other_shapes(world),
        "other operations": lambda: other_operations(world),
        "copied without a group": lambda: copied_without_a_group(world),
        "unseen by autograd": lambda: unseen_by_autograd(world, True),
        "no group": lambda: unseen_by_autograd(world, False),
        "random numbers": lambda: random_numbers(world),
        "missing gradients": lambda: missing_gradients(world),
        "rounding": lambda: rounding(world),
        "one fails": lambda: one_fails(world, ValueError("a word")),
        "one fails in its own way": lambda: one_fails(world, OwnError("its own")),
        "one fails, back": lambda: one_fails(world, OwnError("its own"), back=True),
        "one fails, back, shard": lambda: one_fails(world, TypeError("a word"), back=True, shard=True),
        "other outer losses": lambda: other_outer_loss(world, True, many=True),
        "other outputs": lambda: other_outputs(world, "outputs"),
        "other chunks": lambda: other_outputs(world, "chunks"),
        "clipped outputs": lambda: clipped_outputs(world),
        "tried again": lambda: tried_again(world),
        "changed in place": lambda: changed_in_place(world),
        "drawn seeds": lambda: drawn_seeds(world),
        "drift": lambda: drift(world),
        "full disk": lambda: full_disk(world),
        "other order": lambda: other_order(world),
        "still fine": lambda: still_fine(world),
        "killed": lambda: killed(world),
    }


def main(out: Path, part: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "torch.distributed.nn", FutureWarning)
    world = World()
    found: dict[str, Any] = {}
    for name, case in cases(world, part).items():
        began = time.monotonic()
        try:
            found[name] = {"found": case()}
        except Exception as error:
            values = {k: v for k, v in vars(error).items() if isinstance(v, (str, int, float)) or v is None}
            found[name] = {"error": type(error).__name__, "message": str(error), "values": values}
        found[name]["seconds"] = time.monotonic() - began
        (out / f"{world.rank}.json").write_text(json.dumps(found))
    os._exit(0)  # a group that has lost a rank cannot be taken down in order


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
