"""Features of a trained network after each of its units, the input of every analysis."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from localgrad.core.units import Unit
from localgrad.data.sets import ImageSet
from localgrad.training.error_rates import evaluation_mode

ROUNDING = 1e-12
"""A variance below this fraction of the mean square of float32 features is a rounding error."""


@contextmanager
def frozen(found: Sequence[Unit]) -> Iterator[None]:
    """Context: evaluation mode and no gradients for the units. Restores the training flag of every module."""
    with evaluation_mode(*(unit.module for unit in found)), torch.no_grad():
        yield


def unit_features(found: Sequence[Unit], inputs: Tensor) -> Iterator[Tensor]:
    """Yield the features after each unit in turn, so that memory does not hold all of them.

    Args:
        found: the units in order, from `localgrad.units`.
        inputs: `(N, 3, H, W)`; not modified in place.
    """
    features = inputs
    for unit in found:
        features = unit.module(features.clone() if unit.writes_input else features)
        yield features


def pooled(features: Tensor, channel_dim: int) -> Tensor:
    """Global average pooling over all positions (pixels or tokens), `(N, C)` in float32."""
    over = [dim for dim in range(1, features.ndim) if dim != channel_dim % features.ndim]
    return features.float().mean(over) if over else features.float()


def plain_batches(images: ImageSet, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without augmentation, in a fixed random order because files are often sorted by class."""
    config = replace(images.config, crop="none", flip=False)
    return replace(images, config=config).batches(batch_size, train=True, device=device)


def device_of(found: Sequence[Unit]) -> torch.device:
    """Device of the units' parameters; the CPU if they have none."""
    return next((parameter.device for unit in found for parameter in unit.module.parameters()), torch.device("cpu"))
