"""The objects of a run, and where it stands."""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.config.schema import TrainConfig
from localgrad.core.block import Block
from localgrad.data.sets import ImageSet
from localgrad.parallel.pipeline import Stage
from localgrad.runs.folder import RunFolder
from localgrad.training.schedule import learning_rate
from localgrad.training.tensorboard import Board


@dataclass
class State:
    """Where a run stands; with weights and optimizers, all that a checkpoint needs."""

    sums: list[float]
    """Over the images of this epoch so far, the sum of each block's loss; last, the number of those images."""
    epoch: int = 1
    """Epoch that is being trained, from 1."""
    batch: int = 0
    """Batches of that epoch that are done."""
    step: int = 0
    """Optimizer steps done since the beginning."""
    lines: int = 0
    """Lines of metrics written."""
    elapsed_seconds: float = 0.0
    """Seconds of training and evaluation, over all sittings."""
    test_error: float = 100.0
    local_errors: list[float | None] | None = None
    best_test_error: float = 100.0
    best_epoch: int = 0
    peak_memory_bytes: int | None = None
    seconds_per_step: float | None = None
    skipped: int = 0
    """Batches skipped since the beginning, because a loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Of those, the ones since the last optimizer step."""


@dataclass
class Run:
    """The objects of a run; all but `state` are made from the config alone."""

    config: TrainConfig
    folder: RunFolder
    fabric: Any
    train: ImageSet
    test: ImageSet
    model: nn.Module
    blocks: list[Block]
    stage: Stage | None
    """This process's part of the blocks, where blocks are shared between devices."""
    wrapped: list[nn.Module]
    """The blocks that this process trains, in a data-parallel wrapper each where images are shared."""
    optimizers: list[torch.optim.Optimizer]
    """One for each of them."""
    state: State
    guard: Any = None
    """What keeps a step that is not finite from changing anything, where the device decides that and not the host."""
    graphed: Any = None
    """The step as CUDA graphs, where that is asked for."""
    rate: Tensor | None = None
    """The learning rate on the device, where graphs read it there."""
    begin: float = field(default_factory=time.perf_counter)
    """When the run would have begun, had it been done in one sitting."""
    seconds: list[float] = field(default_factory=list)
    """Seconds from one optimizer step of this epoch to the next."""
    board: Board | None = None
    """Writer for TensorBoard, where that is asked for."""

    @property
    def own(self) -> range:
        """Indices of the blocks that this process trains."""
        return self.stage.own if self.stage else range(len(self.blocks))

    @property
    def own_blocks(self) -> list[Block]:
        """The blocks that this process trains."""
        return [self.blocks[index] for index in self.own]

    @property
    def replicas(self) -> int:
        """Number of shares of a batch."""
        return self.config.replicas if self.config.parallel == "blocks" else self.fabric.world_size

    @property
    def replica(self) -> int:
        """Which share of each batch this process sees, from 0."""
        return self.fabric.global_rank * self.replicas // self.fabric.world_size

    @property
    def batch_size(self) -> int:
        """Images of a batch in one share."""
        return self.config.optim.batch_size // self.replicas

    @property
    def learning_rate(self) -> float:
        """Learning rate of the epoch that is being trained."""
        optim = self.config.optim
        return learning_rate(
            self.state.epoch,
            epochs=optim.epochs,
            peak=optim.lr,
            warmup_epochs=optim.warmup_epochs,
            first_epoch=optim.first_epoch,
        )

    @property
    def epoch_of_epochs(self) -> str:
        """The epoch that is being trained, as `3/400`."""
        return f"{self.state.epoch}/{self.config.optim.epochs}"

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
