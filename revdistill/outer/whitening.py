"""ZCA whitening: inputs without the correlations of their features, as near to the inputs as that can be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from revdistill.outer.data import Dataset

EPS = 0.1  # added to each variance, in units of the mean variance, as Nguyen et al. 2021 and those after them do
VARIANCE = 0.99  # the share of it that the components kept have; what is left is scaled by one number
CHUNK = 4096  # samples at once
MOST_FEATURES = 2**14  # their covariances are 2 GiB


@dataclass(frozen=True, eq=False)
class Whitening:
    """x -> W (x - mean) with W = rest I + C^T diag(scales - rest) C, on inputs as vectors of D features.

    C has the first r principal components of the training data as its rows, and scales are (variance + eps)^(-1/2). Of
    what is orthogonal to them, all directions have the mean of their variances, and the scale `rest`.

    Attributes:
        mean: float32 [D].
        components: float32 [r, D], orthonormal.
        scales: float32 [r].
        rest: of everything else.
    """

    mean: Tensor
    components: Tensor
    scales: Tensor
    rest: float

    @classmethod
    def of(cls, x: Tensor) -> Whitening:
        """The whitening of samples x [N, ...].

        Raises:
            ValueError: they have too many features.
        """
        rows = x.flatten(1)
        if rows.shape[1] > MOST_FEATURES:
            raise ValueError(
                f"zca is True, but inputs have {rows.shape[1]:,} features, of which it takes the covariances of all "
                f"pairs; accepted are at most {MOST_FEATURES:,}: use smaller images, or leave out zca"
            )
        mean = rows.mean(0, dtype=torch.float64)
        covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        for chunk in torch.split(rows, CHUNK):
            centred = chunk.cpu() - mean.float().cpu()
            covariance += (centred.T @ centred).double()
        values, vectors = torch.linalg.eigh(covariance / len(rows))
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        total = float(values.sum())
        kept = int((values.cumsum(0) < VARIANCE * total).sum()) + 1
        eps = EPS * (total / len(values) or 1.0)
        left = values[kept:]
        rest = (float(left.mean()) if len(left) else 0.0) + eps
        return cls(
            mean.float().cpu(),
            vectors[:, :kept].T.float().contiguous(),
            (values[:kept] + eps).rsqrt().float(),
            1 / math.sqrt(rest),
        )

    def apply(self, x: Tensor) -> Tensor:
        """Inputs [N, ...] whitened."""
        found = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # whatever x's strides: its rows are views
        mean, weights = self.mean.to(x.device), self.scales - self.rest
        for rows, chunk in zip(torch.split(found.flatten(1), CHUNK), torch.split(x.flatten(1), CHUNK), strict=True):
            rows.copy_(self._scaled(chunk - mean, weights, self.rest))
        return found

    def undo(self, x: Tensor) -> Tensor:
        """Whitened inputs [N, ...] as they were before."""
        flat = self._scaled(x.flatten(1), 1 / self.scales - 1 / self.rest, 1 / self.rest)
        return (flat + self.mean.to(x.device)).reshape(x.shape)

    def _scaled(self, rows: Tensor, weights: Tensor, rest: float) -> Tensor:
        components = self.components.to(rows.device)
        return rest * rows + ((rows @ components.T) * weights.to(rows.device)) @ components

    def of_data(self, data: Dataset) -> Dataset:
        """All parts of the data whitened."""
        return replace(
            data,
            x=self.apply(data.x),
            x_validation=self.apply(data.x_validation),
            x_test=self.apply(data.x_test),
        )
