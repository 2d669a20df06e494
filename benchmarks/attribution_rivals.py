"""Other ways to say which training example did this, in the protocol of attribution.py: each gives scores [K, n] of the
sign of dL_q/dw_i. They are given what they need of the training: its checkpoints, in plain torch.

`trak` is published code, https://github.com/MadryLab/trak: python -m pip install traker==0.3.2
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from leave_out import Cell, Images, train
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

AT_ONCE = 250  # examples whose gradients are held side by side
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1)
PARTS = 6  # of the training: TracIn's checkpoints are at the end of each, TRAK's at the end of every second
PROJECTED = 512  # of TRAK's random projections: its default, 2,048, takes four times as long here

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoints:
    """A training's parameters along the way.

    net: a network whose own parameters do not matter; params: after each sixth of the steps.
    """

    net: nn.Module
    params: list[Params]


def checkpoints(cell: Cell, images: Images) -> Checkpoints:
    """Of the training with all examples."""
    steps, kept = len(images.order), []
    at = {steps * (part + 1) // PARTS for part in range(PARTS - 1)}

    def keep(k: int, net: nn.Module) -> None:
        if k in at:
            kept.append(_params(net))

    net = train(cell, images, torch.ones(len(images.x)), keep)
    return Checkpoints(net, [*kept, _params(net)])


def _params(net: nn.Module) -> Params:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def _gradients(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Of single examples' losses, [AT_ONCE, parameters] at a time."""

    def loss(p: Params, x_i: Tensor, y_i: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, p, (x_i[None],)), y_i[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    for x_part, y_part in zip(x.split(AT_ONCE), y.split(AT_ONCE), strict=True):
        found = each(params, x_part, y_part)
        yield torch.cat([g.flatten(1) for g in found.values()], 1)


def tracin(cell: Cell, images: Images, along: Checkpoints) -> dict[str, Tensor]:
    """Gradient dot products, summed over the checkpoints (Pruthi et al. 2020); the rate is constant, and left out."""
    total = torch.zeros(len(images.x_queries), len(images.x))
    for params in along.params:
        asked = torch.cat(list(_gradients(along.net, params, images.x_queries, images.y_queries)))
        total -= torch.cat([asked @ g.T for g in _gradients(along.net, params, images.x, images.y)], 1)
    return {"": total}


def last_layer(cell: Cell, images: Images, along: Checkpoints) -> dict[str, Tensor]:
    """Influence functions (Koh & Liang 2017) on the last layer alone, with the exact Hessian of the mean loss; one for
    each damping.
    """
    net, params = along.net, along.params[-1]
    last = len(net.layers) - 1  # type: ignore[arg-type]
    inputs: list[Tensor] = []
    hook = net.layers[last].register_forward_hook(  # type: ignore[index]
        lambda module, given, out: inputs.append(torch.cat([given[0], torch.ones(len(out), 1)], 1))
    )
    with torch.no_grad():
        for x in (images.x, images.x_queries):
            functional_call(net, params, (x,))
    hook.remove()
    weight = torch.cat([params[f"layers.{last}.weight"], params[f"layers.{last}.bias"][:, None]], 1)
    trained, asked = (
        _LastLayer(h, torch.softmax(h @ weight.T, 1), F.one_hot(y, len(weight)))
        for h, y in zip(inputs, (images.y, images.y_queries), strict=True)
    )
    curvature = trained.curvature()
    eye = torch.eye(len(curvature))
    return {
        f"damping {damping:g}": -torch.linalg.solve(curvature + damping * eye, asked.gradients().T).T
        @ trained.gradients().T
        for damping in DAMPINGS
    }


@dataclass(frozen=True)
class _LastLayer:
    """Cross-entropy behind a linear layer.

    inputs: [n, features], with a 1 at the end for the bias; p: [n, classes], the probabilities; right: likewise, 1 at
    the class.
    """

    inputs: Tensor
    p: Tensor
    right: Tensor

    def gradients(self) -> Tensor:
        """Of single examples' losses, [n, classes features]."""
        return torch.einsum("nc,ni->nci", self.p - self.right, self.inputs).flatten(1)

    def curvature(self) -> Tensor:
        """The Hessian of the mean loss."""
        spread = torch.diag_embed(self.p) - torch.einsum("nc,nd->ncd", self.p, self.p)
        size = self.p.shape[1] * self.inputs.shape[1]
        return torch.einsum("ncd,ni,nj->cidj", spread, self.inputs, self.inputs).reshape(size, size) / len(self.p)


def trak(cell: Cell, images: Images, along: Checkpoints) -> dict[str, Tensor]:
    """TRAK (Park et al. 2023) by its authors' package, in float32; checkpoints at a third, two thirds and the end of
    the training.

    It scores the margin log p / (1 - p), which falls where the loss rises: a query's loss changes by -(1 - p) of it.
    """
    from trak import TRAKer

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traker = TRAKer(
            along.net,
            "image_classification",
            len(images.x),
            save_dir=folder,
            device="cpu",
            proj_dim=PROJECTED,
            use_half_precision=False,
            logging_level=logging.ERROR,
        )
        chosen = along.params[1::2]
        for number, params in enumerate(chosen):
            traker.load_checkpoint(params, model_id=number)
            for rows in torch.arange(len(images.x)).split(4 * AT_ONCE):
                traker.featurize((images.x[rows], images.y[rows]), inds=rows.numpy())
        traker.finalize_features()
        for number, params in enumerate(chosen):
            traker.start_scoring_checkpoint("queries", params, number, len(images.x_queries))
            traker.score((images.x_queries, images.y_queries), num_samples=len(images.x_queries))
        margins = torch.tensor(traker.finalize_scores("queries")).T
    with torch.no_grad():
        logits = functional_call(along.net, along.params[-1], (images.x_queries,))
        right = F.cross_entropy(logits, images.y_queries, reduction="none").neg().exp()
    return {"": -(1 - right)[:, None] * margins}


@dataclass(frozen=True)
class Rival:
    """Another way.

    title: for a table; scores: settings -> [K, n]; module: what it needs that is not the project's.
    """

    title: str
    scores: Callable[[Cell, Images, Checkpoints], dict[str, Tensor]]
    module: str | None = None

    def missing(self) -> str | None:
        """Why it cannot run here."""
        if self.module is None or importlib.util.find_spec(self.module):
            return None
        return f"{self.module} is not installed"


RIVALS = {
    "tracin": Rival("TracIn", tracin),
    "last_layer": Rival("influence, last layer", last_layer),
    "trak": Rival("TRAK", trak, "trak"),
}
