"""Buffers that forward changes: refused where the loss depends on them, trained as torch.optim trains where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

import revdistill as rd
from tests.engine.small import CE

ADJOINTS = [rd.Reversible(graph_bytes=0), rd.Reversible(), rd.Backprop()]
STEPS = 6
X = torch.randn(3, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24).reshape(3, 8) % 3


class Stateful(nn.Module):
    """A layer before which `state` sees the input; buffers: by name, as they are at the start."""

    def __init__(self, state: Callable[[Any, Tensor], Tensor], **buffers: Tensor) -> None:
        super().__init__()
        self.state, self.layer = state, nn.Linear(4, 3)
        for name, b in buffers.items():
            self.register_buffer(name, b.double() if b.is_floating_point() else b, persistent=name != "hidden")

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 3]."""
        return self.layer(self.state(self, x))


def running_mean(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
    return x - net.mean


def rebound(net: Any, x: Tensor) -> Tensor:
    net.mean = 0.9 * net.mean + 0.1 * x.mean(0).detach()
    return x - net.mean


def read_before_written(net: Any, x: Tensor) -> Tensor:
    found = x - net.hidden
    net.hidden = x.mean(0).detach()
    return found


def counter(net: Any, x: Tensor) -> Tensor:
    net.step += 1
    return x * (2.0 if int(net.step) > 4 else 1.0)  # not at the first step


def schedule(net: Any, x: Tensor) -> Tensor:
    net.step.add_(1)
    return torch.where(net.step > 4, 2 * x, x)


def codebook(net: Any, x: Tensor) -> Tensor:
    nearest = torch.cdist(x.detach(), net.codes).argmin(1)
    with torch.no_grad():
        net.codes.index_add_(0, nearest, 0.1 * (x - net.codes[nearest]))
    return x + (net.codes[nearest] - x).detach()


class Normalized(nn.Module):
    """Around a layer with spectral normalization, old or new."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 3]."""
        return self.layer(x)


class Scaled(torch.autograd.Function):
    """x, whose gradient is scaled: no number of the loss depends on the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class GradientOnly(Stateful):
    """Scales the gradient by the number of its calls."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 3]."""
        self.seen += 1
        return Scaled.apply(super().forward(x), self.seen.clone())  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "spectral_norm, old": (lambda: Normalized(spectral_norm(nn.Linear(4, 3))), "layer.weight_u"),
    "spectral_norm, new": (
        lambda: Normalized(parametrizations.spectral_norm(nn.Linear(4, 3))),
        "layer.parametrizations.weight.0._u",
    ),
    "running mean": (lambda: Stateful(running_mean, mean=torch.zeros(4)), "mean"),
    "rebound": (lambda: Stateful(rebound, mean=torch.zeros(4)), "mean"),
    "read before written": (lambda: Stateful(read_before_written, hidden=torch.zeros(4)), "hidden"),
    "counter": (lambda: Stateful(counter, step=torch.zeros(())), "step"),
    "schedule": (lambda: Stateful(schedule, step=torch.zeros(())), "step"),
    "codebook": (lambda: Stateful(codebook, codes=torch.randn(3, 4)), "codes"),
    "gradient only": (lambda: GradientOnly(lambda _, x: x, seen=torch.ones(())), "seen"),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def unrolled(loss: Any, params: dict[str, Tensor], adjoint: Any = None) -> dict[str, Tensor]:
    return rd.unroll(loss, params, (X, Y), rd.SGD(0.1), steps=STEPS, adjoint=adjoint)


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_depends_on_what_its_forward_changes_is_refused(name: str) -> None:
    make, buffer = REFUSED[name]
    for adjoint in ADJOINTS:
        net = made(make)
        kept = {key: t.clone() for key, t in net.state_dict().items()}
        with pytest.raises(rd.UnsupportedError, match=rf"'{buffer}'.* in forward.*\.eval\(\).*hyper="):
            unrolled(*rd.from_module(net, CE), adjoint)
        assert all(torch.equal(kept[key], t) for key, t in net.state_dict().items())
    stacked = (
        rd.stack_modules([made(make), made(make)], CE)
        if name not in ("counter", "gradient only")
        else rd.from_module(net, CE)
    )
    with pytest.raises(rd.UnsupportedError, match=r"\.eval\(\)"):
        unrolled(*stacked)


def test_what_starts_to_matter_later_is_refused_there() -> None:
    def late(net: Any, x: Tensor) -> Tensor:
        if float(x[0, 0]) == float(X[2, 0, 0]):
            net.mean.add_(1.0)
        return x - net.mean

    with pytest.raises(rd.UnsupportedError, match="'mean'"):
        unrolled(*rd.from_module(made(lambda: Stateful(late, mean=torch.zeros(4))), CE))


def test_what_may_come_to_matter_later_is_refused() -> None:
    """No number of the first step depends on the running mean, but the module counts its calls."""

    def warm(net: Any, x: Tensor) -> Tensor:
        net.calls = getattr(net, "calls", 0) + 1
        mean = x.mean(0).detach()
        net.mean.lerp_(mean, 0.1)
        return x - (net.mean if net.calls > 4 else mean)

    for adjoint in ADJOINTS:
        with pytest.raises(rd.UnsupportedError, match="'mean' in forward, and the loss of a later step"):
            unrolled(*rd.from_module(made(lambda: Stateful(warm, mean=torch.zeros(4))), CE), adjoint)


def test_an_integer_that_may_come_to_matter_later_is_refused() -> None:
    def warm(net: Any, x: Tensor) -> Tensor:
        net.calls = getattr(net, "calls", 0) + 1
        net.count.add_(1)
        return x * (net.count if net.calls > 4 else 1)

    with pytest.raises(rd.UnsupportedError, match="'count' in forward, and counts its calls in 'calls'"):
        unrolled(*rd.from_module(made(lambda: Stateful(warm, count=torch.zeros((), dtype=torch.long))), CE))


def test_what_the_batch_asks_for_later_is_refused() -> None:
    """Regression: a buffer that did not matter at the first step was taken not to matter at all."""

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.register_buffer("bank", torch.zeros(4))

        def forward(self, x: Tensor, flag: Tensor) -> Tensor:
            """[B, 4], [] -> [B, 3]."""
            if flag.item():
                x = x - self.bank
            with torch.no_grad():
                self.bank.copy_(x.mean(0))
            return self.head(x)

    flags = torch.tensor([0, 0, 1])
    for adjoint in ADJOINTS:
        loss, params = rd.from_module(made(Bank), CE)
        with pytest.raises(rd.UnsupportedError, match="'bank' in forward, and the loss of a later step"):
            rd.unroll(loss, params, (X, flags, Y), rd.SGD(0.1), steps=STEPS, adjoint=adjoint)
        with pytest.raises(rd.UnsupportedError, match="'bank'"):  # and no verdict is kept of the first unroll
            rd.unroll(loss, params, (X, flags, Y), rd.SGD(0.1), steps=STEPS, adjoint=adjoint)


class Kept(nn.Module):
    """BatchNorm beside state that no copy of buffers undoes: a tensor, a list, a generator, a frozen parameter."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.norm, self.head = kind, nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.mean, self.queue, self.draw = torch.zeros(5, dtype=torch.float64), [], torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 3]."""
        h = self.norm(self.first(x))
        if self.kind == "tensor":
            self.mean.mul_(0.8).add_(0.2 * h.detach()[0])
            h = h - self.mean
        elif self.kind == "list":
            self.queue.append(h.detach())
            h = h + 0.1 * len(self.queue)
        else:
            h = h + 0.1 * torch.randn(h.shape, dtype=h.dtype, generator=self.draw)
        return self.head(torch.tanh(h))


@pytest.mark.parametrize("kind", ["tensor", "list", "generator"])
def test_looking_does_not_train_otherwise(kind: str) -> None:
    """Regression: a second evaluation at the first step moved what the module keeps elsewhere."""
    reference = made(lambda: Kept(kind))
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, 0.9)
    for k in range(STEPS):
        optimizer.zero_grad()
        CE(reference(X[k % 3]), Y[k % 3]).backward()
        optimizer.step()
    for adjoint in (rd.Reversible(), rd.Backprop()):
        theta = unrolled(*rd.from_module(made(lambda: Kept(kind)), CE), adjoint)
        for key, p in theta.items():
            torch.testing.assert_close(p, reference.get_parameter(key), rtol=1e-4, atol=1e-5)


class Reader(nn.BatchNorm1d):
    """A subclass whose output depends on what BatchNorm itself only writes."""

    def __init__(self, how: str) -> None:
        super().__init__(5)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        """[B, 5] -> [B, 5]."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        if self.how == "tracked":
            return super().forward(x) * (0.2 * self.num_batches_tracked + 0.5).clamp(max=1.0)
        if self.how == "warm-up":
            return super().forward(x) if self.num_batches_tracked < 2 else x - self.running_mean
        x = super().forward(x)
        read = self.running_mean.tolist() if self.how == "list" else self.running_mean.detach().numpy()
        return x * (1 + float(sum(read)))


@pytest.mark.parametrize("how", ["tracked", "warm-up", "list", "numpy"])
def test_readers_of_torchs_statistics_are_refused(how: str) -> None:
    """Regression: what BatchNorm does not read was taken for what no subclass reads; lists and arrays were not seen."""
    with pytest.raises(rd.UnsupportedError, match=r"buffer '1\.(num_batches_tracked|running_mean)'"):
        unrolled(*rd.from_module(made(lambda: around(Reader(how))), CE))


class Around(nn.Module):
    """Reads, outside of a BatchNorm, how many batches that has seen."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.norm, self.how = nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None), how

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 3]."""
        x, count = self.norm(self.layer(x)), self.norm.num_batches_tracked
        assert count is not None
        if self.how == "branch":
            return 2 * x if count > 2 else x
        return x / (1 + (count.item() if self.how == "number" else count))


@pytest.mark.parametrize("how", ["branch", "arithmetic", "number"])
def test_what_batchnorm_counts_is_for_itself_only(how: str) -> None:
    """Regression: num_batches_tracked was taken for what nobody reads."""
    with pytest.raises(rd.UnsupportedError, match=r"buffer 'norm\.num_batches_tracked'"):
        unrolled(*rd.from_module(made(lambda: Around(how)), CE))


@pytest.mark.parametrize("where", ["net", "criterion"])
def test_buffers_are_those_of_the_beginning_of_the_unroll(where: str) -> None:
    """Regression: they were from_module's, and the parameters were not, so that a checkpoint loaded afterwards was
    taken by halves. The way back is in those of the way forward.
    """

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(3))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return CE(output, target, weight=self.weight)

    def make() -> tuple[nn.Module, nn.Module]:
        net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
        return net, Weighted().double()

    (net, criterion), (other, other_criterion) = make(), make()
    loss, params = rd.from_module(net, criterion)
    with torch.no_grad():
        other[1].running_var.fill_(0.3)
        other_criterion.weight.copy_(torch.tensor([0.2, 0.3, 0.5]))
    if where == "net":
        net.load_state_dict(other.state_dict())
    else:
        net.load_state_dict({**net.state_dict(), **dict(other.named_parameters())})
        criterion.load_state_dict(other_criterion.state_dict())
    expected = rd.unroll(*rd.from_module(net, criterion), (X, Y), rd.SGD(0.1), steps=STEPS)
    for adjoint in ADJOINTS:
        theta = unrolled(loss, params, adjoint)
        for name, p in theta.items():
            torch.testing.assert_close(p, expected[name], rtol=1e-9, atol=1e-11)
        with torch.no_grad():
            net[1].running_mean.add_(1)  # type: ignore[union-attr, operator]
        torch.stack([p.sum() for p in theta.values()]).sum().backward()
        with torch.no_grad():
            net[1].running_mean.sub_(1)  # type: ignore[union-attr, operator]


def test_buffers_that_require_grad_are_refused() -> None:
    """Regression: they got no gradient in silence."""
    net = nn.BatchNorm1d(4)
    net.register_buffer("scale", torch.ones(3, requires_grad=True))
    with pytest.raises(ValueError, match=r"^the module's buffer 'scale' requires grad.*nn\.Parameter.*hyper="):
        rd.from_module(net, CE)
    with pytest.raises(ValueError, match=r"^nets\[0\]'s buffer 'scale' requires grad"):
        rd.stack_modules([net, net], CE)
    net.scale = net.scale.detach()
    loss, params = rd.from_module(net, CE)
    net.scale.requires_grad_()
    with pytest.raises(ValueError, match="buffer 'scale' requires grad"):
        unrolled(loss, params)


def test_a_place_of_its_own_is_a_change_too() -> None:
    """Regression: an assignment to .data is no change that torch counts."""

    def late(net: Any, x: Tensor) -> Tensor:
        if float(x[0, 0]) == float(X[2, 0, 0]):
            net.mean.data = net.mean + 1.0
        return x - net.mean

    with pytest.raises(rd.UnsupportedError, match="'mean' in forward, and begins to at a later step"):
        unrolled(*rd.from_module(made(lambda: Stateful(late, mean=torch.zeros(4))), CE))


class OwnBatchNorm(nn.Module):
    """Batch normalization written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("last", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 5] -> [B, 5]."""
        mean = x.mean(0)
        with torch.no_grad():
            self.mean.lerp_(mean, 0.1)
            self.last.copy_(mean)
        return self.weight * (x - mean + 0 * self.last) / (x.var(0) + 1e-5).sqrt()


class SubclassedNorm(nn.BatchNorm1d):
    """As libraries write it: a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, 5] -> [B, 5]."""
        self.num_batches_tracked.add_(1)
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1)


def around(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3))


HARMLESS: dict[str, Callable[[], nn.Module]] = {
    "batchnorm": lambda: around(nn.BatchNorm1d(5)),
    "batchnorm, cumulative": lambda: around(nn.BatchNorm1d(5, momentum=None)),
    "instancenorm": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(),
        nn.Linear(6, 3),
    ),
    "by hand": lambda: around(OwnBatchNorm()),
    "subclassed": lambda: around(SubclassedNorm(5)),
    "spectral_norm, evaluating": lambda: Normalized(spectral_norm(nn.Linear(4, 3))).eval(),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_statistics_that_are_only_written_are_no_hindrance(name: str) -> None:
    """The parameters are those of torch.optim, whose module carries its buffers on; no look is taken twice."""
    net, reference = made(HARMLESS[name]), made(HARMLESS[name])
    loss, params = rd.from_module(net, CE)
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], 0.1, 0.9)
    for k in range(STEPS):
        optimizer.zero_grad()
        CE(reference(X[k % 3]), Y[k % 3]).backward()
        optimizer.step()
    for adjoint in ADJOINTS:
        theta = unrolled(loss, params, adjoint)
        for key, p in theta.items():
            torch.testing.assert_close(p, reference.get_parameter(key), rtol=1e-4, atol=1e-5)  # momentum is rounded
        torch.stack([p.sum() for p in theta.values()]).sum().backward()


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("kind", [float, int])
def test_what_only_a_later_comparison_reads_is_refused(kind: type, adjoint: Any) -> None:
    """Regression: a comparison with NaN is False, and an integer cannot be NaN."""

    def late(net: Any, x: Tensor) -> Tensor:
        late = float(x[0, 0]) == float(X[1, 0, 0])  # at the steps 1, 4, 7, ...
        factor = 2.0 if late and net.seen > 1 else 1.0
        net.seen.add_(1)
        return factor * x

    loss, params = rd.from_module(made(lambda: Stateful(late, seen=torch.tensor(kind(0)))), CE)
    with pytest.raises(rd.UnsupportedError, match="'seen'"):
        unrolled(loss, params, adjoint)


def test_looks_become_rare_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from revdistill.engine.loss import buffers

    looks: list[Any] = []
    follow = buffers.Buffers._follow
    monkeypatch.setattr(buffers.Buffers, "_follow", lambda *args: looks.append(args) or follow(*args))
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    net[0].calls = 0
    net[0].register_forward_hook(lambda layer, *_: setattr(layer, "calls", layer.calls + 1))
    loss, params = rd.from_module(net, CE)
    for _ in range(2):
        unrolled(loss, params)
    assert len(looks) == 6  # at the 1st, 2nd, 4th and 8th of 12 steps, and at the last of both unrolls
    assert net[0].calls == 2 * STEPS
    loss(params, (X[0], Y[0]))  # outside an unroll nothing is looked at
    assert len(looks) == 6


def test_random_numbers_after_the_look_are_those_of_every_evaluation() -> None:
    base, params = rd.from_module(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double(), CE)
    theta = unrolled(lambda p, batch: base(p, batch) * (1 + torch.rand(())), params, rd.Reversible(graph_bytes=0))
    torch.stack([p.sum() for p in theta.values()]).sum().backward()


@pytest.mark.parametrize(
    ("criterion", "kind", "message"),
    [
        (lambda output, target: 1.0, TypeError, "loss must return a scalar tensor, got float"),
        (lambda output, target: output.sum(1), ValueError, r"scalar floating-point tensor, got shape \[8\]"),
    ],
)
def test_a_loss_that_is_none_is_still_named(criterion: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        unrolled(*rd.from_module(made(HARMLESS["batchnorm"]), criterion))
