"""The objects of a run, and where it stands: what is saved in a checkpoint and loaded from it."""

import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from localgrad.blocks import Block
from localgrad.config import TrainConfig, fits
from localgrad.errors import LocalGradError
from localgrad.images import ImageSet
from localgrad.pipeline import Stage
from localgrad.runs import Board, RunFolder, load_state
from localgrad.schedule import learning_rate
from localgrad.shards import shard_optimizer_state, sharded_as, whole

if TYPE_CHECKING:
    from localgrad.graphs import GraphedStep
    from localgrad.guard import Guard


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
    guard: "Guard | None" = None
    """What keeps a step that is not finite from changing anything, where the device decides that and not the host."""
    graphed: "GraphedStep | None" = None
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


def save(run: Run) -> None:
    """Writes the checkpoint; the config says how many of the last ones stay."""
    run.state.elapsed_seconds = time.perf_counter() - run.begin
    run.state.seconds_per_step = run.seconds_per_step
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    if run.stage:
        run.stage.gather()
        on_cpu = tree_map_only(Tensor, Tensor.cpu, optimizers)
        optimizers = [state for states in run.stage.gather_objects(on_cpu) for state in states]
    saved = whole(
        {
            "model": run.model.state_dict(),
            "auxiliary": [block.auxiliary_state_dict() for block in run.blocks],
            "optimizers": optimizers,
        }
    )
    if run.fabric.is_global_zero:
        run.folder.save_checkpoint(saved | {"state": asdict(run.state)}, run.config.keep_checkpoints)
    run.fabric.barrier()  # a process that ended sooner would have the others stopped, this one while it writes


def load(run: Run) -> None:
    """Loads the folder's newest whole checkpoint into the objects of the run.

    Raises:
        LocalGradError: none is whole, or it is of another model or version.
    """
    path, saved = run.folder.newest_checkpoint()
    state = _state(saved.get("state"), len(run.blocks), path)
    own = dict(zip(run.own, run.optimizers, strict=True))
    numbers = range(len(run.blocks))
    load_state(lambda values: _load_model(run.model, values), saved.get("model"), path)
    for name, load_one in (
        ("auxiliary", lambda number, values: _load_auxiliary(run.blocks[number], values)),
        ("optimizers", lambda number, values: _load_optimizer(own.get(number), values)),
    ):
        load_state(
            lambda parts, one=load_one: [one(number, part) for number, part in zip(numbers, parts, strict=True)],
            saved.get(name),
            path,
        )
    run.state = state
    run.begin = time.perf_counter() - run.state.elapsed_seconds
    if run.fabric.is_global_zero:
        run.folder.set_aside_newer(path)


def _load_model(model: nn.Module, values: Any) -> None:
    model.load_state_dict(sharded_as(values, model.state_dict()))


def _load_auxiliary(block: Block, values: Any) -> None:
    block.load_auxiliary_state_dict(sharded_as(values, block.auxiliary_state_dict()))


def _load_optimizer(optimizer: torch.optim.Optimizer | None, values: Any) -> None:
    if optimizer is not None:  # else it is the optimizer of another process's block
        optimizer.load_state_dict(values)
        shard_optimizer_state(optimizer)


def _state(values: Any, num_blocks: int, path: Path) -> State:
    """The state of a checkpoint, with the types of every field checked."""
    hints = get_type_hints(State)
    if (
        not isinstance(values, dict)
        or values.keys() != hints.keys()
        or not all(fits(hint, values[name]) for name, hint in hints.items())
        or len(values["sums"]) != num_blocks + 1
    ):
        raise LocalGradError(
            f"{path} is not a checkpoint of this version of localgrad, or not of this run; "
            "start again in another --run-dir"
        )
    return State(**values)
