"""A site: the place of an objective in the model, which the objective's factory gets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.units import Unit

Criterion = Callable[[Tensor, Any], Tensor]
"""A function of the model's output and the targets that returns a scalar loss. It defines what targets are."""


@dataclass(frozen=True)
class Site:
    """The place of an objective in the model. The objective's factory gets a site and builds the module for it.

    Attributes:
        features: shape of the features that the objective gets, `(N, C, H, W)`, `(N, H, W, C)`, `(N, C, L)`,
            `(N, L, D)` or `(N, D)`.
        channel_dim: the dimension of `features` that holds channels, 1 or the last.
        inputs: shape of the network's input, `(N, 3, H, W)` for images.
        index: index of the block, from 0.
        num_blocks: number of blocks K. The last block counts too, although it has no objective.
        following: the model's units after these features, its head included.
        model: the whole network, for an objective that reads another part of it, such as its output layer. A module
            that stores it must not register it as a submodule: `self.model = (site.model,)`.
        criterion: loss of the model's output. Heads use it unless their factory gets another.
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
"""A function that builds, for a site, a module with `forward(features, targets, inputs) -> loss`.

A module that does not read the inputs sets `reads_inputs = False`, so that block-parallel training does not send them.
"""
