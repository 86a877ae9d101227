"""Centred kernel alignment (CKA): the similarity of two networks' features, unit by unit."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from localgrad.analysis.features import ROUNDING, frozen, unit_features
from localgrad.core.units import Unit
from localgrad.errors import LocalGradError

MIN_IMAGES = 4
"""Fewest images of a batch: the estimator divides by n (n - 3)."""


def cka(first: Sequence[Unit], second: Sequence[Unit], batches: Iterable[Tensor]) -> Tensor:
    """Minibatch linear CKA between every unit of one network and every unit of another.

    For each batch b of n images, with features X of one unit and Y of the other, flattened to `(n, D)`,

        CKA = mean_b HSIC(X_b, Y_b) / sqrt(mean_b HSIC(X_b, X_b) * mean_b HSIC(Y_b, Y_b)),

    with the unbiased estimator of the Hilbert-Schmidt independence criterion on K = X X^T and L = Y Y^T, diagonals
    set to zero:

        HSIC(X, Y) = (tr(K L) + (1'K1)(1'L1) / ((n - 1)(n - 2)) - 2 (1'K L1) / (n - 2)) / (n (n - 3)).

    The estimator of HSIC is unbiased, so the batch size hardly changes the value. CKA is 1 for features that are equal
    up to rotation and scale. For unrelated features it is about 0, and can be slightly negative.

    Args:
        first: units of one network.
        second: units of the other network, on the same device; may be those of the first.
        batches: inputs `(n, 3, H, W)` for both networks, with n at least 4; preferably of equal size, in random order.

    Returns:
        `(len(first), len(second))` float64; NaN for a unit with constant features.

    Raises:
        LocalGradError: there is no batch, or a batch has fewer than 4 images.

    Source: Nguyen, Raghu and Kornblith 2021, Do wide and deep networks learn the same things?
    (https://arxiv.org/abs/2010.15327), equations 2 and 3; the inner product of U-centred matrices that computes HSIC:
    Székely and Rizzo 2014.
    """
    cross = torch.zeros(len(first), len(second), dtype=torch.float64)
    own = torch.zeros(len(first), dtype=torch.float64), torch.zeros(len(second), dtype=torch.float64)
    count = 0
    with frozen(first), frozen(second):
        for inputs in batches:
            n = len(inputs)
            if n < MIN_IMAGES:
                raise LocalGradError(f"a batch has {n} image(s): CKA needs at least {MIN_IMAGES} in each")
            grams = _grams(first, inputs)
            others = grams if second is first else _grams(second, inputs)
            scale = n * (n - 3)
            cross += grams @ others.T / scale
            for total, kernels in zip(own, (grams, others), strict=True):
                total += kernels.square().sum(1) / scale
            count += 1
    if not count:
        raise LocalGradError("there is no batch to compare the networks on: give at least one, of 4 images or more")
    alignment = cross / (own[0][:, None] * own[1]).sqrt()
    return alignment.where((own[0][:, None] > 0) & (own[1] > 0), torch.nan)


def mean_diagonal(alignment: Tensor) -> float:
    """Mean CKA of corresponding units in two networks with the same units: the mean of the diagonal."""
    return float(alignment.diagonal().mean())


def _grams(found: Sequence[Unit], inputs: Tensor) -> Tensor:
    """The U-centred Gram matrix of each unit's features, flattened: `(units, n * n)` float64 on the CPU."""
    return torch.stack([u_centred_gram(features.flatten(1)).flatten() for features in unit_features(found, inputs)])


def u_centred_gram(features: Tensor) -> Tensor:
    """`X X^T` without its diagonal, centred so that the off-diagonal entries of every row sum to zero.

    The sum of the elementwise product of two such matrices is `n (n - 3) HSIC`.

    Args:
        features: `(n, D)`.

    Returns:
        `(n, n)` float64 on the CPU; 0 if the features are constant.
    """
    features = features.float()
    centred = features - features.mean(0)  # mathematically no change, but smaller rounding errors
    if centred.square().sum() <= ROUNDING * features.square().sum():
        return torch.zeros(len(features), len(features), dtype=torch.float64)
    gram = (centred @ centred.T).cpu().double()
    gram.fill_diagonal_(0)
    n = len(gram)
    rows = gram.sum(1)
    gram += rows.sum() / ((n - 1) * (n - 2)) - (rows[:, None] + rows) / (n - 2)
    return gram.fill_diagonal_(0)
