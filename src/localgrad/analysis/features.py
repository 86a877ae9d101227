"""Features of a trained network after each of its units; every analysis starts from them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from localgrad.core.units import Unit
from localgrad.data.sets import ImageSet

ROUNDING = 1e-12
"""Share of a float32 feature's mean square below which its variance is nothing but rounding."""


@contextmanager
def frozen(found: Sequence[Unit]) -> Iterator[None]:
    """Context: units in evaluation mode, gradients off. Restores the training flag of every module."""
    modes = [(module, module.training) for unit in found for module in unit.module.modules()]
    for unit in found:
        unit.module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def unit_features(found: Sequence[Unit], inputs: Tensor) -> Iterator[Tensor]:
    """Yields the features after each unit in turn, so that not all of them are in memory.

    Args:
        found: the units, in order, as `localgrad.units` gives them.
        inputs: `(N, 3, H, W)`, not modified.
    """
    features = inputs
    for unit in found:
        features = unit.module(features.clone() if unit.writes_input else features)
        yield features


def pooled(features: Tensor, channel_dim: int) -> Tensor:
    """The mean over all positions (pixels, tokens), `(N, C)` in float32."""
    over = [dim for dim in range(1, features.ndim) if dim != channel_dim % features.ndim]
    return features.float().mean(over) if over else features.float()


def plain_batches(images: ImageSet, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in a fixed random order, without augmentation. Random, since files are often sorted by class."""
    config = replace(images.config, crop="none", flip=False)
    return replace(images, config=config).batches(batch_size, train=True, device=device)


def device_of(found: Sequence[Unit]) -> torch.device:
    """Device of the units' parameters; the CPU if they have none."""
    return next((parameter.device for unit in found for parameter in unit.module.parameters()), torch.device("cpu"))
