"""Many dataset distillations as one batched unroll: every restart with its own data and step sizes, all networks side
by side.

A *job* is one distillation from scratch: a dataset, the architectures it is distilled for, and a restart. All jobs of
one input shape are distilled together, so an inner step costs a few batched matrix products however many jobs there
are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

import revdistill as rd
from revdistill.distill.starts import real
from revdistill.distill.strategies import plan
from revdistill.outer.data import Dataset
from revdistill.outer.descent import ClipTo, Descent, cosine, total_norm
from revdistill.outer.networks import predictions

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A perceptron: widths of its hidden layers, and their activation."""

    hidden: tuple[int, ...]
    activation: Callable[[Tensor], Tensor] = torch.relu


# the study's three, and two that nothing is distilled for
ARCHITECTURES = {
    "LinearNet": Architecture(()),
    "NonLinearNet": Architecture((10,)),
    "MoreNonLinearNet": Architecture((10, 10, 10)),
    "TanhNet": Architecture((16, 16), torch.tanh),
    "WideDeepNet": Architecture((32, 32, 32, 32)),
}
STUDIED, UNSEEN = ("LinearNet", "NonLinearNet", "MoreNonLinearNet"), ("TanhNet", "WideDeepNet")


@dataclass(frozen=True)
class Job:
    """data: what is distilled; architectures: one entry per network that an outer step averages over; seed: of the
    restart.

    pace: a factor on the outer steps of the points; points that move less serve other architectures better.
    """

    data: Dataset
    architectures: tuple[str, ...]
    seed: int
    pace: float = 1.0


class Stack:
    """Networks of several architectures, each bound to a job; parameters are named ARCHITECTURE.LAYER.weight or .bias,
    [E, ...].

    owners: architecture -> the job of each of its networks.
    """

    def __init__(self, owners: Mapping[str, Sequence[int]], inputs: int, classes: int) -> None:
        self.owners = {name: torch.tensor(list(jobs)) for name, jobs in owners.items() if len(jobs)}
        self.inputs, self.outputs = inputs, 1 if classes == 2 else classes

    def widths(self, name: str) -> tuple[int, ...]:
        """Of all layers."""
        return (self.inputs, *ARCHITECTURES[name].hidden, self.outputs)

    def sample(self, generators: Sequence[torch.Generator]) -> Params:
        """Xavier-normal weights and zero biases, each job's from its own generator."""
        params: Params = {}
        for name, owners in self.owners.items():
            widths = self.widths(name)
            for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
                scale = math.sqrt(2.0 / (fan_in + fan_out))
                drawn = [torch.randn(fan_in, fan_out, generator=generators[job]) for job in owners.tolist()]
                params[f"{name}.{i}.weight"] = torch.stack(drawn) * scale
                params[f"{name}.{i}.bias"] = torch.zeros(len(owners), 1, fan_out)
        return params

    def logits(self, name: str, params: Params, x: Tensor) -> Tensor:
        """[E, B, outputs] of x [E, B, inputs]."""
        layers = len(self.widths(name)) - 1
        for i in range(layers):
            x = torch.baddbmm(params[f"{name}.{i}.bias"], x, params[f"{name}.{i}.weight"])
            x = ARCHITECTURES[name].activation(x) if i + 1 < layers else x
        return x

    def losses(self, params: Params, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Architecture -> each network's mean loss [E] on its job's batch: x [J, B, inputs], y [J, B]."""
        found = {}
        for name, owners in self.owners.items():
            logits, target = self.logits(name, params, x[owners]), y[owners]
            if self.outputs == 1:
                each = F.binary_cross_entropy_with_logits(logits[..., 0], target.to(logits.dtype), reduction="none")
            else:
                each = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
            found[name] = each.mean(1)
        return found

    def loss(self, params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The sum over networks: each trains on its own loss."""
        return torch.stack([losses.sum() for losses in self.losses(params, *batch).values()]).sum()

    def per_network(self, values: Tensor) -> dict[str, Tensor]:
        """values [T, J] -> by parameter, the one tensor [T, E] of its architecture."""
        found: dict[str, Tensor] = {}
        for name, owners in self.owners.items():
            columns = values[:, owners]
            for i in range(len(self.widths(name)) - 1):
                found[f"{name}.{i}.weight"] = found[f"{name}.{i}.bias"] = columns
        return found

    def accuracies(self, params: Params, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Architecture -> each network's share of right answers [E]; x [J, B, inputs], y [J, B]."""
        found = {}
        for name, owners in self.owners.items():
            logits = self.logits(name, params, x[owners])
            found[name] = (predictions(logits) == y[owners]).float().mean(1)
        return found


@dataclass(frozen=True)
class Protocol:
    """How the jobs are distilled. Batches s, points of each class in a batch, epochs over them; the rest as its name
    says.
    """

    batches: int = 40
    per_class: int = 4
    epochs: int = 5
    momentum: float = 0.0
    rate: float = 0.02
    start: str = "noise"  # or "real"
    outer_epochs: int = 50
    outer_batch: int = 64
    outer_rate: float = 0.01
    rates_share: float = 1.0  # the outer rate of the step sizes, as a share of the points'
    cosine: bool = False  # the outer rate decays to 0
    betas: tuple[float, float] = (0.5, 0.999)
    clip: float | None = None  # of each job's hypergradient
    average: float = 0.0  # the share of the last outer steps whose iterates are averaged

    @property
    def steps(self) -> int:
        """T"""
        return self.batches * self.epochs


@dataclass
class Distilled:
    """x [s, J, B, inputs], y [s, J, B], rates [T, J]; bits: per parameter and step, kept by the bit store."""

    x: Tensor
    y: Tensor
    rates: Tensor
    bits: float | None


Progress = Callable[[int, int, Tensor], None]


def distil(
    jobs: Sequence[Job], protocol: Protocol, *, compile: bool = True, progress: Progress | None = None
) -> Distilled:
    """All jobs at once. progress(outer step, of, each job's outer loss [J])."""
    loop = _Loop(jobs, protocol, compile)
    rate = {"x": protocol.outer_rate, "raw": protocol.outer_rate * protocol.rates_share}
    descent = Descent(
        loop.leaves,
        lr=rate,
        betas=protocol.betas,
        decay=lambda k: cosine(k, loop.total) if protocol.cosine else 1.0,
        clip=loop.clip if protocol.clip else ClipTo(0.0),
        after_step=loop.after_step,
    )
    for step in range(loop.total):
        outcome = descent.step(loop.outer_loss)
        if outcome.diverged:
            raise RuntimeError(f"outer step {step}: {outcome.diverged}")
        if progress:
            progress(step + 1, loop.total, loop.each)
    end = loop.averages if protocol.average else {name: leaf.detach() for name, leaf in loop.leaves.items()}
    return Distilled(end["x"], loop.y, F.softplus(end["raw"]), loop.bits)


class _Loop:
    """What is learned by all jobs, leaves x [s, J, B, inputs] and raw [T, J], and what the descent needs to know of it.

    each: the jobs' last outer losses [J]; averages: the mean of the last iterates; bits: as `Distilled` has them.
    """

    def __init__(self, jobs: Sequence[Job], protocol: Protocol, compile: bool) -> None:
        self._jobs, self._protocol, self._compile = jobs, protocol, compile
        inputs, classes = jobs[0].data.x[0].numel(), jobs[0].data.classes
        self._generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
        networks = [(name, j) for j, job in enumerate(jobs) for name in job.architectures]
        self._stack = Stack(
            {name: [j for other, j in networks if other == name] for name in ARCHITECTURES}, inputs, classes
        )
        self._loss = self._stack.loss  # one object, so that it is compiled once
        labels = torch.arange(classes).repeat_interleave(protocol.per_class)
        self.y = labels.expand(protocol.batches, len(jobs), -1).contiguous()
        starts = [_start(job, protocol, g) for job, g in zip(jobs, self._generators, strict=True)]
        self.leaves = {
            "x": torch.stack(starts, 1).requires_grad_(),
            "raw": torch.full((protocol.steps, len(jobs)), math.log(math.expm1(protocol.rate))).requires_grad_(),
        }
        self._pace = torch.tensor([job.pace for job in jobs])[:, None, None]
        self._counts = torch.tensor([float(len(job.architectures)) for job in jobs])
        self._per_epoch = math.ceil(len(jobs[0].data.x) / protocol.outer_batch)
        self.total = protocol.outer_epochs * self._per_epoch
        self._first_averaged = self.total - int(protocol.average * self.total)
        self.averages = {name: torch.zeros_like(leaf) for name, leaf in self.leaves.items()}
        self.each = torch.zeros(len(jobs))
        self.bits: float | None = None

    def outer_loss(self, step: int) -> Tensor:
        """The sum over jobs of the mean loss of their networks on a batch of their real data."""
        jobs, protocol, x = self._jobs, self._protocol, self.leaves["x"]
        self._before = x.detach().clone()
        real_x, real_y = self._real_batch(step)
        theta, stats = rd.unroll(
            self._loss,
            self._stack.sample(self._generators),
            (x, self.y),
            rd.SGD(self._stack.per_network(F.softplus(self.leaves["raw"])), protocol.momentum),
            steps=protocol.steps,
            adjoint=rd.Reversible() if protocol.momentum else rd.StoreAll(),
            compile=self._compile,
            return_stats=True,
        )
        self.bits = stats.history_bits_per_parameter_step if protocol.momentum else None
        each = torch.zeros(len(jobs))
        for name, losses in self._stack.losses(theta, real_x, real_y).items():
            each = each.index_add(0, self._stack.owners[name], losses)
        each = each / self._counts
        self.each = each.detach()
        return each.sum()

    def _real_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Each job's own: x [J, B, inputs], y [J, B]."""
        epoch_step, size = step % self._per_epoch, self._protocol.outer_batch
        if epoch_step == 0:
            pairs = zip(self._jobs, self._generators, strict=True)
            self._orders = [torch.randperm(len(job.data.x), generator=g) for job, g in pairs]
        window = slice(epoch_step * size, (epoch_step + 1) * size)
        chosen = [(job.data, order[window]) for job, order in zip(self._jobs, self._orders, strict=True)]
        return torch.stack([data.x[i].flatten(1) for data, i in chosen]), torch.stack([data.y[i] for data, i in chosen])

    def clip(self, leaves: dict[str, Tensor]) -> float:
        """Scale each job's hypergradient to at most the protocol's norm; what is not finite of it is left out."""
        x, raw = leaves["x"], leaves["raw"]
        assert x.grad is not None
        assert raw.grad is not None
        assert self._protocol.clip
        norms = (x.grad.square().sum((0, 2, 3)) + raw.grad.square().sum(0)).sqrt()
        factors = (self._protocol.clip / norms).clamp(max=1.0).nan_to_num(0.0)
        x.grad = x.grad.nan_to_num(0.0, 0.0, 0.0) * factors[:, None, None]
        raw.grad = raw.grad.nan_to_num(0.0, 0.0, 0.0) * factors
        return total_norm(leaves)

    def after_step(self, step: int) -> None:
        """Let the points move at their job's pace, and average the last iterates."""
        x = self.leaves["x"]
        with torch.no_grad():
            x.copy_(self._before + (x - self._before) * self._pace)
        if step >= self._first_averaged:
            for name, average in self.averages.items():
                average.add_(self.leaves[name].detach(), alpha=1 / (self.total - self._first_averaged))


def _start(job: Job, protocol: Protocol, generator: torch.Generator) -> Tensor:
    """[s, B, inputs]"""
    inputs, per_batch = job.data.x[0].numel(), protocol.per_class * job.data.classes
    if protocol.start == "noise":
        return torch.randn(protocol.batches, per_batch, inputs, generator=generator)
    return real(job.data, protocol.batches, protocol.per_class, generator).flatten(2)


def evaluate(jobs: Sequence[Job], distilled: Distilled, schedule: str, test: str, momentum: float) -> Tensor:
    """[J]: test accuracy of one fresh network per job, trained on its distilled batches by plain SGD along the
    schedule.
    """
    stack, params = _train(jobs, distilled, schedule, test, momentum)
    return _test_accuracies(stack, params, jobs, test)


def _train(
    jobs: Sequence[Job], distilled: Distilled, schedule: str, test: str, momentum: float
) -> tuple[Stack, Params]:
    stack = Stack({test: range(len(jobs))}, distilled.x.shape[-1], jobs[0].data.classes)
    plans = [plan(schedule, rates, [momentum] * len(rates), len(distilled.x)) for rates in distilled.rates.t().tolist()]
    rates = torch.tensor([rates for rates, _ in plans]).t()
    params = stack.sample([torch.Generator().manual_seed(job.seed + 1_000_003) for job in jobs])
    velocities = {name: torch.zeros_like(p) for name, p in params.items()}
    for k in range(len(rates)):
        leaves = {name: p.requires_grad_() for name, p in params.items()}
        value = stack.loss(leaves, (distilled.x[k % len(distilled.x)], distilled.y[k % len(distilled.y)]))
        gradients = torch.autograd.grad(value, list(leaves.values()))
        for (name, p), g in zip(leaves.items(), gradients, strict=True):
            velocities[name] = momentum * velocities[name] + g
            params[name] = (p - rates[k][:, None, None] * velocities[name]).detach()
    return stack, params


def train_on_real(jobs: Sequence[Job], test: str) -> Tensor:
    """[J]: test accuracy after 200 epochs of Adam(1e-3) on the real data, batches of 64, halved every 40 epochs."""
    stack, params = _train_on_real(jobs, test)
    return _test_accuracies(stack, params, jobs, test)


def _train_on_real(jobs: Sequence[Job], test: str) -> tuple[Stack, Params]:
    stack = Stack({test: range(len(jobs))}, jobs[0].data.x[0].numel(), jobs[0].data.classes)
    generators = [torch.Generator().manual_seed(job.seed + 2_000_003) for job in jobs]
    params = {name: p.requires_grad_() for name, p in stack.sample(generators).items()}
    optimizer = torch.optim.Adam(params.values(), lr=1e-3, betas=(0.5, 0.999))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 40, 0.5)
    for _ in range(200):
        orders = torch.stack(
            [torch.randperm(len(job.data.x), generator=g) for job, g in zip(jobs, generators, strict=True)]
        )
        for chosen in orders.split(64, dim=1):
            x = torch.stack([job.data.x[c].flatten(1) for job, c in zip(jobs, chosen, strict=True)])
            y = torch.stack([job.data.y[c] for job, c in zip(jobs, chosen, strict=True)])
            optimizer.zero_grad()
            stack.loss(params, (x, y)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        scheduler.step()
    return stack, params


def boundary(jobs: Sequence[Job], distilled: Distilled | None, test: str, momentum: float, size: int) -> Tensor:
    """[size, size]: the probability of class 1 over `frame`, of a network trained on the distilled data, or on the
    real.
    """
    stack, params = _train_on_real(jobs, test) if distilled is None else _train(jobs, distilled, "raw", test, momentum)
    left, right, bottom, top = frame(jobs[0].data.x)
    rows, columns = torch.meshgrid(torch.linspace(bottom, top, size), torch.linspace(left, right, size), indexing="ij")
    with torch.no_grad():
        logits = stack.logits(test, params, torch.stack([columns, rows], -1).reshape(1, -1, 2))
    return logits[0, :, 0].sigmoid().reshape(size, size)


def frame(x: Tensor) -> tuple[float, float, float, float]:
    """(left, right, bottom, top) around points of the plane [N, 2]."""
    (left, bottom), (right, top) = (x.min(0).values - 0.5).tolist(), (x.max(0).values + 0.5).tolist()
    return left, right, bottom, top


def _test_accuracies(stack: Stack, params: Params, jobs: Sequence[Job], test: str) -> Tensor:
    x = torch.stack([job.data.x_test.flatten(1) for job in jobs])
    y = torch.stack([job.data.y_test for job in jobs])
    with torch.no_grad():
        return stack.accuracies(params, x, y)[test]
