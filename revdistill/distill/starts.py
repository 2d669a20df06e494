"""What synthetic data start as. Each function returns float32 [batches, classes x per_class, ...], ordered by class, on
the data's device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from revdistill.outer.data import Dataset


def noise(data: Dataset, batches: int, per_class: int, generator: torch.Generator) -> Tensor:
    """Standard normal."""
    return torch.randn(batches, data.classes * per_class, *data.input_shape, generator=generator).to(data.x.device)


def real(data: Dataset, batches: int, per_class: int, generator: torch.Generator) -> Tensor:
    """Real samples of each class; one is used again only where there are too few."""
    needed = batches * per_class
    chosen = []
    for own in _by_class(data):
        order = torch.cat([own[torch.randperm(len(own), generator=generator)] for _ in range(-(-needed // len(own)))])
        chosen.append(order[:needed].reshape(batches, per_class))
    return data.x[torch.cat(chosen, 1).to(data.x.device)].clone()


def kmeans(data: Dataset, batches: int, per_class: int, generator: torch.Generator) -> Tensor:
    """The centroids of each class's k-means clusters, in random order.

    They cover a class as no random choice of samples does, and average its noise away. A single cluster's is the mean.
    One is used again only where there are too few samples.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    needed = batches * per_class
    chosen = []
    for own in _by_class(data):
        samples = data.x[own.to(data.x.device)].flatten(1).cpu().numpy()
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        clusters = KMeans(min(needed, len(own)), n_init=1, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # samples that are equal make centroids that are equal
            centroids = torch.from_numpy(clusters.fit(samples).cluster_centers_).float()
        order = torch.randperm(len(centroids), generator=generator).repeat(-(-needed // len(centroids)))[:needed]
        chosen.append(centroids[order].reshape(batches, per_class, *data.input_shape))
    return torch.cat(chosen, 1).to(data.x.device)


def _by_class(data: Dataset) -> list[Tensor]:
    """The indices of each class's training samples."""
    found = [(data.y.cpu() == c).nonzero()[:, 0] for c in range(data.classes)]
    for c, own in enumerate(found):
        if not len(own):
            raise ValueError(
                f"start is made of real data, but the training data have no sample of class {data.class_names[c]!r}; "
                "use noise"
            )
    return found


STARTS: dict[str, Callable[[Dataset, int, int, torch.Generator], Tensor]] = {
    "noise": noise,
    "real": real,
    "kmeans": kmeans,
}
