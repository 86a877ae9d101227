"""The objects of a run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from localgrad.config.schema import TrainConfig
from localgrad.core.block import Block
from localgrad.data.sets import ImageSet
from localgrad.training.nonfinite import DeviceCheck, HostCheck
from localgrad.training.placement import Placement
from localgrad.training.schedule import rate_of
from localgrad.training.state import State

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Update = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Inputs, targets and features to losses and gradient norms of this rank's blocks, whose weights have changed."""


@dataclass
class Run:
    """The objects of a run, as `build_run` makes them from a config; no folder, nothing on the disk."""

    config: TrainConfig
    fabric: Fabric
    train: ImageSet
    test: ImageSet
    model: nn.Module
    blocks: list[Block]
    """All of them, on every rank."""
    placement: Placement
    optimizers: list[Optimizer]
    """One for each block of this rank."""
    state: State
    check: HostCheck | DeviceCheck
    update: Update
    """What a step does on the device; recorded as CUDA graphs where the config says so."""
    validation: ImageSet | None = None
    """Images that the best epoch is chosen on; the test images where there are none."""
    validation_error: float | None = None
    """Error on them in percent, when it was last evaluated."""
    rate: Tensor | None = None
    """The learning rate on the device, where CUDA graphs read it there."""
    begin: float = field(default_factory=time.perf_counter)
    """When the run would have begun, had it been done in one sitting."""
    predicted: bool = False
    """Whether it has been said how long the run takes."""
    seconds: list[float] = field(default_factory=list)
    """Seconds from one optimizer step of this epoch to the next."""

    @property
    def own_blocks(self) -> list[Block]:
        """The blocks that this rank trains."""
        return [self.blocks[index] for index in self.placement.own]

    @property
    def batch_size(self) -> int:
        """Images of a batch on one rank (with blocks on several ranks, in one pipeline)."""
        return self.config.optim.batch_size // self.placement.replicas

    @property
    def learning_rate(self) -> float:
        """Learning rate of the epoch that is being trained."""
        return rate_of(self.config.optim, self.state.epoch)

    @property
    def epoch_of_epochs(self) -> str:
        """The epoch that is being trained, as `3/400`."""
        return f"{self.state.epoch}/{self.config.optim.epochs}"

    @property
    def cuts(self) -> list[str]:
        """Names of the units after which gradients are isolated."""
        return [block.names[-1] for block in self.blocks[:-1]]

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters: of the `backbone`, `auxiliary`, and `trainable` in all."""
        backbone = {id(parameter) for parameter in self.model.parameters()}
        parameters = {id(parameter): parameter for block in self.blocks for parameter in block.parameters()}
        return {
            "backbone": sum(parameter.numel() for parameter in self.model.parameters()),
            "auxiliary": sum(parameter.numel() for key, parameter in parameters.items() if key not in backbone),
            "trainable": sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad),
        }

    @property
    def seconds_per_step(self) -> float | None:
        """Median seconds from one optimizer step to the next: data, gradients and update; None before the second."""
        return statistics.median(self.seconds) if self.seconds else self.state.seconds_per_step

    @property
    def images_per_second(self) -> float | None:
        """Images trained on a second, on all devices together; None before the second step."""
        return self.config.optim.batch_size / self.seconds_per_step if self.seconds_per_step else None

    def own_sums(self) -> Tensor:
        """The sums in the state of this rank's blocks and of the images `(own blocks + 1,)`, on its device."""
        own, dtype = self.placement.own, torch.float32 if self.fabric.device.type == "mps" else torch.float64
        sums = [*self.state.sums[own.start : own.stop], self.state.sums[-1]]
        return torch.tensor(sums, dtype=dtype).to(self.fabric.device)
