"""E networks of one architecture, freshly drawn from P0 and evaluated side by side."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdistill.engine import stack_modules
from revdistill.engine.layout import stacked
from revdistill.engine.loss.randomness import seeded
from revdistill.outer import models
from revdistill.outer.smoothing import NotSmoothError, smoothed, without_relu
from revdistill.outer.threads import Work

Params = dict[str, Tensor]
# Samples evaluated at once, over all networks; and by convolutions on a CPU, few enough that activations stay in its
# caches: with 2,048 images of CIFAR-10, ConvNet-3 takes twice as long.
AT_ONCE, CACHED = 2048, 64


def classification_loss(logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy; binary where there is one logit per sample.

    Args:
        logits: [B, C], or [B, 1] for two classes.
        y: classes [B], or probabilities [B, C].
        reduction: "mean" gives a scalar, "none" the losses of the samples [B].
    """
    if logits.shape[-1] == 1:
        target = y[..., 1] if y.is_floating_point() else y
        return F.binary_cross_entropy_with_logits(logits[..., 0], target.to(logits.dtype), reduction=reduction)
    return F.cross_entropy(logits, y, reduction=reduction)


def predictions(logits: Tensor) -> Tensor:
    """The class of highest score, from logits [..., C] or [..., 1]."""
    return (logits[..., 0] > 0).long() if logits.shape[-1] == 1 else logits.argmax(-1)


class NetworkStack:
    """E networks of one architecture. `loss(params, (x, y))` sums their losses on one shared batch.

    P0 is Xavier-normal weights and zero biases (scales of normalization layers 1) for the registered architectures, as
    in the study and in Wang et al. 2018; a user's own factory draws its parameters itself.

    Args:
        name: of the architecture.
        size: E.
        input_shape: of one sample.
        classes: how many there are.
        device: where the networks are.
        smooth: each ReLU is a softplus of this beta; 0 leaves them.

    Raises:
        ValueError: there is no such architecture, or it does not go with the inputs or the classes, or it has a ReLU
            that cannot be made smooth.
    """

    def __init__(
        self,
        name: str,
        size: int,
        input_shape: tuple[int, ...],
        classes: int,
        device: torch.device,
        smooth: float = 0.0,
    ) -> None:
        self.name, self.size = name, size
        self._input_shape, self._classes, self._device, self._smooth = input_shape, classes, device, smooth
        self._others: dict[int, NetworkStack] = {}
        with seeded(0, device):
            self._net = models.build(name, input_shape, classes).to(device)
        if smooth:
            self._net = smoothed(self._net, smooth)
        self.loss, _ = stack_modules([self._net] * size, classification_loss)
        kinds = tuple(type(module) for module in self._net.modules())
        self._convolves = device.type == "cpu" and any(issubclass(kind, nn.modules.conv._ConvNd) for kind in kinds)
        self._batch_statistics = any(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds)
        self._shapes = {n: p.shape for n, p in self._net.named_parameters() if p.requires_grad}
        self._check_output()
        self._rest = {
            n: p for n, p in (*self._net.named_parameters(), *self._net.named_buffers()) if n not in self._shapes
        }

    def _check_output(self) -> None:
        accepted = {(2, self._classes)} | ({(2, 1)} if self._classes == 2 else set())
        x = torch.zeros(2, *self._input_shape, device=self._device)
        try:
            watch = without_relu() if self._smooth else nullcontext()
            with torch.no_grad(), watch, seeded(0, self._device), _evaluating(self._net):
                shape = tuple(copy.deepcopy(self._net)(x).shape)
        except NotSmoothError:
            raise ValueError(
                f"architecture {self.name!r} has a ReLU that smooth cannot replace, such as torch.relu called as a "
                "function; make it a module, torch.nn.ReLU(), or leave out smooth"
            ) from None
        except Exception as error:  # a user's own forward raises what it likes
            reason = (str(error).strip().splitlines() or [""])[0]
            if not isinstance(error, RuntimeError | TypeError | ValueError):
                reason = f"{type(error).__name__}: {reason}"
            raise ValueError(
                f"architecture {self.name!r} does not take inputs {list(self._input_shape)}: {reason}"
            ) from error
        if shape not in accepted:
            raise ValueError(
                f"architecture {self.name!r} gives outputs of shape {list(shape[1:])} for {self._classes} classes; "
                f"accepted are {' or '.join(str(list(s[1:])) for s in sorted(accepted))}"
            )

    def work(self, samples: int) -> float:
        """Floating-point operations of a forward pass of all networks on so many samples, as `Work` counts them; inf
        where a network cannot be watched.
        """
        x = torch.zeros(2, *self._input_shape, device=self._device)
        try:
            with torch.no_grad(), seeded(0, self._device), _evaluating(self._net), Work() as counted:
                copy.deepcopy(self._net)(x)
        except Exception:  # it takes inputs when it is not watched: see `_check_output`
            return math.inf
        return float(counted.flops / len(x) * samples * self.size)

    def sample(self, seed: int) -> Params:
        """Fresh parameters [E, ...], the same for the same seed, on every device."""
        if models.is_own(self.name):
            return self._sample_own(seed)
        generator = torch.Generator().manual_seed(seed)
        drawn = {name: _xavier(name, self.size, shape, generator) for name, shape in self._shapes.items()}
        return {name: p.to(self._device) for name, p in drawn.items()}

    def parts(self, size: int | None = None) -> list[Part]:
        """Split the networks into parts that are trained side by side.

        Args:
            size: of a part; the last one may be smaller. None for all of them.
        """
        size = self.size if size is None else min(size, self.size)
        firsts = range(0, self.size, size)
        return [Part(first, self._of(min(size, self.size - first)), self.size) for first in firsts]

    def best_parts(self, size: int | None = None) -> list[Part]:
        """The same for trainings without a way back: one at a time where they have convolutions on a CPU, as the
        grouped convolutions of a stack take twice as long there (ConvNet-3).
        """
        return self.parts(1 if self._convolves else size)

    def _of(self, size: int) -> NetworkStack:
        if size == self.size:
            return self
        if size not in self._others:
            self._others[size] = NetworkStack(
                self.name, size, self._input_shape, self._classes, self._device, self._smooth
            )
        return self._others[size]

    def _sample_own(self, seed: int) -> Params:
        with seeded(seed, self._device):
            nets = [models.build(self.name, self._input_shape, self._classes) for _ in range(self.size)]
        states = [dict(net.named_parameters()) for net in nets]
        return {name: stacked([s[name].detach() for s in states]).to(self._device) for name in self._shapes}

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """The outputs [E, B, outputs] as in evaluation: dropout is off, BatchNorm uses the statistics of this batch."""

        def one(params: Params, rest: Params) -> Tensor:
            found: Tensor = torch.func.functional_call(self._net, {**params, **rest}, (x,))
            return found

        # Copies, one per network: BatchNorm writes its running statistics into them.
        rest = {name: t.detach().expand(self.size, *t.shape).clone() for name, t in self._rest.items()}
        with _evaluating(self._net):
            result: Tensor = torch.func.vmap(one, randomness="different")(params, rest)
        return result

    def mean_loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The networks' mean loss on real data, differentiable in params."""
        losses: Tensor = torch.func.vmap(classification_loss, in_dims=(0, None))(self.logits(params, x), y)
        return losses.mean()

    @torch.no_grad()
    def accuracies(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Each network's share of right answers [E]."""
        right = torch.zeros(self.size, device=self._device)
        each = max(1, (CACHED if self._convolves and not self._batch_statistics else AT_ONCE) // self.size)
        batches = -(-len(x) // each)
        for i in range(
            batches
        ):  # every n-th sample, so that BatchNorm sees all classes of data that are sorted by class
            right += (predictions(self.logits(params, x[i::batches])) == y[i::batches]).sum(-1)
        return right / len(x)


@dataclass(frozen=True)
class Part:
    """Some of a stack's networks, as a stack.

    Attributes:
        first: the number of the first of them.
        stack: of as many.
        of: how many the whole stack has.
    """

    first: int
    stack: NetworkStack
    of: int

    @property
    def share(self) -> float:
        """Of the whole stack's networks."""
        return self.stack.size / self.of

    def take(self, params: Params) -> Params:
        """These networks' parameters, out of the whole stack's [E, ...]."""
        if self.stack.size == self.of:
            return params
        last = self.first + self.stack.size
        return {name: p[self.first : last].detach().clone() for name, p in params.items()}


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in net.modules()}
    for module in modes:
        module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _xavier(name: str, size: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) < 2:  # a bias, or the scale of a normalization layer
        return torch.full((size, *shape), float(name.endswith("weight")))
    receptive = math.prod(shape[2:])
    std = math.sqrt(2.0 / ((shape[0] + shape[1]) * receptive))
    return torch.randn(size, *shape, generator=generator) * std
