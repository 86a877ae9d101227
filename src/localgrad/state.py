"""The objects of a run, and where it stands: what is saved in a checkpoint and loaded from it."""

import statistics
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import nn

from localgrad.blocks import Block
from localgrad.config import TrainConfig
from localgrad.errors import LocalGradError
from localgrad.images import ImageSet
from localgrad.runs import Board, RunFolder, load_state
from localgrad.schedule import learning_rate


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
    seconds_per_step: float = 0.0


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
    wrapped: list[Any]
    """The blocks as Fabric runs them: under autocast, and in a DDP wrapper each on several devices."""
    optimizers: list[torch.optim.Optimizer]
    state: State
    begin: float = field(default_factory=time.perf_counter)
    """When the run would have begun, had it been done in one sitting."""
    seconds: list[float] = field(default_factory=list)
    """Seconds from one optimizer step of this epoch to the next."""
    board: Board | None = None
    """Writer for TensorBoard, where that is asked for."""

    @property
    def batch_size(self) -> int:
        """Images of a batch on one device."""
        return self.config.optim.batch_size // self.fabric.world_size

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
    def seconds_per_step(self) -> float:
        """Median seconds from one optimizer step to the next: data, gradients and update."""
        return statistics.median(self.seconds) if self.seconds else self.state.seconds_per_step

    @property
    def images_per_second(self) -> float:
        """Images trained on a second, on all devices together."""
        return self.config.optim.batch_size / self.seconds_per_step if self.seconds_per_step else 0.0


def save(run: Run) -> None:
    """Writes the checkpoint."""
    run.state.elapsed_seconds = time.perf_counter() - run.begin
    run.state.seconds_per_step = run.seconds_per_step
    if run.fabric.is_global_zero:
        run.folder.save_checkpoint(
            {
                "model": run.model.state_dict(),
                "auxiliary": [block.auxiliary_state_dict() for block in run.blocks],
                "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
                "state": asdict(run.state),
            }
        )


def load(run: Run) -> None:
    """Loads the folder's checkpoint into the objects of the run.

    Raises:
        LocalGradError: it is damaged, or of another model or version.
    """
    path, saved = run.folder.checkpoint, run.folder.load_checkpoint()
    state = saved.get("state")
    if not isinstance(state, dict) or state.keys() != {item.name for item in fields(State)}:
        raise LocalGradError(
            f"{path} is not a checkpoint of this version of localgrad; start again in another --run-dir"
        )
    load_state(run.model.load_state_dict, saved.get("model"), path)
    for name, loaders in (
        ("auxiliary", [block.load_auxiliary_state_dict for block in run.blocks]),
        ("optimizers", [optimizer.load_state_dict for optimizer in run.optimizers]),
    ):
        load_state(
            lambda states, put=loaders: [one(part) for one, part in zip(put, states, strict=True)],
            saved.get(name),
            path,
        )
    run.state = State(**state)
    run.begin = time.perf_counter() - run.state.elapsed_seconds
