"""A site: the place of an objective in the model, as its factory sees it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.units import Unit

Criterion = Callable[[Tensor, Any], Tensor]
"""Model output and targets to a scalar loss; targets are whatever the criterion takes."""


@dataclass(frozen=True)
class Site:
    """The place of an objective in the model; its factory builds it from this.

    Attributes:
        features: shape of the features that it gets, `(N, C, H, W)`, `(N, H, W, C)`, `(N, C, L)`, `(N, L, D)` or
            `(N, D)`.
        channel_dim: the dimension of `features` that holds channels, 1 or the last.
        inputs: shape of the network's input, `(N, 3, H, W)` for images.
        index: of the block, from 0.
        num_blocks: K, the last block included, which has no objective.
        following: the model's units after these features, its head included.
        model: the whole network, for an objective that reads another part of it, such as its output layer. A module
            that keeps it must not register it: `self.model = (site.model,)`.
        criterion: loss of the model's output; heads use it unless their factory is given another.
    """

    features: torch.Size
    channel_dim: int
    inputs: torch.Size
    index: int
    num_blocks: int
    following: tuple[Unit, ...] = ()
    model: nn.Module | None = None
    criterion: Criterion = F.cross_entropy


Objective = Callable[[Site], nn.Module]
"""Builds, for a site, a module with `forward(features, targets, inputs) -> loss`.

A module that does not read the inputs says `reads_inputs = False`, so that block-parallel training need not send them.
"""
