"""The objects of a run: config, devices, images, model, blocks, optimizers and state."""

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
"""Function that trains this rank's blocks on inputs, targets and features; returns their losses and gradient norms."""


@dataclass
class Run:
    """The objects of a run, which `build_run` makes from a config. Nothing here reads or writes files."""

    config: TrainConfig
    fabric: Fabric
    train: ImageSet
    test: ImageSet
    model: nn.Module
    blocks: list[Block]
    """All blocks of the network, on every rank."""
    placement: Placement
    optimizers: list[Optimizer]
    """One optimizer for each block of this rank."""
    state: State
    check: HostCheck | DeviceCheck
    update: Update
    """The device's work in a step: gradients, check and updates; with `cuda_graph`, replayed as a CUDA graph."""
    validation: ImageSet | None = None
    """Images on which the best epoch is chosen; None chooses it on the test images."""
    validation_error: float | None = None
    """Error in percent on the validation images, at their last evaluation."""
    rate: Tensor | None = None
    """The learning rate as a tensor on the device, for CUDA graphs; None without them."""
    begin: float = field(default_factory=time.perf_counter)
    """Start of the run on the clock of `time.perf_counter`; of a resumed run, as if there had been no pause."""
    predicted: bool = False
    """Whether the remaining time of the run has been reported."""
    seconds: list[float] = field(default_factory=list)
    """Seconds from one optimizer step to the next, for the timed steps of this epoch."""

    @property
    def own_blocks(self) -> list[Block]:
        """The blocks that this rank trains."""
        return [self.blocks[index] for index in self.placement.own]

    @property
    def batch_size(self) -> int:
        """Number of images per batch on one rank (with blocks on several ranks: in one pipeline)."""
        return self.config.optim.batch_size // self.placement.replicas

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch."""
        return self.train.num_batches(self.batch_size, self.placement.replicas, train=True)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the current epoch."""
        return rate_of(self.config.optim, self.state.epoch)

    @property
    def epoch_of_epochs(self) -> str:
        """The current epoch and the number of epochs, such as `3/400`."""
        return f"{self.state.epoch}/{self.config.optim.epochs}"

    @property
    def cuts(self) -> list[str]:
        """Names of the units after which gradients are isolated."""
        return [block.names[-1] for block in self.blocks[:-1]]

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of the `backbone`, of the `auxiliary` networks, and of the `trainable` ones in both."""
        backbone = {id(parameter) for parameter in self.model.parameters()}
        parameters = {id(parameter): parameter for block in self.blocks for parameter in block.parameters()}
        return {
            "backbone": sum(parameter.numel() for parameter in self.model.parameters()),
            "auxiliary": sum(parameter.numel() for key, parameter in parameters.items() if key not in backbone),
            "trainable": sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad),
        }

    @property
    def seconds_per_step(self) -> float | None:
        """Median seconds from one optimizer step to the next, data loading included; None before a timed step."""
        return statistics.median(self.seconds) if self.seconds else self.state.seconds_per_step

    @property
    def images_per_second(self) -> float | None:
        """Training speed in images per second, of all devices together; None before a timed step."""
        return self.config.optim.batch_size / self.seconds_per_step if self.seconds_per_step else None

    def own_sums(self) -> Tensor:
        """`State.sums` of this rank's blocks and its number of images, `(own blocks + 1,)`, on the rank's device."""
        own, dtype = self.placement.own, torch.float32 if self.fabric.device.type == "mps" else torch.float64
        sums = [*self.state.sums[own.start : own.stop], self.state.sums[-1]]
        return torch.tensor(sums, dtype=dtype).to(self.fabric.device)
