"""Activation maps of chosen images, and features of many images projected to two dimensions."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from localgrad.analysis.features import ROUNDING, device_of, frozen, pooled, unit_features
from localgrad.core.site import Site
from localgrad.core.units import Unit
from localgrad.data.sets import ImageSet
from localgrad.errors import CannotSitError, LocalGradError
from localgrad.objectives.layout import AsMap

Projection = Literal["pca", "tsne"]
MIN_POINTS = 4
"""Fewest images of a projection."""


def activation_maps(found: Sequence[Unit], inputs: Tensor) -> list[Tensor | None]:
    """The mean over the channels of each unit's features as a map; tokens are put back on the grid of their patches.

    Args:
        found: units of the trained network.
        inputs: images `(N, 3, H, W)`, normalised.

    Returns:
        `(N, h, w)` float32 on the CPU for each unit; None if the features are a vector or form no grid.
    """
    maps: list[Tensor | None] = []
    with frozen(found):
        for index, (unit, features) in enumerate(zip(found, unit_features(found, inputs), strict=True)):
            as_map = _as_map(unit, features, inputs, index, len(found))
            maps.append(None if as_map is None else as_map(features).float().mean(1).cpu())
    return maps


def _as_map(unit: Unit, features: Tensor, inputs: Tensor, index: int, count: int) -> AsMap | None:
    if features.ndim == 2:
        return None
    try:
        return AsMap(Site(features.shape, unit.channel_dim, inputs.shape, index, count), "activation_maps")
    except CannotSitError:
        return None  # tokens without a grid have no map


def project(
    found: Sequence[Unit],
    images: ImageSet,
    *,
    at: Sequence[int] | None = None,
    method: Projection = "pca",
    batch_size: int = 256,
    seed: int = 0,
) -> list[Tensor]:
    """The globally pooled features of units, projected to two dimensions for each unit separately.

    Args:
        found: units of the trained network.
        images: images to project, in the order of the set, without augmentation.
        at: positions of the units to project; None takes all of them.
        method: `"pca"`, the two directions of largest variance, or `"tsne"`, which keeps neighbours together; its
            distances between groups have no meaning.
        batch_size: images of a batch.
        seed: seed of t-SNE.

    Returns:
        `(N, 2)` float32 for each of these units; zeros if its features are constant.

    Raises:
        LocalGradError: the method is unknown, or there are fewer than 4 images.
    """
    if method not in get_args(Projection):
        raise LocalGradError(f"the projection is {method!r}: it is one of {', '.join(get_args(Projection))}")
    if len(images) < MIN_POINTS:
        raise LocalGradError(f"there are {len(images)} image(s) to project: give at least {MIN_POINTS}")
    parts: list[list[Tensor]] = [[] for _ in found]
    with frozen(found):
        for inputs, _ in images.batches(batch_size, train=False, device=device_of(found)):
            for unit, kept, features in zip(found, parts, unit_features(found, inputs), strict=True):
                kept.append(pooled(features, unit.channel_dim).cpu())
    chosen = range(len(found)) if at is None else at
    return [_projected(torch.cat(parts[index]), method, seed) for index in chosen]


def _projected(features: Tensor, method: Projection, seed: int) -> Tensor:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    features = features.double()
    if features.var(0).sum() <= ROUNDING * features.square().mean(0).sum():
        return torch.zeros(len(features), 2)
    rows = F.pad(features, (0, max(0, 2 - features.shape[1]))).numpy()  # PCA to two dimensions needs two columns
    if method == "pca":
        points = PCA(2, svd_solver="full").fit_transform(rows)
    else:
        points = TSNE(2, perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=seed).fit_transform(rows)
    return torch.from_numpy(points).float()
